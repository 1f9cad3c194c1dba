"""`rb doctor` over real machines: every one reports, and all links are measured."""

import json
import os
import subprocess
import sys

import pytest

from megatron_rb.bench.launch.runs import REPOSITORY

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("engine", ["slurm", "ssh"])
def test_every_machine_reports_and_is_measured_against_another(cluster, engine: str):
    settings = [f"cluster={engine}", "cluster.processes_per_node=1", "platform=cpu"]
    options = ["cluster.ssh.hosts=[node1,node2]", f"cluster.ssh.options=[-F,{cluster.ssh_config}]"]
    settings += options if engine == "ssh" else ["cluster.nodes=2"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rb.cli", "doctor", "--json", *settings],
        cwd=REPOSITORY,
        text=True,
        env={**os.environ, **cluster.env, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        timeout=100,
    )
    assert done.returncode in (0, 1), done.stderr
    machines = json.loads(done.stdout)["machines"]
    assert [machine["host"] for machine in machines] == ["node1", "node2"]
    assert all(machine["matmul_tflops"] > 0 for machine in machines)
    assert machines[0]["pairs"]["1"] > 0 and machines[1]["pairs"]["0"] > 0
