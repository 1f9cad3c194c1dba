"""From sizes and a layout to the model chunks of one rank."""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rb.config.derive import check_tp_size
from megatron_rb.config.schema import Config, KernelsConfig, RecomputeConfig
from megatron_rb.models.layer_choice import select_layers
from megatron_rb.models.layers import BuildContext, LayerProvider
from megatron_rb.models.stage import EMBEDDING_WEIGHT, HEAD_WEIGHT, Recompute, RoboBrainStage
from megatron_rb.parallel.collectives import raise_together
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.session import Session
from megatron_rb.parallel.sharding import full_to_local, shard_of
from megatron_rb.platform.dtypes import DTYPES
from megatron_rb.shapes.shape import RoboBrainShape


@dataclass(frozen=True)
class ModelOptions:
    """How a model is built, beside its sizes and its layout."""

    dtype: str = "fp32"
    layers: str = "local"
    """As `model.layers`."""
    sequence_parallel: bool = False
    recompute: Recompute = Recompute()
    kernels: KernelsConfig = field(default_factory=KernelsConfig)

    @classmethod
    def of(cls, config: Config) -> ModelOptions:
        """As the settings of a run say."""
        model, parallel = config.model, config.parallel
        return cls(model.dtype, model.layers, parallel.sequence_parallel, _recompute(model.recompute), config.kernels)


def _recompute(settings: RecomputeConfig) -> Recompute:
    return Recompute(
        settings.vision, settings.language, tuple(settings.vision_per_slice), tuple(settings.language_per_slice)
    )


def core_config(shape: RoboBrainShape, mesh: Mesh, options: ModelOptions) -> TransformerConfig:
    """megatron-core's configuration: read by its linears, its schedules and its data parallelism."""
    if options.dtype not in DTYPES:
        raise ValueError(f"model.dtype is '{options.dtype}'; use bf16 or fp32")
    text = shape.text
    return TransformerConfig(
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.ffn_hidden_size,
        num_attention_heads=text.num_heads,
        num_query_groups=text.num_query_groups,
        kv_channels=text.head_dim,
        qk_layernorm=text.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=text.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=mesh.tp_size,
        pipeline_model_parallel_size=mesh.pp_size,
        virtual_pipeline_model_parallel_size=mesh.vpp_size if mesh.vpp_size > 1 else None,
        sequence_parallel=options.sequence_parallel and mesh.tp_size > 1,
        params_dtype=DTYPES[options.dtype],
        pipeline_dtype=DTYPES[options.dtype],
        bf16=options.dtype == "bf16",
        # Weights are drawn or loaded by name afterwards; "cpu" means: plain torch.empty on the device of the context.
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        # Nothing is said of context parallelism: Transformer Engine's attention would exchange keys a second time.
        # Every micro-batch has its own number of tokens and patches, which `train.pipeline` states; megatron-core asks
        # for this dispatcher with it.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # Batched P2P without overlap mixes up gradients and activations when two ranks hold several chunks each.
        batch_p2p_comm=mesh.vpp_size == 1,
        # Streams keep the order of messages and work; a wait for the whole device guarded against faults of torch 1.
        batch_p2p_sync=False,
        overlap_p2p_comm=mesh.vpp_size > 1,
        # Overlapped sends still read the tensor when the schedule would free it, and gloo sends what it then holds.
        deallocate_pipeline_outputs=mesh.vpp_size == 1,
        calculate_per_token_loss=True,
    )


def build_stages(session: Session, options: ModelOptions, layers: LayerProvider | None = None) -> list[RoboBrainStage]:
    """The chunks of this rank, one per virtual stage, with uninitialised weights on the device (`meta` works too).

    Args:
        layers: None = those that the options name.
    """
    mesh, layout = session.mesh, session.layout
    check_tp_size(mesh.tp_size, session.shape)
    layers = layers or select_layers(options.layers, options.dtype, session.platform.offers("te"))
    ctx = BuildContext(core_config(session.shape, mesh, options), layers, mesh, options.kernels)
    stages = []
    for part in layout.slices_of_rank(mesh.pp_rank):
        with torch.device(session.device):
            stages.append(RoboBrainStage(ctx, session.shape, layout, part.index, options.recompute))
    return stages


def named_parameters(stages: list[RoboBrainStage]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Global names and parameters of all chunks of this rank."""
    for stage in stages:
        yield from stage.named_parameters()


ModelPart = Literal["vision", "merger", "language"]
"""The unit of freezing and of learning-rate ratios."""
MODEL_PARTS: tuple[ModelPart, ...] = ("vision", "merger", "language")


def part_of(name: str) -> ModelPart:
    """The part of the model a parameter belongs to, from its global name, with or without wrappers around the model."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    if name.startswith(("vision.merger.", "vision.deepstack.")):
        return "merger"
    return "vision" if name.startswith("vision.") else "language"


def weight_key(name: str, shape: RoboBrainShape) -> str:
    """The name a parameter is stored under: the head of tied embeddings is the embedding."""
    tied_head = shape.text.tied_embeddings and name == HEAD_WEIGHT
    return EMBEDDING_WEIGHT if tied_head else name


def fill_weights(
    stages: list[RoboBrainStage],
    mesh: Mesh,
    read_full: Callable[[str], torch.Tensor],
    wanted: Callable[[str], bool] = lambda name: True,
) -> None:
    """Set every wanted parameter from its full (global) value, asked for by the name it is stored under.

    Of the ranks that hold the same weights each reads a share, and sends its slices to the others; a mesh without
    groups reads all. An error of one rank is raised on all of them.
    """
    holders = {key: parameters for key, parameters in _parameters_by_key(stages).items() if wanted(key)}
    if not mesh.groups:
        _read_weights(holders, mesh, read_full)
        return
    ranks, failure = mesh.grid.group(mesh.rank, "cp", "dp"), None
    readers = spread(_sizes(holders), len(ranks))
    try:
        _read_weights({key: holders[key] for key in holders if readers[key] == mesh.dp_cp_rank}, mesh, read_full)
    except Exception as error:  # whatever it is, the others wait for this rank
        failure = error
    raise_together(failure)
    for key, parameters in holders.items():
        for parameter in parameters:
            dist.broadcast(parameter.data, src=ranks[readers[key]], group=mesh.dp_cp_group)


def _read_weights(
    holders: Mapping[str, Sequence[torch.nn.Parameter]], mesh: Mesh, read_full: Callable[[str], torch.Tensor]
) -> None:
    """Fill parameters of this rank, one full tensor in memory at a time."""
    with torch.no_grad():
        for key, parameters in holders.items():
            full = read_full(key)
            for parameter in parameters:
                parameter.copy_(full_to_local(full, shard_of(parameter), mesh.tp_rank, mesh.tp_size))


def _parameters_by_key(stages: list[RoboBrainStage]) -> dict[str, list[torch.nn.Parameter]]:
    """Parameters of this rank by the name they are stored under: two where tied embeddings lie on one rank."""
    holders: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in named_parameters(stages):
        holders.setdefault(weight_key(name, stages[0].shape), []).append(parameter)
    return holders


def _sizes(holders: Mapping[str, Sequence[torch.nn.Parameter]]) -> dict[str, int]:
    """Values of the full tensors by key."""
    return {key: math.prod(shard_of(parameters[0]).full_shape) for key, parameters in holders.items()}


def spread(sizes: Mapping[str, int], parts: int) -> dict[str, int]:
    """The part that each key goes to, so that parts are about equally large: the largest first, to the least filled."""
    filled, taken = [(0, part) for part in range(parts)], {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        size, part = heapq.heappop(filled)
        taken[key] = part
        heapq.heappush(filled, (size + sizes[key], part))
    return taken


def full_shapes(stages: list[RoboBrainStage]) -> dict[str, tuple[int, ...]]:
    """Global shapes of the parameters of this rank by the name they are stored under."""
    return {weight_key(name, stages[0].shape): shard_of(p).full_shape for name, p in named_parameters(stages)}


def random_weights(stages: list[RoboBrainStage], seed: int) -> Callable[[str], torch.Tensor]:
    """Fresh full weights by name: the same numbers for every layout and tensor-parallel degree."""
    shapes = full_shapes(stages)
    initializer_range = stages[0].shape.initializer_range

    def read(name: str) -> torch.Tensor:
        size = shapes[name]
        if name.endswith("bias"):
            return torch.zeros(size)
        if len(size) == 1:
            return torch.ones(size)
        # One number of 32 bits made of both: torch's generator on the CPU reads no more of its seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        return torch.randn(size, generator=generator) * initializer_range

    return read
