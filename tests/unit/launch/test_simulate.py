"""Simulated faults."""

import pytest

from megatron_rb.launch.simulate import FaultFigures, simulate_ettr


def test_simulated_ratio_agrees_with_the_formula_and_falls_with_slower_notice():
    figures = FaultFigures(7.9 * 3600, 60.0, 180.0, 600.0, 0.0)
    expected = 1 - (60 + 180 + 300) / (7.9 * 3600)
    assert simulate_ettr(figures, days=3000) == pytest.approx(expected, abs=0.004)
    slow = FaultFigures(7.9 * 3600, 600.0, 720.0, 3600.0, 0.0)
    assert simulate_ettr(slow, days=3000) < 0.92
