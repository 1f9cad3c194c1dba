"""Episode files of any length are labelled in constant memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rb.data.hop_file import write_hop_samples
from megatron_rb.value.label import LabelRules

REPOSITORY = Path(__file__).parents[3]
FRAMES = 10
"""Of an episode."""
SHORT, LONG = 10_000, 130_000
"""Frames of the files; 1,000,000 take the same memory, and longer than a test should."""
SCRIPT = """
import resource, sys
from pathlib import Path
from megatron_rb.data.hop_file import write_hop_samples
from megatron_rb.value.label import LabelRules
from megatron_rb.value.sampling import PairRules

rules = LabelRules(chunk=1, pairs=PairRules(4), reference_swap=0.75)
folder, used = Path(sys.argv[1]), []
for name in ("short", "long"):
    report = write_hop_samples(folder / f"{name}.jsonl", folder / f"{name}_out.jsonl", rules, 0, part=(0, 20))
    used.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(report.episodes, *used)
"""


def write_episodes(file: Path, rows: int) -> None:
    view = json.dumps({"side": {"image": "x.jpg"}, "wrist": {"image": "y.jpg"}})
    with open(file, "w") as lines:
        for episode in range(rows // FRAMES):
            lines.writelines(
                f'{{"task": "lift", "episode": {episode}, "frame": {frame}, "phase": {frame // 3}, "views": {view}}}\n'
                for frame in range(FRAMES)
            )


def test_memory_does_not_grow_with_the_file(tmp_path):
    write_episodes(tmp_path / "short.jsonl", SHORT)
    write_episodes(tmp_path / "long.jsonl", LONG)
    size = (tmp_path / "long.jsonl").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=REPOSITORY, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    episodes, short, long = map(int, done.stdout.split())
    assert episodes == LONG // FRAMES // 20
    assert (long - short) * 1024 < 2.5e6 < size / 5, (short, long)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "episodes.jsonl holds no episode for this part; give key-framed episodes"),
        (
            "[1, 2]\n{}\n",
            "no episode of .*episodes.jsonl gives a sample: 2 not an episode frame; see .*out.ledger.jsonl",
        ),
    ],
)
def test_a_file_without_an_episode_is_told_in_words(tmp_path, text: str, said: str):
    (tmp_path / "episodes.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        write_hop_samples(tmp_path / "episodes.jsonl", tmp_path / "out.jsonl", LabelRules(), seed=0)
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "out.jsonl.partial").exists()
