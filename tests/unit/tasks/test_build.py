"""The task of a run is what its settings say."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_rb.config.derive import Derived
from megatron_rb.config.schema import Config
from megatron_rb.data.ledger import Ledger
from megatron_rb.data.packing import Budget
from megatron_rb.data.padding import Size
from megatron_rb.layout.mesh import RankGrid
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.tasks.build import TASKS, TaskData, build_loader, build_task
from megatron_rb.tasks.sft import SupervisedFineTuning
from megatron_rb.tasks.value import ValueEstimation
from megatron_rb.train.step import Runner


@pytest.fixture
def config():
    config = Config()
    config.data.seq_length, config.data.max_patches = 96, 256
    config.data.global_batch_size, config.data.prefetch_steps, config.data.decode_threads = 4, 1, 1
    config.data.shuffle = False
    return config


def derived(**changes) -> Derived:
    sizes = {"world_size": 1, "tp_size": 1, "pp_size": 1, "cp_size": 1, "dp_size": 1, "processes_per_node": 1}
    rest = {"layout": None, "micro_batch_multiple": 1, "sequence_parallel": False, "token_multiple": 1}
    paths = {"run_dir": None, "checkpoint_dir": None, "init": "random", "tokenizer": ""}
    return Derived(**(sizes | rest | paths | changes))


class Device(CpuPlatform):
    """A platform of this name that copies from page-locked memory."""

    def __init__(self, name: str = "cuda") -> None:
        self.name = name

    def _offers(self, capability: str) -> bool:
        return capability == "pinned_memory"


def runner_of(runner, platform=None, needs_pixels: bool = True) -> Runner:
    """The runner on another platform, with chunks that hold the patch embedding or not."""
    session = replace(runner.session, platform=platform or CpuPlatform())
    chunks = [
        SimpleNamespace(module=SimpleNamespace(part=SimpleNamespace(needs_pixels=n))) for n in (False, needs_pixels)
    ]
    return Runner(chunks, session)


@pytest.fixture
def build(runner, data_of, tmp_path):
    """Builds a task, and closes it behind the test."""
    made = []
    ledger = Ledger(tmp_path / "ledger.jsonl")

    def task(config, *, derived=derived(), **options):
        data = TaskData(data_of(), None, ledger)
        made.append(build_task(config, derived, runner_of(runner, **options), data))
        return made[-1]

    yield task
    for each in made:
        each.close()
    ledger.close()


@pytest.mark.parametrize(("name", "kind"), [("sft", SupervisedFineTuning), ("value", ValueEstimation)])
def test_a_task_is_taken_by_its_name(build, config, name, kind):
    config.task.name = name
    assert TASKS[name] is kind and type(build(config)) is kind


def test_a_task_that_is_not_known_is_refused(build, config):
    config.task.name = "dpo"
    with pytest.raises(ValueError, match="task.name 'dpo' is not known; use sft or value"):
        build(config)


@pytest.mark.parametrize("needs_pixels", [True, False])
def test_pictures_are_opened_where_some_chunk_holds_the_patch_embedding(build, config, needs_pixels):
    task = build(config, needs_pixels=needs_pixels)
    assert task.rules.needs_pixels is needs_pixels
    [samples] = task.loader.next_step().micro_batches[:1]
    assert (samples[0].pixels is not None) is needs_pixels


def test_rules_are_those_of_the_settings(build, config):
    task = build(config, derived=derived(micro_batch_multiple=2, sequence_parallel=True))
    rules = task.rules
    assert (rules.budget, rules.multiple, rules.sequence_parallel) == (Budget(96, 256), 2, True)
    assert len(task.loader.next_step().micro_batches) % 2 == 0


@pytest.mark.parametrize(
    ("platform", "padding", "padded"),
    [
        ("cpu", "auto", False),
        ("cuda", "auto", True),
        ("musa", "auto", True),
        ("cpu", "buckets", True),
        ("cuda", "none", False),
    ],
)
def test_batches_are_padded_where_memory_is_cached_or_it_is_asked_for(build, config, platform, padding, padded):
    config.data.padding = padding
    assert (build(config, platform=Device(platform)).rules.padding is not None) is padded


def test_a_padding_that_is_not_known_is_refused(build, config):
    config.data.padding = "most"
    with pytest.raises(ValueError, match="data.padding is 'most'; use auto, buckets or none"):
        build(config)


def test_batches_are_pinned_where_the_platform_can(build, config):
    assert build(config, platform=Device()).rules.pin_memory
    assert not build(config).rules.pin_memory


@pytest.mark.parametrize(
    ("changes", "multiple"),
    [
        ({}, Size(1, 4)),
        ({"cp_size": 3, "token_multiple": 6}, Size(6, 12)),
        ({"tp_size": 2, "token_multiple": 1}, Size(1, 4)),
        ({"tp_size": 2, "cp_size": 2, "token_multiple": 4, "sequence_parallel": True}, Size(4, 16)),
    ],
)
def test_padded_rows_can_be_shared_by_the_ranks_that_share_them(build, config, changes, multiple):
    config.data.padding = "buckets"
    for size in (Size(1, 1), Size(50, 90), Size(96, 256)):
        padded = build(config, derived=derived(**changes)).rules.padding.bucket(size)
        assert padded.tokens % multiple.tokens == 0 and padded.patches % multiple.patches == 0
        assert padded.tokens >= size.tokens and padded.patches >= size.patches


def test_data_parallel_ranks_read_different_samples_and_together_all(config, data_of, tmp_path):
    read = []
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        for rank in range(2):
            mesh = Mesh(RankGrid(dp_size=2), rank)
            loader = build_loader(
                config, derived(dp_size=2), mesh, TaskData(data_of(), None, ledger), needs_pixels=False
            )
            step = loader.next_step()
            loader.close()
            read.append([sample.input_ids.tobytes() for samples in step.micro_batches for sample in samples])
    assert len(read[0]) + len(read[1]) == 4 == len({*read[0], *read[1]})
