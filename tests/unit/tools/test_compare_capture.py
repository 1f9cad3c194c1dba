"""What `rb compare capture` starts."""

import json

from megatron_rb.cli import main
from megatron_rb.shapes.published import CONFIGS


def test_processes_get_the_environment_of_platform_and_site(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr("megatron_rb.launch.workers.run_job", lambda job: jobs.append(job) or 7)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(CONFIGS["RoboBrain2.0-3B"]))
    (tmp_path / "rows.jsonl").touch()
    words = [
        f"model.hf_path={tmp_path / 'hf'}",
        f"data.train=[{tmp_path / 'rows.jsonl'}]",
        "parallel.tp_size=2",
        "platform=musa",
        "cluster.env.MCCL_IB_GID_INDEX=5",
    ]
    assert main(["compare", "capture", *words, "--out", str(tmp_path / "out")]) == 7
    [job] = jobs
    assert job.processes == 2 and job.run_dir == tmp_path / "out/run"
    assert job.env["MCCL_PROTOS"] == "2" and job.env["MUSA_KERNEL_TIMEOUT"] == "3200000"
    assert job.env["MCCL_IB_GID_INDEX"] == "5"
