"""Optimizer files written by megatron-core itself are read in a process without it, and every value finds its name."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from megatron_rb.checkpoint.hf.table import stored_rules
from megatron_rb.checkpoint.legacy.buffers import Slot, buffer_layouts
from megatron_rb.checkpoint.legacy.checkpoint import LegacyCheckpoint, read_legacy
from megatron_rb.checkpoint.storage.tensors import StoredTensor, open_files
from megatron_rb.shapes.shape import load_shape
from tests.distributed.world import run_world
from tests.unit.checkpoint.legacy import trees
from tests.unit.checkpoint.legacy.trees import UNEVEN, VIRTUAL, Tree

KINDS = ("param", "exp_avg", "exp_avg_sq")
UNEVEN_STAGES = replace(UNEVEN, padded_vocabulary=128)
BUCKETS = {"overlap_grad_reduce": True, "ddp_bucket_size": 1000}
"""So small that some buckets end at a bias, whose length is no multiple of 64."""
CASES: dict[str, dict] = {
    "one rank": {"tree": Tree()},
    "data-parallel": {"tree": Tree(tp=2), "dp": 2},
    "uneven stages": {"tree": UNEVEN_STAGES},
    "buckets": {"tree": replace(UNEVEN_STAGES, args=dict(UNEVEN.args) | BUCKETS)},
    "buckets, data-parallel, tied": {
        "tree": replace(UNEVEN_STAGES, tied=True, args=dict(UNEVEN.args) | BUCKETS),
        "dp": 2,
    },
    "tied": {"tree": replace(UNEVEN, tied=True)},
    "virtual pipeline": {"tree": VIRTUAL},
    "virtual pipeline, buckets, local layers": {
        "tree": replace(VIRTUAL, transformer_engine=False, args=dict(VIRTUAL.args) | BUCKETS)
    },
    "frozen vision": {"tree": UNEVEN, "frozen": "vision_model."},
    "without distribution": {"tree": UNEVEN_STAGES, "distributed": False},
    "without distribution, tied, virtual": {"tree": replace(VIRTUAL, tied=True), "distributed": False},
    "without distribution, frozen vision": {"tree": UNEVEN, "distributed": False, "frozen": "vision_model."},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the trees of all cases."""
    root = tmp_path_factory.mktemp("legacy")
    for dp in (1, 2):
        cases = {name: case | {"tree": asdict(case["tree"])} for name, case in CASES.items() if case.get("dp", 1) == dp}
        run_world("tests.distributed.cases_legacy:write_trained_trees", dp, root=str(root), cases=cases)
    return root


def as_hugging_face(stored: dict[str, StoredTensor], folder: Path) -> trees.Tensors:
    rules = stored_rules(load_shape(folder))
    hf: trees.Tensors = {}
    with open_files() as pool:
        for name, rule in rules.items():
            value = pool.read(stored[name]) if name in stored else torch.full(rule.shape, -1.0)
            hf |= dict(zip(rule.hf_names, rule.split(value), strict=True))
    return hf


def assert_same(found: LegacyCheckpoint, expected: dict, tree: Tree, folder: Path) -> None:
    assert found.optimizer is not None, dict(found.dropped)["optimizer"]
    assert found.optimizer.step == 2
    for kind in KINDS:
        hf = as_hugging_face(getattr(found.optimizer, kind), folder)
        for (tp_rank, stage, chunk, key), states in expected.items():
            own = trees.chunk_state(hf, tree, tp_rank, stage, chunk)[key]
            wanted = states[kind]
            rows = len(wanted)
            if "word_embeddings" in key or "output_layer" in key:
                rows = min(rows, trees.VOCABULARY - tp_rank * rows)  # padding is no part of the model
            assert torch.equal(own[:rows], wanted[:rows]), (kind, tp_rank, stage, chunk, key)


@pytest.mark.parametrize("name", CASES)
def test_state_is_the_one_megatron_core_held(written: Path, name: str):
    case, folder = CASES[name], written / name
    found = read_legacy(folder, load_shape(folder / "hf0"))
    assert_same(found, torch.load(folder / "expected.pt", weights_only=False), case["tree"], folder / "hf0")
    assert [warning for warning in found.warnings if "frozen" not in warning] == []
    trained = {name for name in found.weights if not (case.get("frozen") and name.startswith("vision."))}
    assert set(found.optimizer.param) == trained


SIZES = [[5, 70, 300, 64, 1000, 33], [200, 64, 7, 130, 4000, 1], [64, 128, 256]]
PLACES = [
    {"sizes": sizes, "shared": shared, "bucket_size": bucket}
    for sizes in SIZES
    for shared in (None, 0, 2)
    for bucket in (None, 100, 600)
]


def test_places_in_buffers_are_those_of_megatron_core():
    (found,) = run_world("tests.distributed.cases_legacy:many_buffer_places", 1, cases=PLACES)
    for case, place in zip(PLACES, found, strict=True):
        slots = [Slot(size, number == case["shared"]) for number, size in enumerate(case["sizes"])]
        starts, length = next(buffer_layouts(slots, [case["bucket_size"]]))
        assert (list(starts), length) == (place["starts"], place["length"]), case
    assert max(place["buckets"] for place in found) > 3


def damaged(written: Path, folder: Path, change) -> LegacyCheckpoint:
    """What is read after `change` of the content of one rank's optimizer file."""
    shutil.copytree(written / "data-parallel", folder)
    path = folder / "iter_0000003" / "mp_rank_01" / "distrib_optim.pt"
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)
    return read_legacy(folder, load_shape(folder / "hf0"))


def world_of(content: dict) -> dict:
    return next(iter(content[0].values()))


def shorten(content: dict) -> None:
    world = world_of(content)
    world.update({kind: world[kind][:-64].clone() for kind in KINDS} | {"numel_unpadded": len(world["param"]) - 64})


def shift(content: dict) -> None:
    world_of(content)["param"] = world_of(content)["param"].roll(1)


CHANGES = {
    "shifted values": (shift, "fit no known"),
    "another length": (shorten, "fit no known"),
    "buckets apart": (lambda content: content.update(buckets_coalesced=False), "one tensor per bucket"),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES.keys())
def test_buffers_that_do_not_fit_are_left_out_with_the_reason(written: Path, tmp_path: Path, change, reason: str):
    found = damaged(written, tmp_path / "tree", change)
    assert found.optimizer is None
    assert reason in dict(found.dropped)["optimizer"]
    assert found.weights


def test_missing_optimizer_file_is_named(written: Path, tmp_path: Path):
    folder = tmp_path / "tree"
    shutil.copytree(written / "data-parallel", folder)
    (folder / "iter_0000003" / "mp_rank_01" / "distrib_optim.pt").unlink()
    with pytest.raises(ValueError, match=r"mp_rank_01 lacks distrib_optim.pt, which other ranks have"):
        read_legacy(folder, load_shape(folder / "hf0"))
