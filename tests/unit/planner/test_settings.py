"""A plan as a settings file: `rb launch ... settings=FILE` composes it as it is."""

from pathlib import Path

import pytest

from megatron_rb.config.compose import load_config
from megatron_rb.config.derive import derive
from megatron_rb.planner.device import load_device, with_memory
from megatron_rb.planner.report import settings_text
from megatron_rb.planner.search import plan
from tests.unit.planner.cases import published, task


@pytest.fixture(scope="module")
def planned():
    device = with_memory(load_device("h200"), 38e9)
    work = task(published("RoboBrain2.0-32B"), gpus=64, device=device, pp=4, tp=8, seq_length=8192, max_patches=32768)
    return work, plan(work)[0]


def test_plan_composes_over_a_recipe(planned, tmp_path: Path):
    work, best = planned
    (tmp_path / "plan.yaml").write_text(settings_text(work, best))
    config = load_config(["experiment=robobrain20_32b_cot", f"settings={tmp_path / 'plan.yaml'}"])
    derived = derive(config, work.model)
    assert derived.layout == best.layout
    assert (derived.world_size, derived.tp_size, derived.pp_size) == (64, 8, 4)
    assert config.data.seq_length == 8192 * best.degrees.micro_batch
    recompute = config.model.recompute
    assert (recompute.vision, recompute.language) == (0, 0)  # the recipe has 16 and 0
    assert any(item.vision or item.language for item in best.recompute)
    assert recompute.vision_per_slice in ([], [item.vision for item in best.recompute])
    assert recompute.language_per_slice in ([], [item.language for item in best.recompute])


def test_later_words_win_over_the_file(planned, tmp_path: Path):
    (tmp_path / "plan.yaml").write_text(settings_text(*planned))
    config = load_config([f"settings={tmp_path / 'plan.yaml'}", "parallel.sequence_parallel=false"])
    assert not config.parallel.sequence_parallel


def test_file_with_an_unknown_setting_is_named(tmp_path: Path):
    (tmp_path / "plan.yaml").write_text("parallel: {tp_sizes: 4}")
    with pytest.raises(ValueError, match="plan.yaml: there is no setting 'parallel.tp_sizes'; did you mean"):
        load_config([f"settings={tmp_path / 'plan.yaml'}"])


def test_recompute_needs_a_number_for_every_slice(planned):
    work, _ = planned
    config = load_config(["parallel.pp_size=2", "model.recompute.vision_per_slice=[1]"])
    with pytest.raises(ValueError, match="vision_per_slice has 1 entries, the layout has 2 slices"):
        derive(config, work.model)
