"""The `value` task judges hop samples on their own."""

import json

import pytest

from megatron_rb.data.ledger import Ledger
from megatron_rb.data.packing import Budget
from megatron_rb.tasks.sft import BatchRules
from megatron_rb.tasks.value import ValueEstimation


class NoSteps:
    def state_dict(self):
        return {}

    def close(self):
        pass


@pytest.fixture
def judge(runner, tmp_path):
    """What the task says of a data set."""

    def evaluate(evaluation):
        with Ledger(tmp_path / "ledger.jsonl") as ledger:
            task = ValueEstimation(runner, NoSteps(), evaluation, ledger, BatchRules(Budget(128, 256), True))
            try:
                return task, task.evaluate()
            finally:
                task.close()

    return evaluate


def test_hop_samples_have_a_loss_of_their_own(judge, data_of):
    evaluation = data_of()
    for number in (2, 7):
        evaluation.rows[number] = json.dumps({"hop": 0.5, "conversations": []}).encode()
    task, found = judge(evaluation)
    assert found == {"loss": found["loss"], **task.mean_loss("hop_loss", [2, 7])}
    assert found["hop_loss"] != found["loss"]


def test_without_a_hop_label_there_is_no_hop_loss_and_no_complaint(judge, data_of, caplog):
    assert judge(data_of())[1].keys() == {"loss"} and caplog.records == []


def test_the_loss_of_all_samples_is_that_of_fine_tuning(judge, data_of):
    task, found = judge(data_of())
    assert found == task.mean_loss("loss", range(10))


def test_without_held_out_samples_there_is_nothing_to_judge(judge):
    assert judge(None)[1] == {}
