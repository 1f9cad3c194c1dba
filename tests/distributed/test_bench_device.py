"""The first minutes on a GPU in their dry form: the parts run as commands, and the folder tells what they found."""

import json

import pytest

from megatron_rb.shapes.families import FAMILIES
from megatron_rb.tools.bench.device import NAMES
from tests.distributed.forked import REPOSITORY, run_forked


def look(out, *parts: str):
    words = ("bench", "device", "--dry", "--minutes", "40", "--out", str(out), *(("--parts", *parts) if parts else ()))
    done = run_forked("megatron_rb.cli", *words, folder=REPOSITORY, timeout=2400, merged=True)
    results = json.loads((out / "results.json").read_text())
    return done, {each["name"]: each for each in results["outcomes"]}


@pytest.mark.timeout(400)
def test_steps_and_a_resume_end_well_and_are_told(tmp_path):
    done, found = look(tmp_path / "out", "smoke", "resume")
    assert done.returncode == 0, done.stdout
    assert [each["state"] for each in found.values()] == ["done", "done"], found
    assert found["smoke"]["figures"]["tokens/s"] > 0
    assert len(found["resume"]["figures"]["losses after the resume"].split(", ")) == 3
    page = (tmp_path / "out/README.md").read_text()
    assert "**Dry form**" in page and "| resume |" in page
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "logs", "results.json", "smoke"]


@pytest.mark.slow
@pytest.mark.timeout(2500)
def test_every_part_runs_on_a_cpu_or_says_why_not(tmp_path):
    done, found = look(tmp_path / "out")
    assert done.returncode == 0, done.stdout
    assert tuple(found) == NAMES
    states = {name: each["state"] for name, each in found.items()}
    assert states == dict.fromkeys(NAMES, "done") | {"smoke-te": "skipped"}, found
    assert found["parity"]["figures"] == {"within the tolerances": ", ".join(FAMILIES)}
    assert "skipped" in found["tests"]["figures"]["pytest"]
