"""Measured block times correct nominal ones, and predictions say so."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_rb.planner.calibration import Calibration, Curve, load_calibration
from megatron_rb.planner.cost import Pricing, compute_seconds
from megatron_rb.planner.device import load_device
from megatron_rb.planner.report import mode_line
from megatron_rb.planner.search import plan
from megatron_rb.planner.trained import Frozen
from megatron_rb.planner.work import Part, Shards, forward_work, parameters
from tests.unit.planner.cases import task, tiny
from tests.unit.planner.test_work import one

CURVE = Curve((1e-3, 1e-2), (2e-3, 3e-2))


def calibration(**curves: Curve) -> Calibration:
    return Calibration(
        "a card", "bf16", "NVIDIA H200 SXM", {name.replace("_at_", "."): c for name, c in curves.items()}
    )


def test_measured_sizes_get_their_measured_time_and_others_lie_between():
    nominal = np.array([1e-4, 1e-3, 10**-2.5, 1e-2, 1.0])
    found = CURVE.factor(nominal) * nominal
    assert found[1] == pytest.approx(2e-3) and found[3] == pytest.approx(3e-2)
    assert found[2] / nominal[2] == pytest.approx(6**0.5)
    assert found[0] / nominal[0] == pytest.approx(2) and found[4] / nominal[4] == pytest.approx(3)


def test_only_measured_parts_are_corrected():
    model, batch = tiny(), one(512, 512 * 128, 1024, 1024 * 256, 256)
    pricing = Pricing(load_device("h200"), "bf16")
    double = replace(pricing, calibration=calibration(DECODER_at_forward=Curve((1.0,), (2.0,))))
    works, sizes = forward_work(model, Shards(1, False, 2), batch), parameters(model, 1)
    for part in (Part.DECODER, Part.MERGER):
        plain = compute_seconds(part, works[part], pricing, Frozen(), sizes[part])
        corrected = compute_seconds(part, works[part], double, Frozen(), sizes[part])
        assert corrected[0] == pytest.approx(plain[0] * (2 if part is Part.DECODER else 1))
        assert corrected[1] == pytest.approx(plain[1])


def test_prediction_says_what_it_is_made_of():
    work = task(tiny(), gpus=2)
    measured = replace(work, pricing=replace(work.pricing, calibration=calibration(DECODER_at_forward=CURVE)))
    assert plan(work)[0].mode == "nominal"
    assert plan(measured)[0].mode == "calibrated"
    assert mode_line(measured).startswith("calibrated prediction, not a measurement (block times measured on a card")


def test_calibration_comes_back_and_keeps_to_its_device(tmp_path: Path):
    calibration(DECODER_at_forward=CURVE).save(tmp_path / "blocks.json")
    again = load_calibration(tmp_path / "blocks.json")
    assert again.curves == {"DECODER.forward": CURVE}
    again.check("NVIDIA H200 SXM", "bf16")
    with pytest.raises(
        ValueError, match="the calibration is for 'NVIDIA H200 SXM' in bf16, the plan is for .* in fp32"
    ):
        again.check("NVIDIA H200 SXM", "fp32")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is no calibration"):
        load_calibration(tmp_path / "other.json")
