"""A run of 64 ranks opens no more files than the rule says by which larger worlds are judged.

Takes minutes on two cores: `make test-slow`.
"""

import pytest

from megatron_rb.builders.build import SampleMix, write_split
from megatron_rb.checkpoint.hf.tiny import TinySize, conversation_texts, write_tiny_model
from megatron_rb.launch.open_files import OTHER_FILES, files_of_groups, files_of_rank, group_sizes
from tests.distributed.forked import REPOSITORY
from tests.distributed.world import run_world

WORLD, TP, PP = 64, 2, 2
LIMITS = {1024: 300, 8192: 600}
"""Open files of one rank, by ranks of the world."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The files of every rank after the start, a step, a save and an evaluation."""
    folder = tmp_path_factory.mktemp("many")
    mix = SampleMix(tasks=("pointing",), views=("side",), windows=0)
    write_split(REPOSITORY / "examples/robosim/heldout", folder, "heldout", mix, 0)
    write_tiny_model(
        conversation_texts(folder / "heldout.jsonl"), folder / "hf", family="qwen3_vl", size=TinySize(), seed=0
    )
    settings = [
        f"model.hf_path={folder / 'hf'}",
        "model.dtype=fp32",
        f"data.train=[{folder / 'heldout.jsonl'}]",
        f"data.evaluation=[{folder / 'heldout.jsonl'}]",
        "data.seq_length=512",
        "data.max_patches=1024",
        f"data.global_batch_size={WORLD // (TP * PP)}",
        f"parallel.tp_size={TP}",
        f"parallel.pp_size={PP}",
        "checkpoint.init=",
        "checkpoint.asynchronous=false",
        "schedule.train_steps=2",
        "metrics.plots=false",
        "platform.name=cpu",
        f"run_dir={folder / 'run'}",
    ]
    return run_world("tests.distributed.cases_many_ranks:files_after_parts", WORLD, timeout=900, settings=settings)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_no_rank_of_64_opens_more_files_than_the_rule_says(ranks):
    most = {part: max(rank[part] for rank in ranks) for part in ranks[0]}
    allowed = files_of_groups([*group_sizes(WORLD, TP, PP, 1), TP * PP], lazy=True)
    assert max(most.values()) <= allowed, most
    assert most["evaluation"] < LIMITS[1024]


@pytest.mark.parametrize(("world", "limit"), LIMITS.items())
def test_a_rank_of_a_large_world_opens_few_files(world, limit):
    assert files_of_rank(world, tp=4, pp=4, cp=1, lazy=True, devices=True) - OTHER_FILES < limit
