"""Optimizer states of legacy trees, without the distributed optimizer."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rb.checkpoint.legacy.checkpoint import LegacyCheckpoint, read_legacy
from megatron_rb.shapes.shape import load_shape
from tests.unit.checkpoint.legacy import trees
from tests.unit.checkpoint.legacy.test_weights import TREES, assert_same_bytes, native, on_all, read, rewrite
from tests.unit.checkpoint.legacy.trees import UNEVEN, VIRTUAL, Tensors, Tree

KINDS = ("param", "exp_avg", "exp_avg_sq")


def written(tmp_path: Path, tree: Tree, sizes: dict | None = None, **options) -> tuple[Path, Path, dict[str, Tensors]]:
    """`(tree with a plain optimizer, Hugging Face folder, its fp32 states by kind)`."""
    exact = trees.write_hf_folder(tmp_path / "hf", text_layers=tree.text_layers, tied=tree.tied, **(sizes or {}))
    states = {"param": exact, "exp_avg": trees.random_like(exact, 1), "exp_avg_sq": trees.random_like(exact, 2)}
    root = tmp_path / "tree"
    trees.write_tree(root, trees.rounded(exact), tree, trees.plain_optimizer(states, tree, **options))
    return root, tmp_path / "hf", states


def assert_same_optimizer(
    found: LegacyCheckpoint, states: dict[str, Tensors], hf: Path, names=lambda name: True
) -> None:
    assert found.optimizer is not None, found.dropped
    for kind in KINDS:
        wanted = {name: value for name, value in native(states[kind], hf).items() if names(name)}
        assert_same_bytes(getattr(found.optimizer, kind), wanted)


TRAINED = {name: tree for name, tree in TREES.items() if tree.iteration is not None}


@pytest.mark.parametrize("tree", TRAINED.values(), ids=TRAINED.keys())
def test_states_are_those_that_were_written(tmp_path: Path, tree: Tree):
    root, hf, states = written(tmp_path, tree)
    found = read(root, hf)
    assert_same_optimizer(found, states, hf)
    assert_same_bytes(found.weights, native(trees.rounded(states["param"]), hf))
    assert found.optimizer.step == 7
    assert [group["wd_mult"] for group in found.optimizer.groups] == [1.0, 0.0]
    assert found.optimizer.groups[0] == {"wd_mult": 1.0, "lr_mult": 1.0, "lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8}
    assert found.warnings == []


def test_step_may_be_counted_per_parameter(tmp_path: Path):
    root, hf, states = written(tmp_path, UNEVEN, step_in_state=True)
    found = read(root, hf)
    assert_same_optimizer(found, states, hf)
    assert (found.optimizer.step, type(found.optimizer.step)) == (7, int)


def is_vision(key: str) -> bool:
    return key.startswith("vision_model.")


GROUPS = {
    "vision with its own rate": lambda key, value: 2 * is_vision(key) + (value.ndim == 1),
    "groups in another order": lambda key, value: int(value.ndim > 1),
    "embeddings with their own rate": lambda key, value: (
        2 * ("word_embeddings" in key or "output_layer" in key) + (value.ndim == 1)
    ),
}


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("tree", [UNEVEN, VIRTUAL], ids=["uneven", "virtual"])
def test_groups_are_recognised(tmp_path: Path, tree: Tree, group):
    root, hf, states = written(tmp_path, tree, group=group)
    assert_same_optimizer(read(root, hf), states, hf)


FROZEN = {
    "vision": (lambda key: not is_vision(key), lambda name: not name.startswith("vision.")),
    "language": (is_vision, lambda name: name.startswith("vision.")),
    "all but the projection": (lambda key: ".projection." in key, lambda name: name.startswith("vision.merger.linear")),
}


@pytest.mark.parametrize(("trained", "names"), FROZEN.values(), ids=FROZEN.keys())
def test_frozen_parameters_have_no_state(tmp_path: Path, trained, names):
    root, hf, states = written(tmp_path, UNEVEN, trained=trained)
    found = read(root, hf)
    assert_same_optimizer(found, states, hf, names)
    assert any("they were frozen" in warning for warning in found.warnings)


def test_fp32_training_has_no_second_copy_of_the_weights(tmp_path: Path):
    exact = trees.write_hf_folder(tmp_path / "hf")
    states = {"param": exact, "exp_avg": trees.random_like(exact, 1), "exp_avg_sq": trees.random_like(exact, 2)}
    plain = trees.plain_optimizer(states, UNEVEN)
    trees.write_tree(
        tmp_path / "tree", exact, UNEVEN, lambda *rank: {"optimizer": plain(*rank)["optimizer"]["optimizer"]}
    )
    found = read(tmp_path / "tree", tmp_path / "hf")
    assert_same_optimizer(found, states, tmp_path / "hf")
    assert_same_bytes(found.weights, native(exact, tmp_path / "hf"))


def test_zero_centered_main_norms_are_raised_by_one(tmp_path: Path):
    tree = replace(UNEVEN, zero_centered=True)
    exact = trees.write_hf_folder(tmp_path / "hf")
    states = {"param": exact, "exp_avg": trees.random_like(exact, 1), "exp_avg_sq": trees.random_like(exact, 2)}
    stored = {
        name: value - 1 if name.startswith("model.language_model") and "norm" in name else value
        for name, value in exact.items()
    }
    as_stored = replace(tree, zero_centered=False)
    plain = trees.plain_optimizer(states | {"param": stored}, as_stored)
    root = tmp_path / "tree"
    trees.write_tree(
        root, trees.rounded(stored), replace(as_stored, args={"decoder_first_pipeline_num_layers": 1}), plain
    )
    on_all(root, tree, lambda content: setattr(content["args"], "apply_layernorm_1p", True))
    found = read(root, tmp_path / "hf", scratch=tmp_path)
    wanted = {
        name: value + 1 if name.startswith("model.language_model") and "norm" in name else value
        for name, value in stored.items()
    }
    assert_same_optimizer(found, states | {"param": wanted}, tmp_path / "hf")


# Refused, with the reason


def break_main(content: dict) -> None:
    content["optimizer"]["fp32_from_fp16_params"][0][0].add_(1)


def swap_mains(content: dict) -> None:
    mains = content["optimizer"]["fp32_from_fp16_params"][1]
    mains[0], mains[1] = mains[1], mains[0]


def drop_state(content: dict) -> None:
    content["optimizer"]["optimizer"]["state"].clear()


def narrow(content: dict) -> None:
    for state in content["optimizer"]["optimizer"]["state"].values():
        state["exp_avg"] = state["exp_avg"].bfloat16()


def other_steps(content: dict) -> None:
    content["optimizer"]["optimizer"]["param_groups"][0]["step"] = 9


UNMAPPABLE = {
    "fp32 weights that are not the weights": (break_main, "fit no known order"),
    "parameters in another order": (swap_mains, "fit no known order"),
    "no moments": (drop_state, "no Adam moments"),
    "narrow moments": (narrow, "bfloat16"),
    "two step counts": (other_steps, r"counts \[7, 9\] steps"),
    "chained optimizers": (lambda c: c.update(optimizer=[c["optimizer"]] * 2), "chained"),
    "another optimizer": (lambda c: c.update(optimizer={"muon": 1}), "no optimizer of megatron-core"),
}


@pytest.mark.parametrize(("change", "reason"), UNMAPPABLE.values(), ids=UNMAPPABLE.keys())
def test_uncertain_state_is_left_out_with_the_reason(tmp_path: Path, change, reason: str):
    root, hf, states = written(tmp_path, Tree(tp=2))
    on_all(root, Tree(tp=2), change)
    found = read(root, hf)
    assert found.optimizer is None
    assert_same_bytes(found.weights, native(trees.rounded(states["param"]), hf))
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(dict(found.dropped)["optimizer"])
    assert any("optimizer state is left out" in warning for warning in found.warnings)


def test_rank_without_a_state_is_refused(tmp_path: Path):
    root, hf, _ = written(tmp_path, UNEVEN)
    rewrite(root, UNEVEN, 1, 0, lambda content: content.pop("optimizer"))
    with pytest.raises(ValueError, match=r"mp_rank_01_000.* holds no optimizer state, which other ranks have"):
        read(root, hf)


def test_moments_that_differ_between_ranks_are_reported(tmp_path: Path):
    root, hf, _ = written(tmp_path, Tree(tp=2))
    rewrite(
        root, Tree(tp=2), 1, 0, lambda c: [s["exp_avg"].add_(1) for s in c["optimizer"]["optimizer"]["state"].values()]
    )
    warnings = read_legacy(root, load_shape(hf)).warnings
    assert any("exp_avg of vision.layers.0.norm1.weight differs" in warning for warning in warnings)
