"""Cases for test_platform_world: what megatron-core does on CPU under the shims, in one gloo world of two."""

from __future__ import annotations

import os
from typing import Any

from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims

HIDDEN = 8


def everything() -> dict[str, Any]:
    """All cases in one world: imports and process groups are what costs time."""
    platform = get_platform("cpu")
    install_mcore_shims(platform)
    import torch

    torch.distributed.init_process_group(platform.collective_backend)
    results: dict[str, Any] = {}
    results["sequence_parallel"] = _tensor_parallel()
    results["pipeline"] = _pipeline(virtual=False)
    results["interleaved"] = _pipeline(virtual=True)
    results["data_parallel"] = _data_parallel()
    return results


def _parallel_state(**sizes: int):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(7)
    return parallel_state


def _config(**changes: Any):
    import torch
    from megatron.core.transformer import TransformerConfig

    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "gradient_accumulation_fusion": False,
        "pipeline_dtype": torch.float32,
        "params_dtype": torch.float32,
        "moe_token_dispatcher_type": "alltoall",
    }
    return TransformerConfig(**(values | changes))


def _tensor_parallel() -> dict[str, float]:
    """Column- and row-parallel MLP with sequence parallelism against the same weights on one rank."""
    _parallel_state(tensor_model_parallel_size=2)
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        gather_from_sequence_parallel_region,
        get_cuda_rng_tracker,
        scatter_to_sequence_parallel_region,
        vocab_parallel_cross_entropy,
    )

    config = _config(tensor_model_parallel_size=2, sequence_parallel=True)
    rank = parallel_state.get_tensor_model_parallel_rank()
    init = torch.nn.init.normal_
    column = ColumnParallelLinear(
        HIDDEN, 16, config=config, init_method=init, bias=False, gather_output=False, skip_bias_add=False
    )
    row = RowParallelLinear(
        16, HIDDEN, config=config, init_method=init, bias=False, input_is_parallel=True, skip_bias_add=False
    )
    VocabParallelEmbedding(16, HIDDEN, init_method=init, config=config)
    generator = torch.Generator().manual_seed(3)
    w1 = torch.randn(16, HIDDEN, generator=generator)
    w2 = torch.randn(HIDDEN, 16, generator=generator)
    column.weight.data.copy_(w1.chunk(2, 0)[rank])
    row.weight.data.copy_(w2.chunk(2, 1)[rank])
    x = torch.randn(4, 1, HIDDEN, generator=generator, requires_grad=True)
    y = gather_from_sequence_parallel_region(row(column(scatter_to_sequence_parallel_region(x))[0])[0])
    logits = y.float()
    target = torch.arange(4).view(4, 1) % HIDDEN
    vocabulary_shard = logits.chunk(2, -1)[rank].contiguous()
    loss = vocab_parallel_cross_entropy(vocabulary_shard, target).mean()
    reference = torch.nn.functional.cross_entropy((x @ w1.T @ w2.T).view(4, HIDDEN), target.view(4))
    with get_cuda_rng_tracker().fork():
        draw = torch.rand(1).item()
    return {"loss": loss.item(), "reference": reference.item(), "draw": draw}


class _Slice:
    """Holds the pieces of a toy pipeline; built lazily because megatron.core is imported late."""

    @staticmethod
    def build(config, first: bool, last: bool, seed: int):
        import torch
        from megatron.core.enums import ModelType
        from megatron.core.transformer import MegatronModule

        class Slice(MegatronModule):
            def __init__(self) -> None:
                super().__init__(config)
                torch.manual_seed(seed)
                self.layer = torch.nn.Linear(HIDDEN, HIDDEN)
                self.input = None
                self.model_type = ModelType.encoder_or_decoder

            def set_input_tensor(self, tensors) -> None:
                self.input = tensors[0]

            def forward(self, x):
                hidden = x if first else self.input
                hidden = torch.tanh(self.layer(hidden))
                return hidden.square().mean() if last else hidden

        return Slice()


def _pipeline(virtual: bool) -> dict[str, float]:
    """1F1B or interleaved schedule with a different length in every micro-batch, against one process."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    sizes = {"pipeline_model_parallel_size": 2}
    if virtual:
        sizes["virtual_pipeline_model_parallel_size"] = 2
    state = _parallel_state(**sizes)
    rank = state.get_pipeline_model_parallel_rank()
    chunks = 2 if virtual else 1
    config = _config(
        num_layers=4,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=chunks if virtual else None,
        variable_seq_lengths=True,
        overlap_p2p_comm=virtual,
        batch_p2p_comm=not virtual,
    )
    places = [chunk * 2 + rank for chunk in range(chunks)]
    model = [_Slice.build(config, place == 0, place == 2 * chunks - 1, seed=place) for place in places]
    batches = [torch.randn(3 + i, 1, HIDDEN, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def forward_step(iterator, chunk):
        output = chunk(next(iterator))
        return output, lambda loss: (loss, {"loss": loss.detach()})

    reduced = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in range(chunks)],
        model=model,
        num_microbatches=4,
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    whole = [_Slice.build(config, True, False, seed=place) for place in range(2 * chunks)]
    total = 0.0
    for batch in batches:
        hidden = batch
        for part in whole:
            hidden = part(hidden)
        total = total + hidden.square().mean() / 4
    total.backward()
    difference = max(
        (a.layer.weight.grad - whole[p].layer.weight.grad).abs().max().item()
        for a, p in zip(model, places, strict=True)
    )
    return {"grad_difference": difference, "losses": len(reduced)}


def _data_parallel() -> dict[str, float]:
    """DDP with overlap and the distributed optimizer, clipping included, against torch.optim.AdamW on one process."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    _parallel_state()
    config = _config()
    module = _Slice.build(config, True, True, seed=5)
    reference = _Slice.build(config, True, True, seed=5)
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=32
        ),
        module,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-2, min_lr=0.0, weight_decay=0.1, clip_grad=0.05, use_distributed_optimizer=True
        ),
        [ddp],
        config_overrides={},
    )
    torch_optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)
    rank = int(os.environ["RANK"])
    for step in range(3):
        batches = [torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(10 * step + r)) for r in range(2)]
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        ddp(batches[rank]).backward()
        ddp.finish_grad_sync()
        _, norm, _ = optimizer.step()
        torch_optimizer.zero_grad()
        (sum(reference(batch) for batch in batches) / 2).backward()
        reference_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        torch_optimizer.step()
    ddp.disable_forward_pre_hook()
    difference = max(
        (a - b).abs().max().item() for a, b in zip(module.parameters(), reference.parameters(), strict=True)
    )
    return {"param_difference": difference, "norm_difference": abs(norm - reference_norm.item())}
