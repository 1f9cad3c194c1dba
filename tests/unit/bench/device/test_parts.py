"""What a first look at a device takes for its steps."""

import json

import pytest

from megatron_rb.bench.device import parts
from megatron_rb.bench.device.parts import EVERY_LAYER, FROZEN_VISION, MERGER_ALONE, PARTS, rehearsal, smoke_settings
from megatron_rb.bench.device.workplace import PartFailed, Skipped, Workplace
from megatron_rb.tools.bench.device import NAMES, main


def place_with(folder, memory: float, on_device: bool = True) -> Workplace:
    return Workplace(folder, folder, on_device, "h200", int(memory), folder)


def test_all_parts_together_end_within_ten_minutes_but_for_a_reserve():
    assert sum(part.seconds for part in PARTS) <= 700
    assert sum(part.seconds for part in PARTS if part.name not in ("smoke-te", "rehearsal")) <= 600


def test_the_command_names_every_part():
    assert tuple(part.name for part in PARTS) == NAMES


@pytest.mark.parametrize(
    ("memory", "words"),
    [(200e9, ()), (141e9, EVERY_LAYER[:1]), (80e9, FROZEN_VISION), (24e9, MERGER_ALONE)],
    ids=["200 GB", "H200", "H100", "24 GB"],
)
def test_a_smaller_device_gets_steps_that_take_less(memory, words, tmp_path):
    assert smoke_settings(place_with(tmp_path, memory))[2:] == words


def test_the_peak_that_a_checkout_keeps_is_taken_where_the_settings_are_the_same(tmp_path, monkeypatch):
    place = place_with(tmp_path, 141e9)
    (tmp_path / "benchmarks/device").mkdir(parents=True)
    kept = {"settings": list(smoke_settings(place)), "stages": [{"peak_bytes": 3 * 2**30}]}
    (tmp_path / "benchmarks/device/rehearsed-h200.json").write_text(json.dumps(kept))
    assert rehearsal(place) == {"rehearsed peak GiB": 3.0}
    monkeypatch.setattr(parts, "rehearse_smoke", lambda place, out: 5 * 2**30)
    assert rehearsal(place_with(tmp_path, 80e9)) == {"rehearsed peak GiB": 5.0}


def test_transformer_engine_is_not_looked_for_where_it_is_not(tmp_path):
    with pytest.raises(Skipped, match="transformer_engine is not installed"):
        parts.smoke_with_transformer_engine(place_with(tmp_path, 141e9))


def test_losses_that_differ_after_a_resume_are_a_failure(tmp_path, monkeypatch):
    place = place_with(tmp_path, 141e9)
    (tmp_path / "whole/checkpoints/step_00000003").mkdir(parents=True)
    monkeypatch.setattr(Workplace, "rb", lambda place, *words: "")
    monkeypatch.setattr(parts, "_losses", lambda run: [1.0, 2.0, 3.0] if run.name == "whole" else [1.0, 2.0, 4.0])
    with pytest.raises(
        PartFailed, match=r"the losses differ: \[1.0, 2.0, 3.0\] in one piece, \[1.0, 2.0, 4.0\] continued"
    ):
        parts.resume(place)


@pytest.mark.parametrize("more", [["--dry"], ["--parts", "smoke"], ["--out", "folder"]])
def test_a_rehearsal_alone_takes_no_other_choice(more):
    with pytest.raises(ValueError, match="--rehearse runs no part and writes its FILE alone"):
        main(["--rehearse", "file.json", *more])
