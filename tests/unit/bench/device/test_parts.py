"""What a first look at a device takes for its steps."""

import json

import pytest

from megatron_rb.bench.device import parts
from megatron_rb.bench.device.parts import EVERY_LAYER, FROZEN_VISION, MERGER_ALONE, PARTS, rehearsal, smoke_settings
from megatron_rb.bench.device.workplace import Skipped, Workplace
from megatron_rb.tools.bench.device import NAMES


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
