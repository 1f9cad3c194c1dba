"""Cases for test_legacy: optimizer files as megatron-core itself writes them, rank by rank of a larger layout."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

from megatron_rb.layout.mesh import RankGrid
from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims

install_mcore_shims(get_platform("cpu"))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer import MegatronModule, TransformerConfig  # noqa: E402

from megatron_rb.parallel.groups import build_mesh  # noqa: E402
from tests.unit.checkpoint.legacy import trees  # noqa: E402
from tests.unit.checkpoint.legacy.trees import Tree  # noqa: E402

EMBEDDINGS = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")
KINDS = ("param", "exp_avg", "exp_avg_sq")


class Holder(MegatronModule):
    """A module with parameters of the given names, in their order."""

    def __init__(self, config: TransformerConfig, state: dict[str, torch.Tensor], shared: bool) -> None:
        super().__init__(config)
        for key, value in state.items():
            *path, name = key.split(".")
            module: torch.nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            parameter = torch.nn.Parameter(value.clone())
            if shared and key in EMBEDDINGS:
                parameter.shared_embedding = True  # type: ignore[attr-defined]
            module.register_parameter(name, parameter)
        assert [name for name, _ in self.named_parameters()] == list(state)


def write_trained_trees(root: str, cases: dict[str, dict[str, Any]]) -> None:
    """Write the tree of every case below `root`; this world is the data-parallel group of all their ranks."""
    dist.init_process_group("gloo")
    build_mesh(RankGrid.of_world(dist.get_world_size()), 1, timeout_minutes=1, seed=5)
    for name, case in cases.items():
        _write_tree(Path(root) / name, Tree(**case["tree"]), case)


def _write_tree(folder: Path, tree: Tree, case: dict[str, Any]) -> None:
    """Train two steps and save every rank of `tree`.

    `expected.pt` gets each trained parameter's state, taken from the living optimizer.
    """
    place = folder / f"hf{dist.get_rank()}"
    weights = trees.rounded(trees.write_hf_folder(place, text_layers=tree.text_layers, tied=tree.tied))
    expected: dict[tuple, dict[str, torch.Tensor]] = {}
    for tp_rank in range(tree.tp):
        for stage in range(tree.pp):
            _write_rank(trees.iteration_folder(folder, tree), tree, weights, (tp_rank, stage), case, expected)
    if dist.get_rank() == 0:
        (folder / trees.TRACKER).write_text(str(tree.iteration))
        torch.save(expected, folder / "expected.pt")
    dist.barrier()


def _write_rank(
    folder: Path, tree: Tree, weights: trees.Tensors, rank: tuple[int, int], case: dict[str, Any], expected: dict
) -> None:
    distributed, frozen = case.get("distributed", True), case.get("frozen", "")
    config, ddp = _configs(distributed, tree.args.get("ddp_bucket_size"))
    states = [trees.chunk_state(weights, tree, *rank, chunk) for chunk in range(len(tree.chunk_layers[0]))]
    chunks = []
    for number, state in enumerate(states):
        parameters = {key: value for key, value in state.items() if trees.is_parameter(key)}
        module = Holder(config, parameters, shared=tree.tied and tree.pp > 1)
        for name, parameter in module.named_parameters():
            parameter.requires_grad = not (frozen and name.startswith(frozen))
        chunks.append(DistributedDataParallel(config, ddp, module, disable_bucketing=number > 0 or rank[1] > 0))
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        weight_decay=0.1,
        bf16=True,
        params_dtype=torch.bfloat16,
        clip_grad=0.0,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)
    for each in optimizer.chained_optimizers if distributed else ():
        each.data_parallel_group_gloo = each.data_parallel_group  # on a CPU the group has gloo already
    for step in range(2):
        _step(chunks, optimizer, step, rank, tree.tied)
    _collect(chunks, optimizer.chained_optimizers[0], rank, distributed, expected)
    for state, chunk in zip(states, chunks, strict=True):
        state.update({name: value.detach().clone() for name, value in chunk.module.named_parameters()})
    saved = {"optimizer": optimizer.state_dict()}
    if dist.get_rank() == 0:
        trees.write_rank(folder, tree, *rank, [OrderedDict(state) for state in states], saved)
    dist.barrier()
    if distributed:
        optimizer.save_parameter_state(str(trees.rank_folder(folder, tree, *rank) / "distrib_optim.pt"))


def _configs(distributed: bool, bucket_size: int | None) -> tuple[TransformerConfig, DistributedDataParallelConfig]:
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=bucket_size is not None,
        bucket_size=bucket_size,
    )
    return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, bf16=True), ddp


def _step(chunks: list, optimizer: Any, step: int, rank: tuple[int, int], tied: bool) -> None:
    for number, chunk in enumerate(chunks):
        chunk.zero_grad_buffer()
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad:
                seed = zlib.crc32(_gradient_of(name, rank, number, tied).encode()) + step
                gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.main_grad.copy_(gradient)
        if chunk.ddp_config.overlap_grad_reduce:
            chunk.start_grad_sync()
        chunk.finish_grad_sync()
    assert optimizer.step()[0]


def _gradient_of(name: str, rank: tuple[int, int], chunk: int, tied: bool) -> str:
    """Parameters that are copies of each other have the same text."""
    tp_rank, stage = rank
    if name in EMBEDDINGS and tied:
        return f"embedding {tp_rank}"
    copied = "norm" in name or "patch_embed" in name or name.endswith(("linear_proj.bias", "linear_fc2.bias"))
    return f"{name} {stage} {chunk}" + ("" if copied else f" {tp_rank}")


def _collect(chunks: list, optimizer: Any, rank: tuple[int, int], distributed: bool, expected: dict) -> None:
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad:
                read = _shards if distributed else _whole
                expected[(*rank, number, name)] = read(optimizer, parameter)


def _whole(optimizer: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    state = optimizer.optimizer.state[parameter.main_param]
    tensors = {"param": parameter.main_param, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
    return {kind: tensor.detach().clone() for kind, tensor in tensors.items()}


def _shards(optimizer: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """The parameter's state put together from the pieces that the data-parallel ranks hold."""
    own = None
    if parameter in optimizer.model_param_group_index_map:
        span = optimizer._get_model_param_range_map(parameter)["param"]
        tensors = optimizer._get_main_param_and_optimizer_states(parameter)
        own = (span.start, {kind: tensors[kind].detach().clone() for kind in KINDS})
    pieces: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, own)
    ordered = sorted((piece for piece in pieces if piece is not None), key=lambda piece: piece[0])
    return {kind: torch.cat([piece[1][kind] for piece in ordered]).view(parameter.shape) for kind in KINDS}


def buffer_places(sizes: list[int], shared: int | None, bucket_size: int | None) -> dict[str, Any]:
    """Where megatron-core's buffer holds parameters of these sizes once the ends of its buckets are cut off."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        build_mesh(RankGrid.of_world(dist.get_world_size()), 1, timeout_minutes=1, seed=5)
    config, ddp = _configs(True, bucket_size)
    state = {f"parameter{number}.weight": torch.ones(size).bfloat16() for number, size in enumerate(sizes)}
    module = Holder(config, state, shared=False)
    parameters = list(module.parameters())
    if shared is not None:
        parameters[shared].shared_embedding = True  # type: ignore[attr-defined]
    (buffer,) = DistributedDataParallel(config, ddp, module).buffers
    before = [0]
    for bucket in buffer.buckets:
        before.append(before[-1] + bucket.numel_unpadded)
    starts = []
    for parameter in parameters:
        start, _, bucket = buffer.param_index_map[parameter]
        starts.append(before[bucket] + start - buffer.buckets[bucket].offset)
    return {"starts": starts, "length": buffer.numel_unpadded, "buckets": len(buffer.buckets)}


def many_buffer_places(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`buffer_places` of every case."""
    return [buffer_places(**case) for case in cases]
