"""A checkpoint in a rehearsal: bytes of ranks and machines against counting parameters, waits, and what would fail."""

import json
import math
from dataclasses import asdict

import pytest

from megatron_rb.checkpoint import stored
from megatron_rb.checkpoint.hf.table import stored_rules
from megatron_rb.rehearsal.page import write_page
from megatron_rb.rehearsal.report import lines
from megatron_rb.rehearsal.stand_ins import StandIns
from megatron_rb.rehearsal.worker import rehearse
from megatron_rb.shapes.shape import load_shape
from tests.parity.tiny_models import write_model
from tests.rehearsal.conftest import rehearsed, request_of

ELEMENT = 2 + 3 * 4
"""Bytes of an element: bf16, its fp32 copy, two moments."""
RANDOM_STATES = 32 << 10
"""Bytes of the random states of a rank, at most."""
RUNS = {"copies": 4, "cut": 8, "plain": 4}
"""Processes of the runs all of whose ranks are rehearsed."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "hf", "qwen3_vl", seed=1)


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    """Runs of a tiny model that save and load, by name."""
    shape = load_shape(model)
    whole, cut = layouts(shape)
    plain = ["parallel.distributed_optimizer=false", "parallel.overlap_grad_reduce=false"]
    requests = [
        request_of(model, whole, "name=copies", dp=4, ranks="all", checkpoint=True),
        request_of(model, whole, "name=classes", dp=16, checkpoint=True),
        request_of(model, cut, "name=cut", tp=2, pp=2, sp=True, dp=2, ranks="all", checkpoint=True),
        request_of(model, cut, *plain, "name=plain", pp=2, dp=2, ranks="all", checkpoint=True),
        request_of(model, whole, "name=none", dp=2),
    ]
    return {summary.name: summary for summary in rehearsed(requests, tmp_path_factory.mktemp("runs"))}


def layouts(shape):
    """On one and on two pipeline ranks."""
    vision, decoder = shape.vision.num_layers, shape.text.num_layers
    return f"P v*{vision} M E t*{decoder} L", f"P v*{vision} M E t*1 | t*{decoder - 1} L"


@pytest.fixture(scope="module")
def elements(model):
    return sum(math.prod(rule.shape) for rule in stored_rules(load_shape(model)).values())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [*RUNS, "classes"])
def test_saving_and_loading_fail_nowhere_and_every_message_has_its_other_side(found, name):
    assert found[name].defects == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", RUNS)
def test_every_byte_is_copied_and_written_once(found, elements, name):
    moved = found[name].checkpoint.world
    assert moved.copied == elements * ELEMENT
    assert 0 < moved.written - moved.copied < RUNS[name] * RANDOM_STATES


@pytest.mark.timeout(300)
def test_a_rank_copies_writes_and_reads_its_share(found, elements):
    for name, ranks in (("copies", 4), ("classes", 16)):
        checkpoint = found[name].checkpoint
        share = elements * ELEMENT / ranks
        assert checkpoint.rank.copied == checkpoint.rank.read == pytest.approx(share, rel=0.02)


@pytest.mark.timeout(300)
def test_ranks_that_were_not_rehearsed_count_as_their_class(found, elements):
    checkpoint = found["classes"].checkpoint
    assert len(found["classes"].ranks) == 2
    assert checkpoint.world.copied == pytest.approx(elements * ELEMENT, rel=0.01)
    assert checkpoint.node.copied == pytest.approx(elements * ELEMENT / 2, rel=0.01)


@pytest.mark.timeout(300)
def test_waits_are_told_by_line(found):
    waits = found["copies"].checkpoint.waits
    assert [(kind, count) for kind, _, count in waits["save"]] == [("cuda.synchronize", 1)]
    assert [line.split(":")[0] for _, line, _ in waits["load"]] == ["checkpoint/stored.py"]


@pytest.mark.timeout(300)
def test_a_checkpoint_is_printed_and_on_the_page_and_in_the_json_only_when_asked_for(found, tmp_path):
    for name, shown in (("copies", True), ("none", False)):
        text = "\n".join(lines(found[name]))
        write_page(found[name], tmp_path / name)
        assert ("GiB to the host" in text and "times a save" in text and "times a load" in text) == shown
        assert ("<h2>A checkpoint</h2>" in (tmp_path / name).read_text()) == shown
        tree = json.loads(json.dumps(found[name].as_json()))["checkpoint"]
        assert tree == (asdict(found[name].checkpoint) | {"waits": tree["waits"]} if shown else None)


def without_a_file(folder) -> None:
    """A rehearsal in which nothing stands in for the files of a checkpoint that is loaded."""
    with StandIns() as planted:
        planted.set(stored, "open_files", None)
        rehearse(folder)


@pytest.mark.timeout(120)
def test_a_load_that_fails_is_told_with_its_line(model, tmp_path):
    request = request_of(model, layouts(load_shape(model))[0], "name=broken", dp=2, checkpoint=True)
    summary = rehearsed([request], tmp_path, worker="tests.rehearsal.test_checkpoint:without_a_file")[0]
    assert not summary.sound
    failures = [defect.text for defect in summary.defects if defect.kind == "failure"]
    assert len(failures) == 2
    assert all("fails in its load: " in text and "(checkpoint/stored.py:" in text for text in failures)
