"""Every way of cutting a parameter, saved under one tensor-parallel degree and read under another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rb.layout.mesh import RankGrid
from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims

install_mcore_shims(get_platform("cpu"))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.transformer import MegatronModule, TransformerConfig  # noqa: E402

from megatron_rb.checkpoint.sharded import TrainingState, load_sharded, save_sharded  # noqa: E402
from megatron_rb.config.schema import Config  # noqa: E402
from megatron_rb.parallel.collectives import gather_over  # noqa: E402
from megatron_rb.parallel.groups import build_mesh, destroy_groups  # noqa: E402
from megatron_rb.parallel.sharding import ShardSpec, full_to_local, local_to_full, sharded_tensor  # noqa: E402
from megatron_rb.platform.dtypes import DTYPES  # noqa: E402
from megatron_rb.train.optimizers import build_optimizer, ddp_config  # noqa: E402

SPECS = {
    "replicated": ShardSpec((5,)),
    "rows": ShardSpec((6, 3), dim=0),
    "columns": ShardSpec((3, 6), dim=1),
    "bias": ShardSpec((6,), dim=0),
    "uneven_rows": ShardSpec((53, 3), dim=0),
    "uneven_columns": ShardSpec((3, 53), dim=1),
    "uneven_bias": ShardSpec((53,), dim=0),
    "one_row": ShardSpec((1, 3), dim=0),
    "fused": ShardSpec((2 * 6, 3), dim=0, stride=2),
    "uneven_fused": ShardSpec((2 * 53, 3), dim=0, stride=2),
    "uneven_fused_bias": ShardSpec((2 * 53,), dim=0, stride=2),
    "one_fused": ShardSpec((2, 3), dim=0, stride=2),
}

TOLERANCE = 2e-6
"""Far below the learning rate of 0.01, above a last-bit difference: the optimizer's loops end elsewhere on a slice."""


class Weights(MegatronModule):
    """One parameter per way of cutting; its loss gives each element a gradient of its own."""

    def __init__(self, config: TransformerConfig, mesh: Any, specs: Mapping[str, ShardSpec]) -> None:
        super().__init__(config)
        self.mesh, self.specs = mesh, specs
        for name, spec in specs.items():
            parameter = torch.nn.Parameter(self.cut(name, 1.0))
            parameter.tensor_model_parallel = spec.dim is not None
            self.register_parameter(name, parameter)

    def cut(self, name: str, scale: float) -> torch.Tensor:
        """This rank's slice of a rising series up to a scale."""
        spec = self.specs[name]
        count = torch.Size(spec.full_shape).numel()
        full = scale * (1 + torch.arange(count).reshape(spec.full_shape)) / count
        return full_to_local(full, spec, self.mesh.tp_rank, self.mesh.tp_size).clone()

    def forward(self) -> torch.Tensor:
        return sum((parameter * self.cut(name, 0.1)).float().sum() for name, parameter in self.named_parameters())

    def sharded_state_dict(self) -> dict[str, Any]:
        mesh = self.mesh
        return {
            name: sharded_tensor(name, parameter, self.specs[name], mesh.tp_rank, mesh.tp_size, mesh.dp_rank)
            for name, parameter in self.named_parameters()
        }


def start(
    tp_size: int, distributed_optimizer: bool, specs: Mapping[str, ShardSpec] = SPECS, dtype: str = "fp32"
) -> tuple[DistributedDataParallel, TrainingState]:
    """A fresh model with its optimizer; gradients are not clipped, so that every element stands for itself."""
    if not dist.is_initialized():
        dist.init_process_group(get_platform("cpu").collective_backend)
    destroy_groups()
    mesh = build_mesh(RankGrid.of_world(dist.get_world_size(), tp_size), 1, timeout_minutes=1, seed=5)
    config = Config()
    config.model.dtype = dtype
    config.parallel.tp_size = tp_size
    config.parallel.distributed_optimizer = distributed_optimizer
    config.parallel.overlap_param_gather = False  # else the parameters of the other rank are read one step old
    config.optimizer.lr, config.optimizer.clip_grad = 1e-2, 0.0
    core = TransformerConfig(
        num_layers=1,
        hidden_size=4,
        num_attention_heads=4,
        bf16=dtype == "bf16",
        tensor_model_parallel_size=tp_size,
    )
    weights = Weights(core, mesh, specs).to(DTYPES[dtype])
    chunk = DistributedDataParallel(core, ddp_config(config), weights)
    state = TrainingState(
        chunks=[chunk],
        optimizer=build_optimizer(config, [chunk]),
        parts={},
        model={},
        layout={},
        platform=get_platform("cpu"),
        reseed=lambda step: None,
    )
    return chunk, state


def step(chunk: DistributedDataParallel, state: TrainingState) -> None:
    chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    chunk().backward()
    chunk.finish_grad_sync()
    state.optimizer.step()


def full_values(chunk: DistributedDataParallel) -> dict[str, torch.Tensor]:
    values = {}
    for name, parameter in chunk.module.named_parameters():
        shards = gather_over(parameter.detach(), chunk.module.mesh.tp_group)
        values[name] = local_to_full(shards, chunk.module.specs[name]).clone()
    return values


def reshard_all(folder: str) -> dict[str, dict[str, float]]:
    """By way: the parameters that are off, and how far, after a change of degree and one more step."""
    differing = {}
    for distributed_optimizer in (True, False):
        for before, after in ((1, 2), (2, 1)):
            name = f"{'distributed' if distributed_optimizer else 'replicated'} {before} to {after}"
            target = Path(folder) / name.replace(" ", "_")
            target.mkdir(exist_ok=True)
            chunk, state = start(before, distributed_optimizer)
            step(chunk, state)
            save_sharded(state, target, asynchronous=False)
            step(chunk, state)
            straight = full_values(chunk)
            chunk, state = start(after, distributed_optimizer)
            for parameter in chunk.parameters():
                parameter.data.fill_(-1.0)
            load_sharded(state, target, with_rng=False)
            step(chunk, state)
            again = full_values(chunk)
            distances = {key: (straight[key] - again[key]).abs().max().item() for key in SPECS}
            differing[name] = {key: distance for key, distance in distances.items() if distance > TOLERANCE}
    return differing
