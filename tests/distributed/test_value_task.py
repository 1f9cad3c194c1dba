"""The `value` task learns hop samples and reports their loss apart."""

import json
from pathlib import Path

import pytest

from megatron_rb.builders.build import SampleMix, write_split
from megatron_rb.tools import demo_model
from tests.distributed.test_demo import rb

HELDOUT = Path(__file__).resolve().parents[2] / "examples" / "robosim" / "heldout"


@pytest.mark.timeout(200)
def test_the_loss_on_hops_falls_and_is_written_down(tmp_path):
    mix = SampleMix(tasks=("hop", "uvd"), hops_per_episode=10)
    for split, seed in (("train", 0), ("heldout", 1)):
        write_split(HELDOUT, tmp_path / "data", split, mix, seed)
    heldout = tmp_path / "data/heldout.jsonl"
    heldout.write_text("".join(heldout.read_text().splitlines(True)[::8]))
    assert demo_model.main(["--texts", str(tmp_path / "data/train.jsonl"), "--out", str(tmp_path / "hf")]) == 0
    done = rb(
        "launch",
        "experiment=demo",
        f"run_dir={tmp_path}/run",
        f"model.hf_path={tmp_path}/hf",
        f"checkpoint.init={tmp_path}/hf",
        f"data.train=[{tmp_path}/data/train.jsonl]",
        f"data.evaluation=[{heldout}]",
        "parallel.tp_size=1",
        "data.global_batch_size=8",
        "schedule.train_steps=16",
        "schedule.eval_every=8",
        "checkpoint.save_every=0",
        folder=tmp_path,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    evaluations = [record["values"] for record in records if record["kind"] == "eval"]
    assert [values.keys() for values in evaluations] == [{"loss", "hop_loss"}] * 3
    hops = [values["hop_loss"] for values in evaluations]
    assert hops[0] > hops[1] > hops[2] and hops[2] < 0.75 * hops[0], hops
    # hop samples are a part of the held-out ones, so the two losses are not the same number
    assert all(values["hop_loss"] != values["loss"] for values in evaluations)
    assert sum(record["kind"] == "step" for record in records) == 16
