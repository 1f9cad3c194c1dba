"""Derived values: worked examples, and one sentence for every combination that cannot run."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from megatron_rb.config.compose import load_config
from megatron_rb.config.derive import check_tp_size, derive, derive_steps
from megatron_rb.config.schema import Config, DataConfig, ScheduleConfig


@dataclass(frozen=True)
class Vision:
    num_layers: int = 4
    num_heads: int = 16


@dataclass(frozen=True)
class Text:
    num_layers: int = 4
    num_heads: int = 16
    num_query_groups: int = 2
    ffn_hidden_size: int = 11008
    vocab_size: int = 151936


@dataclass(frozen=True)
class Model:
    vision: Vision = field(default_factory=Vision)
    text: Text = field(default_factory=Text)


MODEL = Model()


def config_with(*overrides: str) -> Config:
    return load_config(["model.hf_path=hf", *overrides])


def test_the_rest_of_the_world_is_data_parallel():
    derived = derive(config_with("parallel=tp2_pp2", "world_size=16"), MODEL)
    assert (derived.world_size, derived.dp_size, derived.processes_per_node) == (16, 4, 16)


def test_without_a_world_size_one_model_is_started():
    assert derive(config_with("parallel=tp2_pp2"), MODEL).world_size == 4
    assert derive(config_with("parallel=tp2_pp2", "parallel.cp_size=2"), MODEL).world_size == 8


def test_context_parallel_ranks_are_no_data_parallel_ones():
    words = ["parallel=tp2_pp2", "parallel.cp_size=4", "world_size=32", "data.global_batch_size=2"]
    derived = derive(config_with(*words, "parallel.sequence_parallel=true"), MODEL)
    assert (derived.cp_size, derived.dp_size, derived.token_multiple) == (4, 2, 8)
    assert derive(config_with("parallel.cp_size=4"), MODEL).token_multiple == 8


def test_processes_per_node_gives_the_world_size():
    assert derive(config_with("cluster.num_nodes=2", "cluster.processes_per_node=4"), MODEL).world_size == 8


def test_folders_follow_the_run():
    derived = derive(config_with("name=x"), MODEL)
    assert (derived.run_dir, derived.checkpoint_dir) == (Path("runs/x"), Path("runs/x/checkpoints"))
    assert (derived.init, derived.tokenizer) == ("hf", "hf")


def test_interleaved_pipelines_need_a_multiple_of_micro_batches():
    layout = "parallel.layout=P v*4 | M E t | t*2 | t L"
    assert derive(config_with("parallel.pp_size=2", layout), MODEL).micro_batch_multiple == 2
    assert derive(config_with("parallel.pp_size=4", layout), MODEL).micro_batch_multiple == 1


def test_sequence_parallel_is_nothing_at_tp_1():
    assert not derive(config_with("parallel.sequence_parallel=true"), MODEL).sequence_parallel


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tp_size=4"], r"tp_size 4 does not divide num_query_groups 2; use 1 or 2"),
        (
            ["parallel=tp2_pp2", "world_size=6"],
            r"world_size 6 is not a multiple of tp_size 2 x pp_size 2 = 4; use 4 or 8",
        ),
        (["parallel=tp2_pp2", "world_size=2"], r"world_size 2 is not a multiple .* use 4 processes"),
        (["parallel.pp_size=3", "parallel.layout=P v*4 M E | t*4 L"], r"2 slices, which pp_size 3 does not divide"),
        (["parallel.layout=P v*5 M E t*4 L"], r"vision layer"),
        (["parallel.pp_size=13"], r"pp_size 13 is more than the 12 blocks"),
        (["world_size=8", "data.global_batch_size=4"], r"global_batch_size 4 .* 8 data-parallel ranks"),
        (["world_size=4", "data.global_micro_batches=6"], r"micro_batches 6 .* 4 data-parallel ranks; use 4 or 8"),
        (["parallel=tp2", "data.seq_length=1001"], r"seq_length 1001 is not a multiple of tp_size 2.* use 1000"),
        (
            ["parallel.cp_size=2", "parallel.pp_size=3", "world_size=9"],
            r"tp_size 1 x pp_size 3 x cp_size 2 = 6; use 6 or 12",
        ),
        (["parallel.cp_size=0"], r"cp_size is 0; it must be at least 1"),
        (["parallel.cp_size=4", "data.seq_length=1001"], r"seq_length 1001 .* multiple of 8, as cp_size 4 .* use 1000"),
        (["parallel.cp_size=2", "metrics.capture.every=5"], r"capture.every 5 with cp_size 2: .* use cp_size 1"),
        (["data.min_pixels=9", "data.max_pixels=4"], r"min_pixels 9 is above max_pixels 4"),
        (["world_size=3", "cluster.num_nodes=2"], r"3 processes .* 2 nodes"),
        (["world_size=4", "cluster.processes_per_node=3"], r"processes_per_node 3 is 3, the world has 4"),
    ],
)
def test_what_does_not_fit_is_said_in_numbers(overrides: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        derive(config_with(*overrides), MODEL)


def test_started_processes_must_match_the_config():
    with pytest.raises(ValueError, match="4 processes were started, the config asks for world_size 8"):
        derive(config_with("world_size=8"), MODEL, world_size=4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (replace(MODEL, vision=Vision(num_heads=2), text=Text(num_query_groups=8)), "vision num_heads 2"),
        (replace(MODEL, text=Text(num_query_groups=8, num_heads=20)), "num_attention_heads 20"),
        (replace(MODEL, text=Text(num_query_groups=8, ffn_hidden_size=18)), "text ffn_hidden_size 18"),
        (replace(MODEL, text=Text(num_query_groups=8, vocab_size=30)), "vocab_size 30"),
    ],
)
def test_every_size_that_tp_cuts_is_checked(model: Model, message: str):
    with pytest.raises(ValueError, match=f"tp_size 8 does not divide {message}"):
        check_tp_size(8, model)


def test_one_epoch_reaches_every_sample():
    assert derive_steps(ScheduleConfig(epochs=1), DataConfig(global_batch_size=8), 81, 1000) == 11


def test_train_steps_win_over_epochs():
    assert derive_steps(ScheduleConfig(train_steps=5, epochs=3), DataConfig(global_batch_size=8), 80, 1000) == 5


def test_epochs_of_filled_micro_batches_have_no_fixed_number_of_steps():
    data = DataConfig(global_micro_batches=4, seq_length=100)
    with pytest.raises(ValueError, match=r"set schedule.train_steps \(at least 5, going by 2000 tokens"):
        derive_steps(ScheduleConfig(), data, 80, 2000)
    assert derive_steps(ScheduleConfig(train_steps=9), data, 80, 2000) == 9


def test_published_step_counts_follow_from_the_samples():
    assert derive_steps(ScheduleConfig(), DataConfig(global_batch_size=256), 18_994 * 256, 10**9) == 18_994


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="no usable training sample"):
        derive_steps(ScheduleConfig(train_steps=5), DataConfig(global_batch_size=8), 0, 0)
