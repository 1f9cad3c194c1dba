"""Verdicts on made-up curves: right on clear cases, withheld on noise, rarely wrong over many draws."""

import json
import math

import numpy as np
import pytest

from megatron_rb.cli import main
from megatron_rb.comparison.runs.gap import Gap, Verdict, default_window, relative_gap, student_quantile
from megatron_rb.comparison.runs.recipe import LAYOUT, OF_THE_MACHINE, PATHS, check_keys
from megatron_rb.config.schema import Config
from tests.unit.comparison.curves import autocorrelated, curve, pairs, write_run

DRAWS = 400
CASES = [
    {"batch": 0.02, "own": 0.003, "rho": 0.0},
    {"batch": 0.02, "own": 0.003, "rho": 0.7},
    {"batch": 0.0, "own": 0.02, "rho": 0.3},
    {"batch": 0.02, "own": 0.01, "rho": 0.9},
]


def final_gaps(draws, steps, **noise):
    window = default_window(steps)
    return [relative_gap(a[-window:], b[-window:]) for a, b in pairs(draws, steps, **noise)]


def verdicts(draws, steps, **noise):
    return [gap.verdict(0.62) for gap in final_gaps(draws, steps, **noise)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [120, 1000])
def test_interval_holds_the_true_gap_in_19_of_20_draws(case, steps):
    """A wrong verdict needs an interval that misses the truth; 5 % gives more than 8 % of 400 draws once in 200."""
    missed = sum(not gap.interval[0] <= 0 <= gap.interval[1] for gap in final_gaps(DRAWS, steps, offset=0.0, **case))
    assert missed <= 0.08 * DRAWS


@pytest.mark.parametrize("case", CASES)
def test_verdicts_are_rarely_wrong(case):
    assert verdicts(DRAWS, 1000, offset=0.0, **case).count(Verdict.DIFFER) <= 0.02 * DRAWS
    assert verdicts(DRAWS, 1000, offset=0.01, **case).count(Verdict.AGREE) <= 0.02 * DRAWS


def test_verdicts_at_the_border_are_wrong_in_one_of_twenty_at_most():
    """A true gap just above the threshold must not be called an agreement, nor one just below it a difference."""
    case = {"batch": 0.02, "own": 0.004, "rho": 0.5}
    assert verdicts(DRAWS, 1000, offset=0.00625, **case).count(Verdict.AGREE) <= 0.05 * DRAWS
    assert verdicts(DRAWS, 1000, offset=0.00615, **case).count(Verdict.DIFFER) <= 0.05 * DRAWS


def test_clear_cases_are_told():
    quiet = {"batch": 0.02, "own": 0.003, "rho": 0.7}
    assert verdicts(50, 2000, offset=0.0, **quiet).count(Verdict.AGREE) >= 48
    assert verdicts(50, 2000, offset=0.01, **quiet).count(Verdict.DIFFER) >= 40


def test_gap_is_the_one_of_the_definition():
    a = np.full(20, 2.0)
    gap = relative_gap(a, a * 1.01)
    assert gap.percent == pytest.approx(1.0) and gap.margin < 1e-10
    assert gap.verdict(0.62) is Verdict.DIFFER and gap.verdict(1.1) is Verdict.AGREE


def test_margin_of_independent_noise_is_about_the_textbook_one():
    draw = np.random.default_rng(3)
    a = np.ones(4000)
    margins = [relative_gap(a, a + 0.01 * draw.standard_normal(4000)).margin for _ in range(20)]
    textbook = 100 * 1.96 * 0.01 / math.sqrt(4000)
    assert textbook < np.mean(margins) < 1.3 * textbook


def test_student_quantiles_are_those_of_the_tables():
    assert student_quantile(2) == pytest.approx(4.303, abs=2e-3)
    assert student_quantile(10) == pytest.approx(2.228, abs=1e-3)
    assert student_quantile(100) == pytest.approx(1.984, abs=1e-3)


def test_few_steps_never_give_a_verdict():
    assert relative_gap(np.ones(15), np.full(15, 1.5)).verdict(0.62) is Verdict.TOO_NOISY
    assert Gap(0.0, math.inf, 3).verdict(0.62) is Verdict.TOO_NOISY


def compare(capsys, *arguments):
    """Exit code and result of `rb compare runs`."""
    words = [str(word) for word in arguments]
    code = main(["compare", "runs", *words, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else captured.err


def test_same_recipe_on_other_hardware_agrees_and_is_reported(capsys, tmp_path):
    a, b = pairs(1, 600, batch=0.02, own=0.002, rho=0.5, offset=0.0, seed=1)[0]
    there = Config()
    there.platform.name, there.world_size, there.run_dir, there.data.decode_threads = "musa", 8, "/far/run", 9
    folders = write_run(tmp_path / "a", a), write_run(tmp_path / "b", b, there, seconds=1.0)
    code, result = compare(capsys, *folders, "--out", tmp_path / "out")
    assert (code, result["verdict"], result["window_steps"]) == (0, "agree", 60)
    assert next(row["ratio"] for row in result["throughput"] if "tokens" in row["name"]) == pytest.approx(2.0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.html",
        "loss.png",
        "gap.png",
        "agreement.png",
        "result.json",
    }
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "mean loss of A" in page


def test_one_percent_is_a_difference_and_noise_no_verdict(capsys, tmp_path):
    a, b = pairs(1, 600, batch=0.02, own=0.002, rho=0.5, offset=0.01, seed=2)[0]
    folders = write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)
    assert compare(capsys, *folders)[0] == 1
    a, b = pairs(1, 60, batch=0.0, own=0.05, rho=0.5, offset=0.0, seed=3)[0]
    code, result = compare(capsys, write_run(tmp_path / "c", a), write_run(tmp_path / "d", b))
    assert (code, result["verdict"]) == (3, "too noisy to tell")
    assert "steps would tell" in result["reason"]


def test_diverged_run_differs_whatever_the_noise(capsys, tmp_path):
    loss = curve(200)
    broken = np.where(np.arange(200) > 150, np.nan, loss)
    code, result = compare(capsys, write_run(tmp_path / "a", loss), write_run(tmp_path / "b", broken))
    assert code == 1 and "has no finite loss at its end" in result["reason"]
    assert "49 steps without a finite loss" in " ".join(result["notes"])


def test_steps_done_twice_count_once_and_are_mentioned(capsys, tmp_path):
    a, b = pairs(1, 300, batch=0.02, own=0.001, rho=0.3, offset=0.0, seed=4)[0]
    left, right = write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)
    lines = (right / "metrics.jsonl").read_text().splitlines(keepends=True)
    wrong = [line.replace('"loss": ', '"loss": 9') for line in lines[100:120]]
    (right / "metrics.jsonl").write_text("".join(lines[:120] + wrong + lines[100:]))
    code, result = compare(capsys, left, right)
    assert code == 0
    assert any("20 steps stand in metrics.jsonl more than once" in note for note in result["notes"])


def test_unequal_ends_batches_and_rates_are_mentioned(capsys, tmp_path):
    a, b = pairs(1, 400, batch=0.02, own=0.001, rho=0.3, offset=0.0, seed=5)[0]
    left = write_run(tmp_path / "a", a)
    rates = {"vision": 1e-6, "language": 5e-6}
    right = write_run(tmp_path / "b", b[:350], num_labels=99, learning_rates=rates, grad_norm=3.0)
    _, result = compare(capsys, left, right)
    said = " ".join(result["notes"] + result["agreement"])
    assert "compared up to step 350" in said and "equal in 0 of 350 steps" in said
    assert "learning rate of language: differs in 350 steps" in said
    assert "gradient norms differ: B / A has median 2.0000" in said


def test_other_recipe_is_refused_with_the_settings_and_the_way_out(capsys, tmp_path):
    losses, other = curve(100), Config()
    other.optimizer.lr, other.parallel.tp_size = 3e-5, 2
    folders = write_run(tmp_path / "a", losses), write_run(tmp_path / "b", losses, other)
    code, said = compare(capsys, *folders)
    assert code == 2
    for words in ("optimizer.lr (1e-05 and 3e-05)", "parallel.tp_size (1 and 2)", "--allow optimizer.lr"):
        assert words in said
    assert compare(capsys, *folders, "--allow", "optimizer.lr", "--allow", "parallel")[0] == 0


def test_layout_alone_is_allowed_by_one_word(capsys, tmp_path):
    other = Config()
    other.parallel.tp_size, other.parallel.sequence_parallel = 4, True
    folders = write_run(tmp_path / "a", curve(100)), write_run(tmp_path / "b", curve(100), other)
    code, said = compare(capsys, *folders)
    assert code == 2 and said.count("--allow") == 1 and "--allow parallel" in said


def test_paths_are_compared_by_their_last_part(capsys, tmp_path):
    here, there = Config(), Config()
    here.data.train, there.data.train = ["/nv/mix.jsonl"], ["/mt/data/mix.jsonl"]
    folders = write_run(tmp_path / "a", curve(100), here), write_run(tmp_path / "b", curve(100), there)
    assert compare(capsys, *folders)[0] == 0
    there.data.train = ["/mt/data/other.jsonl"]
    write_run(tmp_path / "b", curve(100), there)
    assert compare(capsys, *folders)[0] == 2


def test_every_setting_that_may_differ_is_one():
    check_keys([*OF_THE_MACHINE, *PATHS, LAYOUT])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "nowhere"], "give the folder of a run that has made steps"),
        (["a", "bare"], "has no config.yaml"),
        (["a", "a", "--allow", "optimizer.rl"], "there is no setting or section"),
        (["a", "a", "--threshold", "0"], "give values above 0"),
    ],
)
def test_bad_input_is_one_sentence(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", curve(30))
    write_run(tmp_path / "bare", curve(30))
    (tmp_path / "bare/config.yaml").unlink()
    code, said = compare(capsys, *arguments)
    assert code == 2 and words in " ".join(said.split())
    assert not (tmp_path / "comparison").exists()


def test_noise_of_the_tests_is_what_it_says():
    noise = autocorrelated(np.random.default_rng(0), (1, 100_000), 0.7)[0]
    assert noise.std() == pytest.approx(1, abs=0.03)
    assert np.corrcoef(noise[1:], noise[:-1])[0, 1] == pytest.approx(0.7, abs=0.02)
