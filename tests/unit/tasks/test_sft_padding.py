"""What the task does with the sizes that micro-batches are padded to."""

from types import SimpleNamespace

import pytest

from megatron_rb.data.packing import Budget
from megatron_rb.data.padding import PaddingPolicy, Size
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
