"""Every recipe loads strictly and cuts the model that it names."""

import re
from dataclasses import dataclass

import pytest

from megatron_rb.config.compose import group_choices, load_config
from megatron_rb.config.derive import derive
from megatron_rb.layout import parse_layout


@dataclass(frozen=True)
class Vision:
    num_layers: int
    num_heads: int


@dataclass(frozen=True)
class Text:
    num_layers: int
    num_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int


@dataclass(frozen=True)
class Model:
    vision: Vision
    text: Text


# From the config.json of Qwen2.5-VL and Qwen3-VL, which RoboBrain 2.0 and 2.5 share.
MODELS = {
    "robobrain20_3b": Model(Vision(32, 16), Text(36, 16, 2, 11008, 151936)),
    "robobrain20_7b": Model(Vision(32, 16), Text(28, 28, 4, 18944, 152064)),
    "robobrain20_32b": Model(Vision(32, 16), Text(64, 40, 8, 27648, 152064)),
    "robobrain25_4b": Model(Vision(24, 16), Text(36, 32, 8, 9728, 151936)),
    "robobrain25_8b": Model(Vision(27, 16), Text(36, 32, 8, 12288, 151936)),
}
RECIPES = [name for name in group_choices("experiment") if name.startswith("robobrain")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_fits_its_model(recipe: str):
    config = load_config([f"experiment={recipe}"])
    derived = derive(config, MODELS[recipe.rsplit("_", 1)[0]], world_size=128)
    assert derived.layout is not None
    assert str(derived.layout) == config.parallel.layout
    assert config.name == recipe


def test_every_model_and_stage_has_a_recipe():
    stages = {"robobrain20": ("stage1", "stage2", "cot"), "robobrain25": ("stage1", "stage2")}
    wanted = {f"{model}_{stage}" for model in MODELS for stage in stages[model.split("_")[0]]}
    assert set(RECIPES) == wanted
    assert set(group_choices("model")) == set(MODELS)


@pytest.mark.parametrize("model", ["20_3b", "20_7b", "25_4b", "25_8b"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_smaller_model_has_recipes_for_own_rows(model: str, kind: str):
    config = load_config([f"experiment=finetune_{model}_{kind}"])
    derived = derive(config, MODELS[f"robobrain{model}"], world_size=8)
    assert config.name == f"finetune_{model}_{kind}" and config.data.train == []
    assert bool(config.model.adapters) == (kind == "lora") and derived.init == config.model.hf_path
    assert config.recipe.devices == (["rtx4090"] if kind == "lora" else ["h100"])
    assert config.data.seq_length >= 4096 and config.data.max_patches >= 8192


def test_second_stage_starts_from_the_first():
    for recipe in RECIPES:
        if recipe.endswith("stage2"):
            assert (
                load_config([f"experiment={recipe}"]).model.hf_path == f"runs/{recipe.replace('stage2', 'stage1')}/hf"
            )


def test_demo_layout_is_well_formed_and_splits_the_vit():
    config = load_config(["experiment=demo"])
    text = config.parallel.layout
    counts = [sum(int(n or 1) for n in re.findall(rf"\b{letter}(?:\*(\d+))?", text)) for letter in "vt"]
    layout = parse_layout(text, counts[0], counts[1], config.parallel.pp_size)
    assert layout.num_slices % config.parallel.pp_size == 0
    assert (config.parallel.tp_size, config.parallel.pp_size) == (2, 2)


@pytest.mark.parametrize(
    "group", ["model", "parallel", "platform", "data", "optimizer", "schedule", "checkpoint", "metrics"]
)
def test_every_choice_of_every_group_loads(group: str):
    for name in group_choices(group):
        assert load_config([f"{group}={name}"])
