"""Settings of adapters: how they are written, and what is refused before anything starts."""

import pytest

from megatron_rb.config.adapters import check_adapters
from megatron_rb.config.compose import config_from_file, load_config, save_config

ONE = "model.adapters.lora={}"


@pytest.mark.parametrize(
    "words",
    [
        ["model.adapters={lora: {patterns: [q_proj, 'model.*.up_proj'], rank: 4}}"],
        ["model.adapters.lora.rank=4", "model.adapters.lora.patterns=[q_proj,model.*.up_proj]"],
        [ONE, "model.adapters.lora.rank=4", "model.adapters.lora.patterns=[q_proj,'model.*.up_proj']"],
    ],
)
def test_an_adapter_is_written_in_one_piece_or_setting_by_setting(words, tmp_path):
    config = load_config(words)
    adapter = config.model.adapters["lora"]
    assert (adapter.patterns, adapter.rank, adapter.alpha) == (["q_proj", "model.*.up_proj"], 4, 32.0)
    save_config(config, tmp_path / "config.yaml")
    assert config_from_file(tmp_path / "config.yaml") == config


def test_an_empty_mapping_takes_all_adapters_away():
    assert load_config([ONE, "model.adapters={}"]).model.adapters == {}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model.adapters.lora.rnk=4"], "no setting 'model.adapters.lora.rnk'; did you mean model.adapters.lora.rank"),
        (["model.adapters={lora: {rnk: 4}}"], "did you mean model.adapters.lora.rank"),
        (["model.adapters.lora.rank=four"], "model.adapters.lora.rank must be a whole number, got 'four'"),
        (["model.adapters={lora: 4}"], "model.adapters.lora must be a section of settings"),
    ],
)
def test_what_is_no_adapter_is_named(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_config(words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model.adapters.lora.rank=0"], "model.adapters.lora.rank is 0; it is at least 1"),
        (["model.adapters.lora.alpha=0"], "alpha is 0; it is above 0"),
        (["model.adapters.lora.dropout=1"], "dropout is 1; it is at least 0 and below 1"),
        (["model.adapters.lora.patterns=[]"], "patterns is empty"),
        (["model.adapters={'a b': {}}"], "'a b' is no name"),
        ([ONE, "model.freeze.vision=true"], "leave model.freeze alone"),
        ([ONE, "checkpoint.init=random"], "checkpoint.init is random"),
        (["model.train_in_full=[lm_head]"], "model.adapters is empty"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_adapters(load_config(words))
