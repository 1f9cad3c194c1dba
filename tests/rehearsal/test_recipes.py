"""Every recipe of conf/experiment on each of its devices: it fits, every message meets its other side, and the
planner's forecast is what the rehearsal counts."""

import pytest

from megatron_rb.app.forecast import stage_forecast
from megatron_rb.config.compose import load_config
from megatron_rb.config.derive import derive
from megatron_rb.planner.device import load_device
from megatron_rb.rehearsal.recipes import page, recipes, rehearse_recipes
from megatron_rb.shapes.published import shape_of

HEADROOM = 0.1
MICRO_BATCHES = 2
ON_CUDA = ("h100", "h200")
"""On others megatron-core's embedding over several tensor-parallel ranks waits for the device."""


def different() -> list[str]:
    """Recipes that are not like another one in what a rehearsal sees."""
    seen, names = set(), []
    for name in recipes():
        config = load_config([f"experiment={name}"])
        key = (
            shape_of(config.model.hf_path, config.model.published),
            config.parallel.layout,
            config.data.seq_length,
            str(config.model.recompute),
            str(config.model.adapters),
            str(config.model.freeze),
        )
        if key not in seen:
            seen.add(key)
            names.append(name)
    return names


def cases() -> list[tuple[str, str]]:
    """Recipe and device."""
    return [(name, device) for name in different() for device in load_config([f"experiment={name}"]).recipe.devices]


@pytest.fixture(scope="module")
def summaries(tmp_path_factory):
    """One rank per stage of one copy of the model on each of its kinds of device, both budgets full."""
    folder = tmp_path_factory.mktemp("recipes")
    found = rehearse_recipes(different(), folder, published=False, micro_batches=MICRO_BATCHES)
    return dict(zip(cases(), found, strict=True))


def test_recipes_that_are_rehearsed_once_for_another_differ_in_nothing_that_counts():
    assert {name.rpartition("_")[0] for name in different()} == {name.rpartition("_")[0] for name in recipes()}
    assert len(different()) >= 16


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "device"), cases())
def test_a_recipe_fits_and_its_messages_meet(name, device, summaries):
    summary, config = summaries[name, device], load_config([f"experiment={name}"])
    assert summary.defects == []
    assert summary.largest_batch == (config.data.seq_length, config.data.max_patches)
    for stage in summary.stages:
        assert stage.headroom >= HEADROOM, stage
        if device in ON_CUDA:
            assert sum(count for _, _, count in stage.waits) <= 2, stage.waits


@pytest.mark.parametrize(("name", "device"), cases())
def test_the_forecast_is_what_the_rehearsal_counts(name, device, summaries):
    config = load_config([f"experiment={name}"])
    shape = shape_of(config.model.hf_path, config.model.published)
    platform = load_device(device).platform
    stages = stage_forecast(config, derive(config, shape), shape, platform, 0.0, MICRO_BATCHES)
    for stage, found in zip(stages, summaries[name, device].stages, strict=True):
        assert stage.total - stage.reserve == pytest.approx(found.peak_bytes, rel=0.05), found.pp_rank


def test_the_table_has_a_line_for_every_stage_and_names_no_defect(summaries):
    text = page(list(summaries.values()))
    rows = [line for line in text.splitlines() if line.startswith(("| robobrain", "| finetune_"))]
    assert len(rows) == sum(len(summary.stages) for summary in summaries.values())
    assert "No defect was found." in text and "NVIDIA H100 SXM" in text and "MTT S5000" in text
