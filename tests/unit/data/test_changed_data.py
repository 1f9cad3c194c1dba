"""Media that are repaired, and data files that are edited, while a run lasts."""

import json
import logging
import os
from pathlib import Path

import pytest

from megatron_rb.config.schema import DataConfig
from megatron_rb.data.build import build_dataset
from megatron_rb.data.fingerprint import file_digest
from megatron_rb.data.ledger import Ledger, read_ledger
from megatron_rb.data.loader import RankShare, ReadAhead, SampleOrder, StepLoader, StepSize
from megatron_rb.data.packing import Budget

CONFIG = DataConfig(system_prompt="", seq_length=512)


def _row(number: int, **keys) -> str:
    text = "<image>" * ("image" in keys) + f"Where is {number}?"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "Here."}]
    return json.dumps({"id": f"s{number}", "conversations": turns, **keys}) + "\n"


class Run:
    """A run folder with one data file."""

    def __init__(self, encoder, folder: Path) -> None:
        self.encoder, self.folder, self.file = encoder, folder, folder / "rows.jsonl"
        self.ledger = Ledger(folder / "ledger.jsonl")

    def open(self, **options):
        kept = self.folder / "index"
        return build_dataset(CONFIG, self.encoder, [str(self.file)], self.ledger, cache_dir=kept, **options)

    def names(self, **options) -> list[str]:
        dataset = self.open(**options)
        return [dataset.get(number, with_pixels=False).sample_id for number in range(len(dataset))]

    def loader(self, allow_changed: bool = False, told: bool = True) -> StepLoader:
        dataset = self.open()
        return StepLoader(
            dataset,
            StepSize(Budget(512, 512), samples=5),
            RankShare(),
            SampleOrder(0, True, dataset.fingerprint if told else None, allow_changed),
            self.ledger,
            ReadAhead(steps=0, threads=1),
        )


@pytest.fixture
def run(encoder, tmp_path):
    return Run(encoder, tmp_path)


@pytest.fixture
def repaired(run, draw_image):
    """A run whose index was made while two of four pictures were missing."""
    draw_image("a.png", 64, 64)
    rows = [_row(0, image="a.png"), _row(1, image="b.png"), _row(2, image="a.png"), _row(3, image="c.png")]
    run.file.write_text("".join(rows))
    assert run.names() == ["s0", "s2"]
    draw_image("b.png", 96, 64)
    draw_image("c.png", 64, 64)
    return run


def test_rows_whose_pictures_were_repaired_come_back_in_their_places(repaired):
    assert repaired.names() == ["s0", "s1", "s2", "s3"]
    dataset = repaired.open()
    assert dataset.index.rejected == {}
    assert [dataset[number].num_patches for number in range(4)] == dataset.sizes[:, 1].tolist()
    accepted = [record["line"] for record in read_ledger(repaired.ledger.path) if record["kind"] == "accepted"]
    assert accepted == [2, 4]


def test_rows_that_are_still_broken_stay_out_and_are_not_told_again(run):
    run.file.write_text(_row(0) + _row(1, image="gone.png"))
    assert run.names() == run.names() == ["s0"]
    assert len(read_ledger(run.ledger.path)) == 1


def test_a_run_with_a_checkpoint_is_only_told_of_them(repaired, caplog):
    with caplog.at_level(logging.WARNING):
        assert repaired.names(refused="tell") == ["s0", "s2"]
    assert "2 samples that were refused for their media are usable now" in caplog.text
    assert "data.allow_changed=true" in caplog.text


def test_a_later_rank_trusts_the_first(repaired):
    assert repaired.names(refused="leave") == ["s0", "s2"]


def test_an_edit_that_leaves_size_and_time_is_seen(run):
    run.file.write_text(_row(0) + _row(1))
    before = run.file.stat()
    assert run.names() == ["s0", "s1"]
    run.file.write_text(_row(0) + _row(7))
    os.utime(run.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run.file.stat().st_size == before.st_size
    assert run.open().index.digests == (file_digest(run.file),)


@pytest.fixture
def stopped(run):
    """A run of 40 rows, and its state after 9 steps of 5: in the second epoch."""
    run.file.write_text("".join(map(_row, range(40))))
    loader = run.loader()
    for _ in range(9):
        loader.next_step()
    state = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    return run, state


def _resumed(run: Run, state: dict, **options) -> list[str]:
    loader = run.loader(**options)
    loader.load_state_dict(state)
    step = loader.next_step()
    loader.close()
    return [sample.sample_id for members in step.micro_batches for sample in members]


def test_the_same_data_go_on_whatever_their_name_and_time(stopped):
    run, state = stopped
    expected = _resumed(run, state)
    run.file = run.file.rename(run.folder / "moved.jsonl")
    os.utime(run.file, (1, 1))
    assert _resumed(run, state) == expected


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.split("\n", 1)[1],
        lambda text: text + _row(40),
        lambda text: text.replace("Where is 7?", "Where is 8?"),
    ],
    ids=["a line less", "a line more", "a word"],
)
def test_an_edited_file_stops_the_resume_with_a_way_out(stopped, edit):
    run, state = stopped
    run.file.write_text(edit(run.file.read_text()))
    with pytest.raises(ValueError, match=r"the checkpoint: changed is .*rows.jsonl.*data.allow_changed=true"):
        _resumed(run, state)


def test_an_edited_file_may_be_taken_on_purpose(stopped, caplog):
    run, state = stopped
    run.file.write_text(run.file.read_text().split("\n", 1)[1])
    with caplog.at_level(logging.WARNING):
        assert len(_resumed(run, state, allow_changed=True)) == 5
    assert "some samples of this epoch come twice and others never" in caplog.text


def test_a_place_beyond_the_end_of_fewer_data_is_the_next_epoch(stopped):
    run, state = stopped
    run.file.write_text("".join(map(_row, range(3))))
    loader = run.loader(allow_changed=True)
    loader.load_state_dict(state)
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (2, 0)
    loader.close()


def test_rows_that_come_back_change_the_order_too(repaired):
    loader = repaired.loader()
    state = loader.state_dict() | {"data": loader.state_dict()["data"] | {"order": "of two samples", "samples": 2}}
    with pytest.raises(ValueError, match="the same data files gave 2 samples and give 4 now"):
        loader.load_state_dict(state)
    loader.close()


def test_a_checkpoint_that_does_not_tell_its_data_is_continued_with_a_note(stopped, caplog):
    run, state = stopped
    expected = _resumed(run, state)
    del state["data"]
    with caplog.at_level(logging.WARNING):
        assert _resumed(run, state) == expected
    assert "does not say of which data it is" in caplog.text
