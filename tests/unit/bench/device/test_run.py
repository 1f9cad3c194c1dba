"""A first look at a device goes on after what fails, keeps to its time, and leaves a folder that is whole."""

import json
import sys
import time
from pathlib import Path

import pytest

from megatron_rb.bench.device.parts import LookPart
from megatron_rb.bench.device.run import FirstLook, look, new_folder
from megatron_rb.bench.device.workplace import Skipped, Workplace

NOTHING = FirstLook("2026-01-01", False, {"device": "NVIDIA X"}, {"torch": "2.13"}, ())


@pytest.fixture
def place(tmp_path):
    (tmp_path / "out").mkdir()
    return Workplace(tmp_path / "out", tmp_path, True, "h200", 0, None)


def part(name: str, run, seconds: int = 30) -> LookPart:
    return LookPart(name, f"about {name}", seconds, run)


def sleeps(place: Workplace) -> dict:
    place.run(sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)")
    return {}


def fails(place: Workplace) -> dict:
    place.run(sys.executable, "-c", "print('one', flush=True); raise SystemExit('no such device')")
    return {}


def skips(place: Workplace) -> dict:
    raise Skipped("nothing is installed")


def works(place: Workplace) -> dict:
    return {"said": place.run(sys.executable, "-c", "print(6 * 7)").splitlines()[-1]}


def test_every_part_has_its_state_whatever_became_of_those_before(place):
    parts = [part("late", sleeps, 1), part("bad", fails), part("absent", skips), part("good", works)]
    found = look(parts, place, 60, NOTHING)
    states = {each.name: (each.state, each.why, each.figures) for each in found.outcomes}
    assert states["late"][:1] == ("out of time",)
    assert states["bad"] == ("failed", "ended with 1: one / no such device", {})
    assert states["absent"] == ("skipped", "nothing is installed", {})
    assert states["good"] == ("done", "", {"said": "42"})
    assert not found.sound


def test_what_is_done_or_has_nothing_to_do_is_sound(place):
    assert look([part("absent", skips), part("good", works)], place, 60, NOTHING).sound


def test_a_command_that_is_ended_leaves_no_process_and_its_words(place):
    start = time.monotonic()
    look([part("late", sleeps, 2)], place, 60, NOTHING)
    assert time.monotonic() - start < 20
    assert "begun" in (place.folder / "logs/late.log").read_text()
    running = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"'begun'" in _read(path)]
    assert running == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


def test_the_time_of_all_is_kept_and_what_was_not_reached_is_named(place):
    found = look([part("late", sleeps, 600), part("good", works)], place, 1, NOTHING)
    assert [each.state for each in found.outcomes] == ["out of time", "out of time"]
    assert found.outcomes[1].why == "the time was over before it began"


def test_the_folder_is_whole_after_every_part(place):
    seen = []
    look([part("good", works), part("absent", skips)], place, 60, NOTHING, lambda _: seen.append(_names(place.folder)))
    assert seen == [["good"], ["good", "absent"]]
    page = (place.folder / "README.md").read_text()
    assert "| good | about good | done |" in page and "# First look at NVIDIA X" in page


def _names(folder: Path) -> list[str]:
    return [each["name"] for each in json.loads((folder / "results.json").read_text())["outcomes"]]


def test_an_error_that_nobody_foresaw_is_told_and_keeps_no_other_part_from_running(place):
    found = look([part("odd", lambda _: next(iter(()))), part("good", works)], place, 60, NOTHING)
    assert [(each.state, each.why) for each in found.outcomes] == [("failed", "StopIteration()"), ("done", "")]


def test_the_measured_peak_stands_beside_the_rehearsed_one(place):
    parts = [part("smoke", lambda _: {"peak GiB": 66.0}), part("rehearsal", lambda _: {"rehearsed peak GiB": 60.0})]
    look(parts, place, 60, NOTHING)
    assert "66.0 GiB measured, 60.0 GiB rehearsed (+10.0%)" in (place.folder / "README.md").read_text()


def test_a_folder_with_something_in_it_is_not_written_over(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; name a new folder with --out"):
        new_folder(tmp_path)
