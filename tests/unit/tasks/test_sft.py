"""The `sft` task: what becomes of samples that cannot be read, of steps that are padded, and how a model is judged."""

import logging
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_rb.data.ledger import Ledger, read_ledger
from megatron_rb.data.packing import Budget
from megatron_rb.data.padding import PaddingPolicy, Size
from megatron_rb.models.inputs import IGNORED, build_micro_batch, to_device
from megatron_rb.models.language.blocks import HeadOutput
from megatron_rb.shapes.shape import load_shape
from megatron_rb.tasks import sft
from tests.parity.tiny_models import write_model


class Loader:
    """Steps of one micro-batch without samples, said to be of these sizes."""

    def __init__(self, sizes):
        self.sizes = iter(sizes)

    def next_step(self):
        return SimpleNamespace(sizes=[next(self.sizes, Size(1, 4))], micro_batches=[[]], failed=(), epoch=0)

    def state_dict(self):
        return {}

    def note(self, step):
        pass

    def close(self):
        pass


@pytest.fixture
def shape(tmp_path):
    return load_shape(write_model(tmp_path / "hf", "qwen3_vl", seed=0))


def test_steps_are_padded_and_memory_starts_anew_before_one_that_outgrows_all(shape, monkeypatch):
    monkeypatch.setattr(sft, "replica_group_gloo", lambda mesh: None)
    calls, sizes = [], []
    task = sft.SupervisedFineTuning(
        SimpleNamespace(shape=shape, mesh=SimpleNamespace(tp_rank=0, tp_size=1, cp_rank=0, cp_size=1)),
        Loader([Size(10, 8), Size(10, 8), Size(70, 8), Size(10, 8)]),
        None,
        None,
        sft.BatchRules(
            Budget(512, 512),
            needs_pixels=True,
            padding=PaddingPolicy(Size(64, 64), Size(1, 4), num_buckets=4),
            outgrown=lambda plan: calls.append((len(sizes), plan.outgrown)),
        ),
    )
    for _ in range(4):
        (batch,) = task.next_step().micro_batches
        sizes.append((batch.text.num_tokens, batch.vision.num_patches))
    task.close()
    assert sizes == [(64, 64), (16, 16), (70, 64), (18, 16)]
    assert calls == [(2, Size(64, 64))]


class StepsOf:
    """A loader of endless steps with the same two micro-batches, some of whose samples could not be read."""

    def __init__(self, samples, failed=()):
        self.samples, self.failed = samples, failed
        self.steps = 0
        self.noted = []

    def next_step(self):
        self.steps += 1
        micro_batches = [deepcopy(list(self.samples[:2])), deepcopy(list(self.samples[2:4]))]
        failed = [SimpleNamespace(micro_batch=batch, place=place) for batch, place in self.failed]
        return SimpleNamespace(sizes=[], micro_batches=micro_batches, failed=failed, epoch=self.steps)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]

    def note(self, step):
        self.noted.append(step.epoch)

    def close(self):
        pass


@pytest.fixture
def task_of(runner, tmp_path):
    """Builds the task; it is closed behind the test."""
    made = []

    def build(loader=None, evaluation=None, needs_pixels=True, budget=Budget(128, 256), padding=None):
        rules = sft.BatchRules(budget, needs_pixels=needs_pixels, padding=padding)
        ledger = Ledger(tmp_path / "ledger.jsonl")
        made.append(sft.SupervisedFineTuning(runner, loader or StepsOf([]), evaluation, ledger, rules))
        return made[-1]

    yield build
    for task in made:
        task.close()
        task.ledger.close()


def labels_of(samples) -> int:
    return sum(int((sample.labels[1:] != IGNORED).sum()) for sample in samples)


@pytest.mark.parametrize("failed", [(), ((0, 1),), ((1, 0), (1, 1))])
def test_of_samples_that_could_not_be_read_no_label_is_learned(task_of, samples, failed):
    step = task_of(StepsOf(samples, failed)).next_step()
    kept = [[s for p, s in enumerate(samples[2 * b : 2 * b + 2]) if (b, p) not in failed] for b in range(2)]
    assert [batch.num_labels for batch in step.micro_batches] == [labels_of(part) for part in kept]
    whole = [[sample.sample_id for sample in samples[2 * b : 2 * b + 2]] for b in range(2)]
    assert [list(batch.sample_ids) for batch in step.micro_batches] == whole


def test_the_state_is_that_behind_the_step_handed_out_though_the_next_is_packed_already(task_of, samples):
    task = task_of(loader := StepsOf(samples))
    assert task.state_dict() == {"steps": 0}
    task.next_step()
    assert task.next_step().epoch == 2 and task.state_dict() == {"steps": 2} and loader.noted == [1, 2]


def test_a_state_that_is_loaded_goes_on_behind_its_step(task_of, samples):
    task = task_of(StepsOf(samples))
    task.next_step()
    task.load_state_dict({"steps": 7})
    assert task.state_dict() == {"steps": 7} and task.next_step().epoch == 8


def test_a_state_that_is_loaded_begins_with_the_largest_size_again(task_of, samples):
    padding = PaddingPolicy(Size(96, 256), Size(1, 4), num_buckets=4)
    loader = StepsOf(samples[:1])
    task = task_of(loader, padding=padding)
    step = loader.next_step

    def sized():
        return SimpleNamespace(**(vars(step()) | {"sizes": [Size(20, 16)], "micro_batches": [[]]}))

    loader.next_step = sized
    tokens = [task.next_step().micro_batches[0].text.num_tokens for _ in range(2)]
    task.load_state_dict({"steps": 0})
    assert tokens == [96, 24] and task.next_step().micro_batches[0].text.num_tokens == 96


def test_an_error_while_packing_reaches_the_caller(task_of, samples):
    loader = StepsOf(samples)

    def fail():
        raise ValueError("the data file has changed")

    loader.next_step = fail
    with pytest.raises(ValueError, match="the data file has changed"):
        task_of(loader).next_step()


def mean_loss(runner, samples) -> float:
    """Cross entropy per label, one sample after the other."""
    total, stage = 0.0, runner.chunks[0]
    for sample in samples:
        batch = build_micro_batch([sample], runner.shape, tp_rank=0, tp_size=1, sequence_parallel=False)
        with torch.no_grad():
            logits = stage(to_device(batch, runner.shape, torch.device("cpu")), HeadOutput.LABEL_LOGITS)
        total += float(F.cross_entropy(logits, batch.text.labels, reduction="sum"))
    return total / labels_of(samples)


@pytest.mark.parametrize("step", [3, 64])
@pytest.mark.parametrize("padding", [None, PaddingPolicy(Size(128, 256), Size(1, 4), num_buckets=2)])
def test_the_model_is_judged_by_its_mean_loss_over_all_labels(
    task_of, runner, samples, data_of, monkeypatch, step, padding
):
    """Not by the mean of means, and however the held-out samples are packed."""
    monkeypatch.setattr(sft, "EVALUATION_STEP", step)
    found = task_of(evaluation=data_of(), padding=padding).evaluate()
    assert found == {"loss": pytest.approx(mean_loss(runner, samples), rel=1e-5)}


def test_a_held_out_sample_that_cannot_be_read_counts_for_nothing_and_is_named(task_of, runner, samples, data_of):
    task = task_of(evaluation=data_of(missing=[0, 5]))
    found = task.evaluate()
    rest = [sample for number, sample in enumerate(samples) if number not in (0, 5)]
    assert found == {"loss": pytest.approx(mean_loss(runner, rest), rel=1e-5)}
    records = read_ledger(task.ledger.path)
    assert sorted((record["kind"], record["source"], record["line"]) for record in records) == [
        ("unreadable", "rows.jsonl", 1),
        ("unreadable", "rows.jsonl", 6),
    ]


def test_when_no_held_out_sample_can_be_read_there_is_no_loss_and_a_line_in_the_log(task_of, data_of, caplog):
    task = task_of(evaluation=data_of(missing=range(10)))
    with caplog.at_level(logging.WARNING):
        assert task.evaluate() == {}
    assert f"no loss: none of the 10 held-out samples could be read; {task.ledger.path} names" in caplog.text


def test_without_held_out_samples_there_is_nothing_to_judge(task_of):
    assert task_of().evaluate() == {}


def test_a_rank_without_the_patch_embedding_opens_no_picture(task_of, data_of):
    evaluation = data_of()
    batches = task_of(evaluation=evaluation, needs_pixels=False)._evaluation_batches(range(10))
    assert {with_pixels for _, with_pixels in evaluation.read} == {False}
    assert all(batch.vision.pixels is None for batch in batches)
