"""FLOPs, parameters and kept activations against what torch counts in the blocks that are trained."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_rb.config.schema import FreezeConfig
from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims
from tests.unit.planner.cases import tiny

install_mcore_shims(get_platform("cpu"))

from megatron_rb.app.session import session_of  # noqa: E402
from megatron_rb.bench.blocks import build_blocks, calls_of, draw_micro_batch, sizes_of  # noqa: E402
from megatron_rb.bench.step import one_process  # noqa: E402
from megatron_rb.config.optimizers import OPTIMIZERS  # noqa: E402
from megatron_rb.kernels.varlen_attention.torch_impl import equal_runs  # noqa: E402
from megatron_rb.models.inputs import to_device  # noqa: E402
from megatron_rb.models.layers import LocalAttention  # noqa: E402
from megatron_rb.models.work import training_flops, work_of  # noqa: E402
from megatron_rb.parallel import context  # noqa: E402
from megatron_rb.planner.cost import model_flops  # noqa: E402
from megatron_rb.planner.kept import TORCH  # noqa: E402
from megatron_rb.planner.memory import memory_model, state_bytes  # noqa: E402
from megatron_rb.planner.trained import Frozen  # noqa: E402
from megatron_rb.planner.work import PARTS, Part, Shards, forward_work, parameters  # noqa: E402
from megatron_rb.planner.workload import MicroBatchLimits  # noqa: E402
from megatron_rb.platform.dtypes import DTYPES  # noqa: E402
from megatron_rb.shapes.balance import default_layout  # noqa: E402

FAMILIES = ("RoboBrain2.0-7B", "RoboBrain2.5-4B")


@pytest.fixture(scope="module")
def session():
    with session_of(one_process("", 1), tiny(4, 2)) as session:
        yield session
    dist.destroy_process_group()


def blocks(family: str, dtype: str, session, samples: int = 4, cp_size: int = 1):
    shape = tiny(4, 2, family)
    trainable = build_blocks(session.with_model(shape, default_layout(shape, 1)), dtype)
    drawn = draw_micro_batch(shape, 512, 1024, samples=samples, cp_size=cp_size)
    batch = to_device(drawn, shape, torch.device("cpu"))
    return shape, trainable, batch, list(calls_of(trainable.chunks[0].module, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_what_torch_counts(family: str, session):
    shape, _, batch, calls = blocks(family, "fp32", session)
    works = forward_work(shape, Shards(1, False, 4), sizes_of(batch))
    for call in calls:
        inputs = call.inputs(torch.float32, torch.device("cpu"))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call.run(inputs)
        work, counted = works[call.part], counter.get_total_flops()
        # torch counts the whole square of causal attention, the model half of it.
        expected = work.matmul[0] + work.attention[0] * (2 if call.part is Part.DECODER else 1)
        # The loss computes its gradients in the forward pass; the sum for the weight is no product that torch counts.
        expected *= 2 if call.part is Part.HEAD else 1
        assert expected == pytest.approx(counted, rel=0.02), call.part


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_blocks(family: str, session):
    shape, trainable, _, _ = blocks(family, "fp32", session)
    stage = trainable.chunks[0].module
    sizes = parameters(shape, 1)

    def count(module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert sizes[Part.PATCH_EMBED] == count(stage.vision.patch_embed)
    assert {sizes[Part.WINDOW_LAYER]} == {count(layer) for layer in stage.vision.layers.values()}
    assert sizes[Part.MERGER] == count(stage.vision.merger)
    assert {sizes[Part.DEEPSTACK]} >= {count(merger) for merger in stage.vision.deepstack.values()}
    assert sizes[Part.DECODER] == count(stage.language.layers["0"])
    assert sizes[Part.EMBEDDING] == count(stage.language.embedding)


class KeptByFlash(torch.autograd.Function):
    """Keeps what flash attention keeps. torch's path, which runs here, keeps masks beside it where keys are longer."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, out, torch.zeros(q.shape[:2]))
        return out


@pytest.fixture
def alone_in_a_context_group(monkeypatch):
    """What a rank keeps of messages has their shapes; the values do not matter, so its own stand for the others'."""
    whole = LocalAttention.forward

    def gather_keys(k, v, ranges, group):
        rows = torch.arange(sum(stop - start for start, stop in ranges)) % len(k)
        return k[rows], v[rows]

    def attention(self, q, k, v, segments, keys=None):
        return whole(self, q, k, v, segments) if keys is None else KeptByFlash.apply(q, k, v).flatten(1)

    monkeypatch.setattr(context, "gather_keys", gather_keys)
    monkeypatch.setattr(context, "gather_rows", lambda local, group: torch.cat([local] * 2))
    monkeypatch.setattr(LocalAttention, "forward", attention)


@pytest.mark.parametrize(
    ("dtype", "samples", "cp_size"), [("bf16", 4, 1), ("fp32", 4, 1), ("bf16", 4, 2), ("bf16", 1, 2)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_activations_are_what_autograd_keeps(
    family: str, dtype: str, samples: int, cp_size: int, session, alone_in_a_context_group
):
    shape, trainable, batch, calls = blocks(family, dtype, session, samples, cp_size)
    # Counted as if a context-parallel rank saw all keys, as with one sample, and its tokens an even part of the visual
    # rows, as with several.
    at_most = {Part.DECODER} if samples > 1 else {Part.EMBEDDING}
    sizes, itemsize = sizes_of(batch), 2 if dtype == "bf16" else 4
    shared = [batch.vision.rope_cos, batch.vision.rope_sin, batch.text.rope_cos, batch.text.rope_sin]
    ours = {tensor.untyped_storage().data_ptr() for tensor in [*trainable.chunks[0].parameters(), *shared]}
    for call in calls:
        tokens = sizes.labels if call.part is Part.HEAD else sizes.tokens
        largest = MicroBatchLimits(int(tokens[0]), int(sizes.patches[0]))
        shards = Shards(1, False, itemsize, cp_size)
        state = state_bytes(dtype, False, 1, OPTIMIZERS["adamw"])
        operators = replace(TORCH, packed=cp_size > 1 or in_one_call(call.part, batch))
        model = memory_model(shape, shards, largest, state, Frozen(), 0.0, operators)
        expected = model.kept[PARTS.index(call.part)]
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor, kept=kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            out = call.run(call.inputs(DTYPES[dtype], torch.device("cpu")))
        counted = sum(size for place_, size in kept.items() if place_ not in ours)
        if cp_size == 1 or call.part not in at_most:
            assert expected == pytest.approx(counted, rel=0.02), call.part
        else:
            assert counted <= expected, call.part
        assert out.requires_grad


def in_one_call(part: Part, batch) -> bool:
    """Whether all sequences that a layer attends over are as long: torch's attention takes them at once."""
    vision = batch.vision
    segments = {
        Part.FULL_LAYER: vision.frames,
        Part.WINDOW_LAYER: vision.windows or vision.frames,
        Part.DECODER: batch.text.samples,
    }
    return part not in segments or len(equal_runs(segments[part])) == 1


@pytest.mark.parametrize("frozen", [(), ("vision",), ("vision", "merger"), ("language",), ("vision", "language")])
@pytest.mark.parametrize("family", FAMILIES)
def test_model_flops_equal_the_throughput_benchmarks(family: str, frozen: tuple[str, ...]):
    """Two counts of the same thing, written apart."""
    shape = tiny(4, 3, family)
    batch = draw_micro_batch(shape, 512, 1024)
    ours = model_flops(shape, sizes_of(batch), Frozen(**dict.fromkeys(frozen, True)))[0]
    theirs = training_flops(shape, work_of(batch), FreezeConfig(**dict.fromkeys(frozen, True))).total
    assert ours == pytest.approx(theirs, rel=1e-3)
