"""One step of the real training path under many layouts, types and planted defects, each written down by a capture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.distributed.in_turn import adapted_cpu, detach_chunks, each_layout, micro_batches


def capture(cases: list[dict], folder: str) -> bool:
    """Capture step 1 of every case into `folder/<name>`.

    A case has `name`, `hf`, `layout`, `tp`, `pp` and may have `sp`, `dtype`, `recompute`, `kernels`, `seed` (of the
    samples), `packed` (all samples in one micro-batch) and `plant` (name and arguments of a function below).
    """
    adapted_cpu()
    from megatron_rb.capture.step_capture import StepCapture
    from megatron_rb.config.schema import CaptureConfig, Config, KernelsConfig
    from megatron_rb.parity.samples import draw_samples
    from megatron_rb.shapes.shape import model_fingerprint
    from megatron_rb.train.build import build_trainable
    from megatron_rb.train.step import Runner, train_pass

    for case, session in each_layout(cases):
        shape = session.shape
        config = Config()
        config.model.dtype = case.get("dtype", "fp32")
        config.model.recompute.vision = config.model.recompute.language = case.get("recompute", 0)
        config.parallel.sequence_parallel = case.get("sp", False)
        config.kernels = KernelsConfig(**case.get("kernels", {}))
        trainable = build_trainable(session, config, case["hf"])
        stages = [chunk.module for chunk in trainable.chunks]
        samples = draw_samples(shape, seed=case.get("seed", 0), scale=2)
        packs = [samples] if case.get("packed") else [[sample] for sample in samples]
        batches = micro_batches(packs, session, stages[0].config.sequence_parallel)
        for chunk in trainable.chunks:
            chunk.zero_grad_buffer()
        description = {
            "model": model_fingerprint(shape),
            "dtype": config.model.dtype,
            "layout": {"tp_size": case["tp"]},
        }
        settings = CaptureConfig(every=1, samples=case.get("samples", 2), rows=16, context=64, features=24)
        taken = StepCapture(settings, Path(folder) / case["name"], stages, session.mesh, description)
        plant, *arguments = case.get("plant", ["nothing"])
        with PLANTS[plant](stages, *arguments), taken.of_step(1, batches):
            train_pass(Runner(trainable.chunks, session), batches)
        detach_chunks(trainable.chunks, param_sync=False)
    return True


@contextmanager
def nothing(stages) -> Iterator[None]:
    yield


def _modules(stages, path: str) -> list:
    """The module of this name, when this rank has it."""
    return [module for stage in stages for name, module in stage.named_modules() if name == path]


@contextmanager
def epsilon(stages, path: str, value: float) -> Iterator[None]:
    """Another epsilon in one norm."""
    for norm in _modules(stages, path):
        norm.eps = value
    yield


@contextmanager
def swapped_heads(stages, path: str) -> Iterator[None]:
    """The first two heads of an attention's output change places."""
    for core in _modules(stages, path):
        core.forward = partial(_swap, core.forward)
    yield


def _swap(forward, q, k, v, segments):
    out = forward(q, k, v, segments).view(*q.shape)
    order = [1, 0, *range(2, q.shape[1])]
    return out[:, order].flatten(1)


@contextmanager
def bf16_accumulation(stages, path: str) -> Iterator[None]:
    """A linear whose partial sums are rounded to bf16."""
    for linear in _modules(stages, path):
        linear._forward_impl = _accumulate_in_bf16
    yield


def _accumulate_in_bf16(input, weight, *args, **kwargs):
    total = torch.zeros((*input.shape[:-1], weight.shape[0]), dtype=torch.bfloat16)
    for x, w in zip(input.split(8, dim=-1), weight.split(8, dim=-1), strict=True):
        total = (total + torch.nn.functional.linear(x, w).to(torch.bfloat16)).to(torch.bfloat16)
    bias = kwargs.get("bias")
    total = total.to(input.dtype)
    return total if bias is None else total + bias


@contextmanager
def dropout(stages, path: str, seed: int) -> Iterator[None]:
    """Dropout of an MLP's activation, drawn from a seed."""
    for mlp in _modules(stages, path):
        mlp.linear_fc2.register_forward_pre_hook(partial(_drop, torch.Generator().manual_seed(seed)))
    yield


def _drop(generator, _module, args):
    x = args[0]
    return (x * (torch.rand(x.shape, generator=generator) >= 0.1) / 0.9,)


@contextmanager
def wrong_input(stages, path: str) -> Iterator[None]:
    """A module is handed something else than what the one before it gave."""
    for module in _modules(stages, path):
        module.register_forward_pre_hook(lambda _module, args: (args[0] * 1.001, *args[1:]))
    yield


@contextmanager
def like_hf(stages) -> Iterator[None]:
    """Text rotation rounded after every operation, as transformers does it."""
    from megatron_rb.models.language import blocks

    kept = blocks.apply_mrope, blocks.qk_norm_mrope
    blocks.apply_mrope, blocks.qk_norm_mrope = (partial(function, compute="like_hf") for function in kept)
    yield
    blocks.apply_mrope, blocks.qk_norm_mrope = kept


@contextmanager
def math_attention(stages) -> Iterator[None]:
    """torch's attention of single operators, where a CPU would take the fused one."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def backward(stages, path: str) -> Iterator[None]:
    """A linear that passes on a wrong gradient; its output is right."""
    for linear in _modules(stages, path):
        linear.register_full_backward_hook(lambda _m, grads, _o: tuple(g * 1.01 for g in grads))
    yield


PLANTS = {
    "nothing": nothing,
    "epsilon": epsilon,
    "swapped_heads": swapped_heads,
    "bf16_accumulation": bf16_accumulation,
    "dropout": dropout,
    "like_hf": like_hf,
    "backward": backward,
    "wrong_input": wrong_input,
    "math_attention": math_attention,
}
