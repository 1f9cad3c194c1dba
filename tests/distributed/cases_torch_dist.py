"""Cases for test_torch_dist: checkpoints of foreign stacks, written by megatron-core's own modules and its own save.

The wrappers have the module names of Megatron-Bridge and Pai-Megatron-Patch. Nothing here knows the reader or the
weight table: values are laid out as megatron-core's modules compute with them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims

install_mcore_shims(get_platform("cpu"))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.models.vision.multimodal_projector import MultimodalProjector  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    ColumnParallelLinear,
    RowParallelLinear,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer import MegatronModule, TransformerConfig  # noqa: E402
from megatron.core.transformer.mlp import MLPSubmodules  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlock  # noqa: E402
from megatron.core.transformer.utils import sharded_state_dict_default  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402

from tests.distributed.megatron_layouts import Layouts, layouts  # noqa: E402

GLU = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}


def write_checkpoints(root: str, cases: dict[str, dict[str, Any]], tp: int, pp: int) -> None:
    """Write the checkpoint of every case below `root`, each on the layout tp x pp of this world."""
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tp, pp)
    model_parallel_cuda_manual_seed(1)
    for name, case in cases.items():
        _write(Path(root) / name, case)
        dist.barrier()


def _write(root: Path, case: dict[str, Any]) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(case["hf"], dtype="auto")
    config = loaded.config
    with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):  # of a tied head on another stage
        model = Vlm(config, case["tower"], case["padded_vocabulary"]).to(loaded.dtype)
    _fill(model, layouts(loaded.state_dict(), config), case["tower"], loaded.model.visual)
    numbered, singleton = case["numbered"], case.get("singleton", False)
    metadata = {"non_homogeneous_layers": numbered or singleton, "singleton_local_shards": singleton}
    folder = root / "iter_0000007"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        (root / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    text = config.text_config
    args = argparse.Namespace(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        untie_embeddings_and_output_weights=not model.is_tied,
        swiglu=True,
        normalization="RMSNorm",
        params_dtype=torch.bfloat16,
    )
    state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": 7}
    state["model"] = model.sharded_state_dict(prefix=case.get("prefix", ""), metadata=metadata)
    if case.get("optimizer"):
        state["optimizer"] = _optimizer_state(model, state["model"])
    dist_checkpointing.save(state, str(folder))


def _optimizer_state(model: Vlm, sharded: Any) -> Any:
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    chunk = DistributedDataParallel(model.config, ddp, model)
    settings = OptimizerConfig(
        optimizer="adam", lr=0.0, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(settings, [chunk])
    chunk.finish_grad_sync()
    assert optimizer.step()[0]
    return optimizer.sharded_state_dict(sharded, metadata={"distrib_optim_sharding_type": "fully_reshardable"})


# Modules with the names of the peers


def _text_config(config: Any) -> TransformerConfig:
    text, is_qwen3 = config.text_config, config.model_type == "qwen3_vl"
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.head_dim if is_qwen3 else text.hidden_size // text.num_attention_heads,
        normalization="RMSNorm",
        add_bias_linear=False,
        add_qkv_bias=not is_qwen3,
        qk_layernorm=is_qwen3,
        bf16=True,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        **GLU,
    )


def _vision_config(config: Any) -> TransformerConfig:
    """As the peers set it: never cut into pipeline stages."""
    vision, is_qwen3 = config.vision_config, config.model_type == "qwen3_vl"
    return TransformerConfig(
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        num_attention_heads=vision.num_heads,
        normalization="LayerNorm" if is_qwen3 else "RMSNorm",
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        params_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        **({} if is_qwen3 else GLU),
    )


class Vlm(MegatronModule):
    """A language model of megatron-core with one of the peers' vision towers on the first stage."""

    def __init__(self, config: Any, tower: str, vocabulary: int) -> None:
        super().__init__(_text_config(config))
        stage = parallel_state.get_pipeline_model_parallel_rank()
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.is_tied = config.tie_word_embeddings
        if stage == 0 and tower == "visual":
            self.visual = AutoModelForImageTextToText.from_config(config).model.visual
        elif stage == 0 and tower == "vision_model":
            self.vision_model = AutoModelForImageTextToText.from_config(config).model.visual
        elif stage == 0:
            self.vision_model = {"pai": PaiTower, "bridge": BridgeTower}[tower](config)
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=self.config.qk_layernorm)
        self.language_model = GPTModel(
            self.config,
            spec,
            vocabulary or config.text_config.vocab_size,
            64,
            pre_process=stage == 0,
            post_process=stage == stages - 1,
            share_embeddings_and_output_weights=self.is_tied,
            position_embedding_type="rope",
        )


class PatchEmbed(torch.nn.Module):
    def __init__(self, vision: Any, bias: bool) -> None:
        super().__init__()
        kernel = [vision.temporal_patch_size, vision.patch_size, vision.patch_size]
        self.proj = torch.nn.Conv3d(vision.in_channels, vision.hidden_size, kernel, kernel, bias=bias)


class PaiTower(MegatronModule):
    """Pai-Megatron-Patch, megatron_patch/model/{qwen2_5_vl,qwen3_vl}/visionmodel.py."""

    def __init__(self, config: Any) -> None:
        super().__init__(_vision_config(config))
        vision, is_qwen3 = config.vision_config, config.model_type == "qwen3_vl"
        self.patch_embed = PatchEmbed(vision, is_qwen3)
        if is_qwen3:
            self.pos_embed = torch.nn.Embedding(vision.num_position_embeddings, vision.hidden_size)
        spec = get_gpt_layer_local_spec(normalization=self.config.normalization)
        self.decoder = PaiBlock(self.config, spec, post_layer_norm=True)
        self.projection = _projector(vision)
        deepstack = getattr(vision, "deepstack_visual_indexes", [])
        if is_qwen3:
            size = vision.hidden_size * vision.spatial_merge_size**2
            self.decoder.deepstack_merger_list = torch.nn.ModuleList(_projector(vision) for _ in deepstack)
            self.decoder.deepstack_norm_list = torch.nn.ModuleList(
                WrappedTorchNorm(self.config, size, 1e-6) for _ in deepstack
            )


class PaiBlock(TransformerBlock):
    """Every module of its lists is saved on its own."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        found = {key: value for key, value in found.items() if ".deepstack_" not in key}
        for name in ("deepstack_merger_list", "deepstack_norm_list"):
            for number, module in enumerate(getattr(self, name, [])):
                own = f"{prefix}{name}.{number}."
                found |= sharded_state_dict_default(module, own, sharded_offsets, metadata, self.tp_group)
        return found


def _projector(vision: Any) -> MultimodalProjector:
    merged = vision.hidden_size * vision.spatial_merge_size**2
    config = TransformerConfig(
        num_layers=1,
        hidden_size=vision.out_hidden_size,
        ffn_hidden_size=merged,
        num_attention_heads=4,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        params_dtype=torch.bfloat16,
        use_cpu_initialization=True,
    )
    layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return MultimodalProjector(config, layers, "mlp", merged)


class BridgeTower(MegatronModule):
    """Megatron-Bridge, models/qwen_vl/modelling_qwen3_vl/vision_model.py."""

    def __init__(self, config: Any) -> None:
        super().__init__(_vision_config(config))
        vision = config.vision_config
        self.patch_embed = PatchEmbed(vision, True)
        self.pos_embed = torch.nn.Embedding(vision.num_position_embeddings, vision.hidden_size)
        spec = get_gpt_layer_local_spec()
        self.decoder = BridgeBlock(self.config, spec, post_layer_norm=False)
        self.decoder.deepstack_merger_list = torch.nn.ModuleList(
            BridgeMerger(self.config, vision, True) for _ in vision.deepstack_visual_indexes
        )
        self.merger = BridgeMerger(self.config, vision, False)


class BridgeBlock(TransformerBlock):
    """Its mergers share their keys where its layers do."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        found = {key: value for key, value in found.items() if ".deepstack_" not in key}
        mergers, numbered = self.deepstack_merger_list, metadata["non_homogeneous_layers"]
        for number, merger in enumerate(mergers):
            own = f"{prefix}deepstack_merger_list.{number}."
            part = merger.sharded_state_dict(own, () if numbered else ((0, number, len(mergers)),), metadata)
            if not numbered:
                replace_prefix_for_sharding(part, own, f"{prefix}deepstack_merger_list.")
            found |= part
        return found


class BridgeMerger(MegatronModule):
    def __init__(self, config: TransformerConfig, vision: Any, after_shuffle: bool) -> None:
        super().__init__(config)
        merged = vision.hidden_size * vision.spatial_merge_size**2
        options: dict[str, Any] = {"config": config, "init_method": config.init_method, "bias": True}
        self.patch_norm = WrappedTorchNorm(config, merged if after_shuffle else vision.hidden_size, 1e-6)
        self.linear_fc1 = ColumnParallelLinear(merged, merged, gather_output=False, **options)
        self.linear_fc2 = RowParallelLinear(
            merged, vision.out_hidden_size, input_is_parallel=True, skip_bias_add=False, **options
        )


# Values


def _fill(model: Vlm, values: Layouts, tower: str, visual: torch.nn.Module) -> None:
    if tower in ("visual", "vision_model") and hasattr(model, tower):
        getattr(model, tower).load_state_dict(visual.state_dict())
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    with torch.no_grad():
        for name, parameter in _parameters(model):
            if name.startswith(("visual.", "vision_model.")) and tower in ("visual", "vision_model"):
                continue
            whole = values[name]
            if isinstance(whole, tuple):
                local = torch.cat([half.chunk(size)[rank] for half in whole])
            elif getattr(parameter, "tensor_model_parallel", False):
                rows = len(parameter) * size
                if "embed" in name or "output_layer" in name:
                    whole = torch.cat([whole, torch.full((rows - len(whole), whole.shape[1]), 0.5)])
                local = whole.chunk(size, parameter.partition_dim)[rank]
            else:
                local = whole
            parameter.copy_(local.view_as(parameter))


def _parameters(model: Vlm) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters with the global numbers of their layers."""
    prefix = "language_model.decoder.layers."
    for name, parameter in model.named_parameters():
        if name.startswith(prefix):
            local, _, rest = name.removeprefix(prefix).partition(".")
            name = f"{prefix}{model.language_model.decoder.layers[int(local)].layer_number - 1}.{rest}"
        yield name, parameter
