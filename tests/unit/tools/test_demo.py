import json
import shutil
from pathlib import Path

from megatron_rb.tools import demo_data, demo_model

EPISODES = Path(__file__).parents[3] / "examples" / "robosim" / "heldout"


def test_demo_data_then_demo_model(tmp_path, capsys):
    for split, episode in (("train", "lift_003"), ("heldout", "lift_009")):
        shutil.copytree(EPISODES / episode, tmp_path / "episodes" / split / episode)
        lines = (EPISODES / "lift.jsonl").read_text().splitlines()
        own = [line for line in lines if f'"{episode}/' in line]
        (tmp_path / "episodes" / split / "lift.jsonl").write_text("\n".join(own))
    data = tmp_path / "data"
    assert demo_data.main(["--episodes", str(tmp_path / "episodes"), "--out", str(data), "--windows", "2"]) == 0
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows} == {"pointing", "uvd", "waypoints", "hop"}
    assert "18 pointing" in capsys.readouterr().out

    model = ["--texts", str(data / "train.jsonl"), "--out", str(tmp_path / "model")]
    assert demo_model.main(model) == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert demo_model.main(model) == 2
    assert "not empty" in capsys.readouterr().err


def test_demo_data_without_episodes_says_so(tmp_path, capsys):
    assert demo_data.main(["--episodes", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no .jsonl" in capsys.readouterr().err
