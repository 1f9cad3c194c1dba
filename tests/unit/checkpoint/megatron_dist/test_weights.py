"""Keys of foreign `torch_dist` checkpoints: what is known by rule, what is refused by name, what may be left out.

The folders are written by torch.distributed.checkpoint itself, with the keys of Transformer Engine layers;
tests/distributed has those that megatron-core writes.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_rb.checkpoint.conversion.from_megatron import convert_megatron
from megatron_rb.checkpoint.conversion.verify import verify
from megatron_rb.checkpoint.megatron_dist.folders import find_megatron_dist
from tests.unit.checkpoint.legacy import trees
from tests.unit.checkpoint.legacy.trees import Tree

FC1 = "vision_model.decoder.layers.0.mlp.linear_fc1.weight"


def state_of(folder: Path, tree: Tree | None = None, **sizes) -> dict[str, torch.Tensor]:
    """A Hugging Face folder, and the state dict of its model in a single process."""
    exact = trees.write_hf_folder(folder, **sizes)
    state = trees.chunk_state(trees.rounded(exact), tree or Tree(), 0, 0, 0)
    return {key: value for key, value in state.items() if value is not None}


def save(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    dcp.save(dict(state), checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def state(tmp_path):
    return state_of(tmp_path / "hf")


def convert(tmp_path: Path, state: dict[str, torch.Tensor], **options) -> dict:
    """Convert, compare with the Hugging Face folder, and return the manifest."""
    folder = save(tmp_path / "iter_0000005", state)
    convert_megatron(folder, tmp_path / "out", str(tmp_path / "hf"), **options)
    assert verify(tmp_path / "out", tmp_path / "hf").equal
    return json.loads((tmp_path / "out" / "manifest.json").read_text())


def refused(tmp_path: Path, state: dict[str, torch.Tensor], words: str, **options) -> None:
    folder = save(tmp_path / "iter_0000005", state)
    with pytest.raises(ValueError, match=words):
        convert_megatron(folder, tmp_path / "out", str(tmp_path / "hf"), **options)
    assert not (tmp_path / "out").exists()


def test_states_of_layers_are_left_out_by_rule(tmp_path, state):
    extra = {key for key in state if key.endswith("_extra_state")}
    assert extra
    assert extra <= convert(tmp_path, state)["dropped"].keys()


@pytest.mark.parametrize("wrapper", ["model.", "module.", "module.module."])
def test_wrappers_around_the_model_do_not_matter(tmp_path, state, wrapper):
    convert(tmp_path, {wrapper + key: value for key, value in state.items()})


def test_language_model_that_is_not_wrapped(tmp_path, state):
    convert(tmp_path, {key.removeprefix("language_model."): value for key, value in state.items()})


def test_padding_of_the_vision_mlp_is_left_out(tmp_path):
    state = state_of(tmp_path / "hf", Tree(padded_vision_ffn=56), vision_ffn=53)
    dropped = convert(tmp_path, state)["dropped"]
    assert "6 rows of padding" in dropped.values() and "3 columns of padding" in dropped.values()


def test_padding_that_is_not_zero_is_refused(tmp_path):
    state = state_of(tmp_path / "hf", Tree(padded_vision_ffn=56), vision_ffn=53)
    state[FC1][55] = 1.0
    refused(tmp_path, state, "vision_model.*linear_fc1.weight has the shape .*it is not zero")


def test_unknown_key_names_the_nearest_and_can_be_dropped_by_pattern(tmp_path, state):
    spoilt = state | {"language_model.decoder.layers.0.mlp.linear_fc1.wieght": torch.ones(2)}
    refused(tmp_path, spoilt, r"wieght, which the model .* does not have \(the nearest known one is language_model")
    assert "language_model.decoder.layers.0.mlp.linear_fc1.wieght" in str(
        convert(tmp_path, spoilt, allow_drop=["*.wieght"])["dropped"]
    )


def test_adapter_is_named(tmp_path, state):
    key = "language_model.decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight"
    refused(tmp_path, state | {key: torch.ones(4, 4)}, "holds a LoRA adapter .*merge it into its base model")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_quantised_parameter_is_refused(tmp_path, state, dtype):
    refused(tmp_path, state | {FC1: state[FC1].to(dtype)}, f"{FC1} as {str(dtype)[6:]}; fp8 and integer")


def test_missing_parameter_is_named(tmp_path, state):
    del state["language_model.decoder.final_layernorm.weight"]
    refused(tmp_path, state, "lacks 1 parameters of the model of config.json: language.head.norm.weight")


def test_other_shape_is_named(tmp_path, state):
    key = "language_model.decoder.final_layernorm.weight"
    refused(tmp_path, state | {key: torch.ones(7)}, rf"{key} has the shape \[7\] in .*config.json says \[64\]")


def test_parameter_under_two_names_is_refused(tmp_path, state):
    key = "language_model.decoder.layers.0.input_layernorm.weight"
    refused(tmp_path, state | {key: torch.ones(64)}, "language.layers.0.input_norm.weight twice: as .* and as")


def test_tied_copy_of_the_head_must_be_the_embedding(tmp_path):
    state = state_of(tmp_path / "hf", Tree(tied=True), tied=True)
    head = state["language_model.embedding.word_embeddings.weight"].clone()
    refused(tmp_path, state | {"language_model.output_layer.weight": head + 1}, "says tie_word_embeddings, but its")
    manifest = convert(tmp_path, state | {"language_model.output_layer.weight": head})
    assert manifest["dropped"]["language_model.output_layer.weight"] == "a copy of the tied embedding"


def test_iteration_that_the_tracker_names_is_chosen(tmp_path, state):
    for iteration in (5, 9):
        save(tmp_path / "root" / f"iter_{iteration:07d}", state)
    assert find_megatron_dist(tmp_path / "root") is None
    (tmp_path / "root" / "latest_checkpointed_iteration.txt").write_text("5\n")
    assert find_megatron_dist(tmp_path / "root") == tmp_path / "root" / "iter_0000005"
    assert find_megatron_dist(tmp_path / "root" / "iter_0000009") == tmp_path / "root" / "iter_0000009"


def test_iterations_without_a_tracker_are_listed(tmp_path, state):
    save(tmp_path / "root" / "iter_0000009", state)
    with pytest.raises(ValueError, match="name one of its iterations: iter_0000009"):
        convert_megatron(tmp_path / "root", tmp_path / "out", str(tmp_path / "hf"))
