"""Checkpoints of two processes: exact resume, other layouts, retention, refusals and killed runs."""

import json

import pytest

from tests.distributed.world import run_world

CASES = "tests.distributed.cases_checkpoint"
PRECISIONS = ("fp32", "bf16")
OPTIMIZERS = ("distributed", "replicated")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return run_world(f"{CASES}:everything", world_size=2, timeout=400, folder=str(folder))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_continues_bit_for_bit(ranks, precision, optimizer):
    for rank in ranks:
        case = rank[f"exact-{precision}-{optimizer}"]
        assert case["same_layout"]
        assert case["resumed"] == case["straight"]
        assert case["moments_equal"] and case["draws_equal"] and case["learning_rates_equal"]
        assert set(case["steps"]) == {6}
        assert case["processes_left"] == []


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_another_layout_has_the_same_losses(ranks, precision, optimizer):
    # In bf16 a tensor-parallel product is summed in another order.
    tolerance = {"fp32": 1e-5, "bf16": 2e-3}[precision]
    case = ranks[0][f"reshard-{precision}-{optimizer}"]
    assert not case["same_layout"]
    assert case["resharded"] == pytest.approx(case["straight"][:2], abs=tolerance)
    assert case["back"] == pytest.approx(case["straight"][1:], abs=tolerance)


def test_distributed_and_replicated_optimizer_train_alike(ranks):
    for precision in PRECISIONS:
        distributed, replicated = (ranks[0][f"reshard-{precision}-{kind}"]["straight"] for kind in OPTIMIZERS)
        assert distributed == pytest.approx(replicated, abs=1e-6)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("empty", "there is no complete checkpoint in"),
        ("absent_step", "no complete checkpoint of step 7"),
        ("other_model", "another model: hidden_size is 8 there and 16 here"),
        ("weights_of_other_model", "another model: hidden_size is 8 there and 16 here"),
        ("newly_trained", "it lacks optimizer.state.exp_avg.vision.patch.weight"),
        ("unwritable", "Not a directory"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(ranks, case, words):
    for rank in ranks:
        assert words in rank["refusals"][case]


def test_weights_alone_can_be_loaded(ranks):
    assert ranks[0]["refusals"]["weights_only"] == "True"


def test_the_newest_stay_and_leftovers_go(ranks):
    assert ranks[0]["retention"]["names"] == ["notes", "step_00000004", "step_00000005"]
    assert ranks[0]["retention"]["latest"] == 5


def test_a_checkpoint_that_gave_finite_losses_outlives_those_not_known_to(ranks):
    names = ranks[0]["retention_of_the_proven"]
    assert names["one is proven by nobody"] == ["step_00000001", "step_00000002"]
    assert names["proven"] == ["step_00000002"]
    assert names["two are not proven"] == ["step_00000002", "step_00000004"]
    assert names["another process sets aside"] == names["two are not proven"]
    assert names["set aside"] == ["step_00000002", "step_00000004.not-finite"]
    assert names["latest"] == 2
    assert "continues from step 2" in names["way back"]
    assert "step 2 have not given finite numbers" in names["lost"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("factor", ["nan", "inf"])
def test_a_bad_loss_on_one_rank_changes_no_weight_on_any(ranks, optimizer, factor):
    for rank in ranks:
        case = rank[f"skipped-{optimizer}-{factor}"]
        assert case["made"] == [False, True, True]
        assert case["equal"]
        losses = [item for item in case["findings"] if item["kind"] == "loss"]
        assert [(item["rank"], item["where"]) for item in losses] == [(1, "micro-batch 0 with sample-1")]
        gradients = [item for item in case["findings"] if item["kind"] == "gradients"]
        assert gradients and all(item["where"] == "language (language.norm.weight)" for item in gradients)


@pytest.mark.parametrize(("what", "named"), [("weights", "merger.weight"), ("moments", "the state of the optimizer")])
def test_a_state_that_is_not_finite_on_one_rank_is_not_saved_by_any(ranks, what, named):
    for rank in ranks:
        message = rank[f"broken-{what}"]
        assert "after step 7 rank 1 holds numbers that are not finite in" in message and named in message


def test_a_model_with_nothing_to_train_is_refused(ranks):
    assert "nothing to train" in ranks[1]["frozen"]


@pytest.mark.parametrize("distributed", [True, False])
def test_a_stage_with_nothing_to_train_takes_part(ranks, distributed):
    first, second = (rank[f"frozen_stage-{distributed}"] for rank in ranks)
    assert not first["moved"] and second["moved"]
    assert first["equal"] and second["equal"]


def test_learning_rates_and_decay_by_part(ranks):
    matrices = 2 * 12 * 8 + 8 * 12
    assert ranks[0]["groups"] == [[1.0, 0.1, matrices], [1.0, 0.0, 8], [0.5, 0.1, 64]]


@pytest.mark.parametrize("killed", [[0, 1], [1]], ids=["all ranks", "one rank"])
def test_a_run_killed_while_writing_leaves_the_previous_checkpoint(tmp_path, killed):
    with pytest.raises(AssertionError, match="exit -9"):
        run_world(f"{CASES}:killed_while_writing", world_size=2, timeout=150, folder=str(tmp_path), killed=killed)
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names[0] == "step_00000001" and names[1].startswith("step_00000002.writing-")
    assert json.loads((tmp_path / "step_00000001" / "checkpoint.json").read_text())["step"] == 1
    rank = run_world(f"{CASES}:continue_after_kill", world_size=2, timeout=150, folder=str(tmp_path))[0]
    assert rank["step"] == 1
    assert rank["after"] == ["step_00000001", "step_00000002"]
