"""Weights of legacy trees, compared byte for byte with the Hugging Face tensors they were cut from."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rb.checkpoint.hf.table import stored_rules
from megatron_rb.checkpoint.legacy.checkpoint import LegacyCheckpoint, read_legacy
from megatron_rb.checkpoint.legacy.tree import is_legacy_checkpoint
from megatron_rb.checkpoint.storage.tensors import open_files
from megatron_rb.shapes.shape import load_shape
from tests.unit.checkpoint.legacy import trees
from tests.unit.checkpoint.legacy.trees import EVEN, UNEVEN, UNEVEN_VIRTUAL, VIRTUAL, Tensors, Tree


def native(tensors: Tensors, folder: Path) -> Tensors:
    """Native parameters of a whole model of Hugging Face tensors."""
    rules = stored_rules(load_shape(folder))
    return {name: rule.join([tensors[source] for source in rule.hf_names]) for name, rule in rules.items()}


def assert_same_bytes(stored: dict, wanted: Tensors) -> None:
    assert stored.keys() == wanted.keys()
    with open_files() as pool:
        for name, tensor in stored.items():
            tensor.check_cover()
            assert tensor.name == name
            assert (tensor.dtype, tensor.shape) == (wanted[name].dtype, wanted[name].shape), name
            assert torch.equal(pool.read(tensor).view(torch.uint8), wanted[name].contiguous().view(torch.uint8)), name


def written(tmp_path: Path, tree: Tree, **sizes) -> tuple[Path, Path, Tensors]:
    """`(tree, Hugging Face folder, its bf16 tensors)`."""
    exact = trees.write_hf_folder(tmp_path / "hf", text_layers=tree.text_layers, tied=tree.tied, **sizes)
    tensors = trees.rounded(exact)
    return trees.write_tree(tmp_path / "tree", tensors, tree), tmp_path / "hf", tensors


def read(root: Path, hf: Path, **options) -> LegacyCheckpoint:
    return read_legacy(root, load_shape(hf), **options)


TREES = {
    "one rank": Tree(),
    "one rank, local layers": Tree(transformer_engine=False),
    "tp 2": Tree(tp=2),
    "tp 2 x pp 2": EVEN,
    "tp 2 x pp 2, first stage uneven": UNEVEN,
    "tp 2 x pp 2, first stage uneven, local layers": replace(UNEVEN, transformer_engine=False),
    "virtual pipeline": VIRTUAL,
    "virtual pipeline, first stage uneven": UNEVEN_VIRTUAL,
    "last stage uneven": Tree(pp=2, chunk_layers=((3,), (1,)), args={"decoder_last_pipeline_num_layers": 1}),
    "a stage without layers": Tree(pp=3, chunk_layers=((0,), (2,), (2,))),
    "tied, one stage": Tree(tied=True),
    "tied, copy on the last stage": replace(UNEVEN, tied=True),
    "tied, no copy": replace(UNEVEN, tied=True, tied_copy=False, iteration=None),
    "padded vocabulary": replace(EVEN, padded_vocabulary=128),
    "padded vocabulary, a rank of padding": Tree(tp=2, padded_vocabulary=256),
    "release": Tree(iteration=None),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_weights_are_those_of_the_hugging_face_folder(tmp_path: Path, tree: Tree):
    root, hf, tensors = written(tmp_path, tree)
    found = read(root, hf)
    assert_same_bytes(found.weights, native(tensors, hf))
    assert found.layout == {"tp": tree.tp, "pp": tree.pp, "virtual_chunks": len(tree.chunk_layers[0])}
    assert (found.iteration, found.is_release) == (tree.iteration or 0, tree.iteration is None)
    assert found.optimizer is None


def test_padded_vision_ffn_is_left_out(tmp_path: Path):
    root, hf, tensors = written(tmp_path, replace(UNEVEN, padded_vision_ffn=56), vision_ffn=53)
    found = read(root, hf)
    assert_same_bytes(found.weights, native(tensors, hf))
    assert any("linear_fc1.weight" in key and "padding" in reason for key, reason in found.dropped)


def test_padding_that_is_not_zero_is_refused(tmp_path: Path):
    tree = replace(UNEVEN, padded_vision_ffn=56)
    root, hf, _ = written(tmp_path, tree, vision_ffn=53)
    rewrite(
        root, tree, 1, 0, lambda content: content["model"]["vision_model.decoder.layers.0.mlp.linear_fc1.bias"].add_(1)
    )
    with pytest.raises(ValueError, match=r"linear_fc1.bias has 6 rows of padding that is not zero"):
        read(root, hf)


@pytest.mark.parametrize("tag", ["musa:0", "cuda:3"])
def test_device_tags_do_not_matter(tmp_path: Path, tag: str):
    root, hf, tensors = written(tmp_path, replace(UNEVEN, device_tag=tag))
    found = read(root, hf)
    assert_same_bytes(found.weights, native(tensors, hf))
    kind = tag.split(":")[0]
    assert found.device_tags == {tag, f"{kind}:0", f"{kind}:1"}


@pytest.mark.parametrize(("tag", "message"), [("musa:0", "tagged with musa:0"), ("cuda:3", "CUDA")])
def test_naive_torch_load_fails_on_the_same_file(tmp_path: Path, tag: str, message: str):
    """Control: without a restricted reader these files need the vendor's package, or the pickled classes."""
    root, *_ = written(tmp_path, replace(UNEVEN, device_tag=tag))
    path = rank_file(root, UNEVEN, 0, 0)
    with trees.megatron_enum(), pytest.raises(RuntimeError, match=message):
        torch.load(path, weights_only=False)
    with pytest.raises((ModuleNotFoundError, RuntimeError), match="megatron.stand_in_enums|device string: musa"):
        torch.load(path, weights_only=False, map_location="cpu")


def test_reading_imports_no_megatron_and_no_vendor_package(tmp_path: Path):
    root, hf, _ = written(tmp_path, replace(UNEVEN, device_tag="musa:0"))
    code = (
        "import sys; from megatron_rb.checkpoint.legacy.checkpoint import read_legacy;"
        "from megatron_rb.shapes.shape import load_shape;"
        f"found = read_legacy({str(root)!r}, load_shape({str(hf)!r}));"
        "foreign = {name.split('.')[0] for name in sys.modules} & {'megatron', 'torch_musa', 'transformer_engine'};"
        "print(len(found.weights), foreign)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[1] == "set()"


def test_every_source_key_is_accounted_for(tmp_path: Path):
    root, hf, _ = written(tmp_path, VIRTUAL)
    found = read(root, hf)
    dropped = dict(found.dropped)
    state = trees.chunk_state(trees.rounded(trees.write_hf_folder(tmp_path / "other")), VIRTUAL, 0, 0, 0)
    for key in state:
        assert (f"stage 0, model0: {key}" in dropped) == (not trees.is_parameter(key)), key
    assert {"rng_state", "checkpoint_version", "num_floating_point_operations_so_far"} <= dropped.keys()
    assert all(dropped.values())
    assert max(Counter(key for key, _ in found.dropped).values()) == 1


def test_arguments_and_schedule_are_plain_values(tmp_path: Path):
    root, hf, _ = written(tmp_path, replace(UNEVEN, device_tag="musa:0"))
    found = read(root, hf)
    assert found.args["attention_backend"] == "AttnBackend(2)"
    assert found.args["params_dtype"] == "bfloat16"
    assert found.args["device"] == "device(musa, 0)"
    assert found.scheduler == {"max_lr": 1e-5, "num_steps": 48, "lr_decay_style": "cosine"}
    assert found.consumed_samples == 48


def test_zero_centered_norms_are_raised_by_one(tmp_path: Path):
    tree = replace(UNEVEN, zero_centered=True)
    root, hf, tensors = written(tmp_path, tree)
    with pytest.raises(ValueError, match="gamma - 1 .* scratch folder"):
        read(root, hf)
    found = read(root, hf, scratch=tmp_path)
    language = {
        name: ((value - 1).float() + 1).bfloat16()
        if name.startswith("model.language_model") and "norm" in name
        else value
        for name, value in tensors.items()
    }
    assert_same_bytes(found.weights, native(language, hf))
    assert any("9 norm weights" in warning for warning in found.warnings)


def test_release_for_several_ranks_warns_of_its_vision_biases(tmp_path: Path):
    root, hf, _ = written(tmp_path, Tree(tp=2, iteration=None))
    assert any("linear_fc1.bias" in warning for warning in read(root, hf).warnings)
    assert read(*written(tmp_path / "trained", Tree(tp=2))[:2]).warnings == []


def test_an_iteration_may_be_named_directly(tmp_path: Path):
    root, hf, tensors = written(tmp_path, EVEN)
    assert_same_bytes(read(root / "iter_0000003", hf).weights, native(tensors, hf))


# Bad input


def rank_file(root: Path, tree: Tree, tp_rank: int, stage: int) -> Path:
    return trees.rank_folder(trees.iteration_folder(root, tree), tree, tp_rank, stage) / "model_optim_rng.pt"


def rewrite(root: Path, tree: Tree, tp_rank: int, stage: int, change) -> None:
    """Change the content of one rank's file."""
    path = rank_file(root, tree, tp_rank, stage)
    with trees.megatron_enum():
        content = torch.load(path, weights_only=False, map_location="cpu")
        change(content)
        torch.save(content, path)


EMBEDDING = "language_model.embedding.word_embeddings.weight"
NORM = "vision_model.decoder.final_layernorm.weight"
CHANGES = {
    "another iteration": (1, 0, lambda c: c.update(iteration=9), "is of iteration"),
    "another run": (1, 1, lambda c: setattr(c["args"], "consumed_train_samples", 96), "consumed_train_samples 96"),
    "another layout": (0, 1, lambda c: setattr(c["args"], "tensor_model_parallel_size", 4), "parallel_size 4"),
    "a copy that differs": (1, 0, lambda c: c["model"][NORM].add_(1), "final_layernorm.weight differs from the copy"),
    "a parameter less": (0, 1, lambda c: c["model"].pop("language_model.output_layer.weight"), "different parameters"),
    "another shape": (0, 0, lambda c: c["model"].update({EMBEDDING: torch.ones(3, 4)}), "hold .*word_embeddings"),
    "no model": (0, 0, lambda c: c.pop("model"), "'model' or 'model0'"),
    "chunks of another number": (1, 1, lambda c: c.update(model0=c.pop("model")), "2|model0|nothing|model chunks"),
}


@pytest.mark.parametrize(("tp_rank", "stage", "change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_file_of_another_checkpoint_is_refused(tmp_path: Path, tp_rank: int, stage: int, change, message: str):
    root, hf, _ = written(tmp_path, UNEVEN)
    rewrite(root, UNEVEN, tp_rank, stage, change)
    if "chunks" in message:
        rewrite(root, UNEVEN, tp_rank, stage, lambda c: c.update(model1={}))
    with pytest.raises(ValueError, match=message):
        read(root, hf)


def on_all(root: Path, tree: Tree, change) -> None:
    for tp_rank in range(tree.tp):
        for stage in range(tree.pp):
            rewrite(root, tree, tp_rank, stage, change)


ON_ALL = {
    "fp8 parameters": (
        lambda c: c["model"].update({k: v.to(torch.float8_e4m3fn) for k, v in c["model"].items() if k == NORM}),
        "fp8",
    ),
    "other depth": (lambda c: setattr(c["args"], "num_layers", 7), "num_layers 7 instead of 4"),
    "tied": (lambda c: setattr(c["args"], "untie_embeddings_and_output_weights", False), "instead of True"),
    "mixture of experts": (lambda c: setattr(c["args"], "num_experts", 8), "num_experts 8"),
    "uneven otherwise": (lambda c: setattr(c["args"], "decoder_first_pipeline_num_layers", 2), "holds 1 layers.* 2"),
    "unknown parameter": (lambda c: c["model"].update({NORM + "s": torch.ones(1)}), "weights.*nearest.*allow-drop"),
    "gap in the layers": (
        lambda c: [c["model"].pop(k) for k in list(c["model"]) if "language_model.decoder.layers.1." in k],
        "numbered from 0|different",
    ),
}


@pytest.mark.parametrize(("change", "message"), ON_ALL.values(), ids=ON_ALL.keys())
def test_other_model_is_refused(tmp_path: Path, change, message: str):
    root, hf, _ = written(tmp_path, UNEVEN)
    on_all(root, UNEVEN, change)
    with pytest.raises(ValueError, match=message):
        read(root, hf)


def test_unknown_parameter_may_be_left_out_by_name(tmp_path: Path):
    root, hf, tensors = written(tmp_path, UNEVEN)
    on_all(root, UNEVEN, lambda c: c["model"].update({"language_model.extra": torch.ones(1)}))
    found = read(root, hf, allow_drop=["language_model.extra"])
    assert_same_bytes(found.weights, native(tensors, hf))
    assert ("stage 0, model: language_model.extra", "dropped as asked for with --allow-drop") in found.dropped


def test_tied_copy_that_differs_is_refused(tmp_path: Path):
    tree = replace(UNEVEN, tied=True)
    root, hf, _ = written(tmp_path, tree)
    rewrite(root, tree, 1, 1, lambda c: c["model"]["language_model.output_layer.weight"][3].add_(1))
    with pytest.raises(ValueError, match=r"output_layer.weight differs from the embedding"):
        read(root, hf)


def test_config_of_another_size_is_refused(tmp_path: Path):
    root, _, _ = written(tmp_path, UNEVEN)
    for vision_ffn, message in ((60, "mlp.linear_fc1.* does not make"), (40, "padding that is not zero")):
        other = tmp_path / f"ffn{vision_ffn}"
        trees.write_hf_folder(other, vision_ffn=vision_ffn)
        with pytest.raises(ValueError, match=f"{message}.*config.json is of another model"):
            read(root, other)


def test_missing_rank_is_named(tmp_path: Path):
    root, hf, _ = written(tmp_path, UNEVEN)
    place = rank_file(root, UNEVEN, 0, 1).parent
    place.rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"lacks the folder of .* \(0, 1\)"):
        read(root, hf)
    place.mkdir()
    with pytest.raises(ValueError, match=r"mp_rank_00_001 has no model_optim_rng.pt"):
        read(root, hf)


def test_missing_ranks_at_the_end_are_noticed(tmp_path: Path):
    root, hf, _ = written(tmp_path, UNEVEN)
    for stage in range(2):
        rank_file(root, UNEVEN, 1, stage).parent.rename(tmp_path / f"away{stage}")
    with pytest.raises(ValueError, match=r"tensor_model_parallel_size 2, but .* ranks of 1"):
        read(root, hf)


def test_truncated_file_is_damaged(tmp_path: Path):
    root, hf, _ = written(tmp_path, UNEVEN)
    path = rank_file(root, UNEVEN, 1, 1)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"mp_rank_01_001/model_optim_rng.pt is cut off"):
        read(root, hf)


def test_malicious_rank_runs_nothing(tmp_path: Path):
    root, hf, _ = written(tmp_path, UNEVEN)
    marker = tmp_path / "marker"
    path = rank_file(root, UNEVEN, 0, 0)
    torch.save({"model": {}, "args": trees.Reduced(eval, f"open({str(marker)!r}, 'w')")}, path)
    with pytest.raises(ValueError, match=r"asks for builtins.eval"):
        read(root, hf)
    assert not marker.exists()


def test_legacy_folders_are_recognised(tmp_path: Path):
    root, hf, _ = written(tmp_path, EVEN)
    assert is_legacy_checkpoint(root) and is_legacy_checkpoint(root / "iter_0000003")
    assert not is_legacy_checkpoint(hf) and not is_legacy_checkpoint(tmp_path / "nowhere")


def test_other_folders_are_explained(tmp_path: Path):
    root, hf, _ = written(tmp_path, EVEN)
    tracker = root / "latest_checkpointed_iteration.txt"
    tracker.write_text("12")
    with pytest.raises(ValueError, match="names iter_0000012, which is missing"):
        read(root, hf)
    tracker.unlink()
    with pytest.raises(ValueError, match="name one of its iterations: iter_0000003"):
        read(root, hf)
    with pytest.raises(ValueError, match="it is no legacy Megatron checkpoint"):
        read(hf, hf)
    with pytest.raises(ValueError, match="is not a folder"):
        read(tmp_path / "nowhere", hf)


def test_pattern_leaves_unknown_keys_out(tmp_path: Path):
    root, hf, tensors = written(tmp_path, UNEVEN)
    rewrite(root, UNEVEN, 0, 0, lambda content: content["model"].update({"value_head.0.weight": torch.ones(2)}))
    rewrite(root, UNEVEN, 1, 0, lambda content: content["model"].update({"value_head.0.weight": torch.ones(2)}))
    found = read(root, hf, allow_drop=["value_head.*"])
    assert_same_bytes(found.weights, native(tensors, hf))
    assert [reason for key, reason in found.dropped if "value_head" in key] == [
        "dropped as asked for with --allow-drop"
    ]


def test_pattern_that_drops_nothing_is_refused(tmp_path: Path):
    root, hf, _ = written(tmp_path, UNEVEN)
    with pytest.raises(ValueError, match=r"--allow-drop value_head.\*: .* has no such tensor"):
        read(root, hf, allow_drop=["value_head.*"])
    with pytest.raises(ValueError, match="--allow-drop language_model.* is part of the model and cannot be left out"):
        read(root, hf, allow_drop=["language_model.*.weight"])
