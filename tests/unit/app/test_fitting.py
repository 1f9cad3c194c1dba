"""A run whose forecast is over the memory of its devices is refused with the recompute that makes it fit."""

import re

import pytest

from megatron_rb.app.fitting import check_fits
from megatron_rb.config.compose import load_config
from megatron_rb.config.derive import derive
from megatron_rb.shapes.published import shape_of

WITHOUT_RECOMPUTE = ["model.recompute.vision_per_slice=[]", "model.recompute.language_per_slice=[]"]


def check(*settings: str) -> None:
    config = load_config(["experiment=robobrain20_7b_stage2", *settings])
    shape = shape_of(config.model.hf_path, config.model.published)
    check_fits(config, derive(config, shape), shape)


def test_a_recipe_as_it_is_fits_its_devices():
    check()


def test_a_run_that_does_not_fit_names_the_stage_and_what_would_fit():
    with pytest.raises(ValueError, match=r"pipeline rank 0 would need \d+ GB of the 80 GB of a NVIDIA H100") as told:
        check(*WITHOUT_RECOMPUTE)
    check(*re.findall(r"model\.recompute\.\S+\]", str(told.value)))


def test_a_run_that_no_recompute_makes_fit_is_told_so():
    with pytest.raises(ValueError, match="no recompute makes it fit, so raise tp_size or pp_size"):
        check(*WITHOUT_RECOMPUTE, "planner.max_memory=30e9")


@pytest.mark.parametrize("way", ["planner.check_memory=false", "planner.max_memory=200e9"])
def test_a_run_starts_without_the_check_or_with_more_memory(way):
    check(*WITHOUT_RECOMPUTE, way)
