"""The demo recipe gives on a musa device what it gives on cpu, and a run may change between them.

The device is simulated (tests/platform/simulated_musa says what that leaves open).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_rb.builders.build import SampleMix, write_split
from megatron_rb.checkpoint.conversion.migrate import migrate_checkpoint
from megatron_rb.checkpoint.hf.tiny import TinySize, conversation_texts, write_tiny_model
from megatron_rb.comparison.numerics.captures import open_captures
from megatron_rb.comparison.numerics.comparison import compare_captures
from tests.distributed.world import REPOSITORY, run_world

LAYOUTS = {
    "tp1_pp1": ["parallel.tp_size=1", "parallel.pp_size=1", "parallel.layout=''"],
    "tp2_pp1": ["parallel.tp_size=2", "parallel.pp_size=1", "parallel.layout=''"],
    "vision_on_both_stages": ["parallel.tp_size=1", "parallel.pp_size=2", "parallel.layout=P v | v M E t*3 L"],
}
RECOMPUTE = ["model.recompute.vision=-1", "model.recompute.language=-1"]
STEPS, LEG = 15, 5
WORLD = 2


def short_demo(folder: Path) -> list[str]:
    """Settings of the demo recipe on a smaller model and fewer samples, which are written to a folder."""
    mix = SampleMix(tasks=("pointing", "uvd"), views=("side",), windows=0)
    write_split(REPOSITORY / "examples/robosim/heldout", folder, "heldout", mix, 0)
    size = TinySize(vision_hidden=32, vision_heads=2, vision_ffn=64, text_hidden=64, text_heads=2, text_ffn=96)
    write_tiny_model(conversation_texts(folder / "heldout.jsonl"), folder / "hf", size=size, seed=0)
    return [
        f"model.hf_path={folder / 'hf'}",
        f"data.train=[{folder / 'heldout.jsonl'}]",
        "data.evaluation=[]",
        "data.seq_length=512",
        "data.max_patches=1024",
        "data.global_batch_size=4",
        "checkpoint.init=random",
        "checkpoint.save_every=0",
        "schedule.eval_every=0",
        "schedule.eval_at_start=false",
        "platform.name=auto",
        "metrics.tensorboard=false",
        "metrics.plots=false",
        "metrics.progress=false",
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    return short_demo(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Every layout on both devices, and the run that moves: {device: {name: result of rank 0}}."""
    root = tmp_path_factory.mktemp("runs")
    whole, moving = root / "whole", root / "moving"

    def short(device: str) -> dict:
        each = ["schedule.train_steps=3", "metrics.capture.every=100"]  # step 1 alone
        settings = {name: [*layout, *each] for name, layout in LAYOUTS.items()}
        settings["recomputed"] = [*settings["vision_on_both_stages"], *RECOMPUTE]
        cases = {n: {"settings": [*inputs, *s, f"run_dir={root / device / n}"]} for n, s in settings.items()}
        for name, dropping in (("vision_on_both_stages", "dropout"), ("recomputed", "dropout_recomputed")):
            again = [*cases[name]["settings"][:-1], f"run_dir={root / device / dropping}"]
            cases[dropping] = {"settings": again, "dropout": 0.1}
        return cases

    def leg(folder: Path, stop: int = 0) -> dict:
        long = [*LAYOUTS["vision_on_both_stages"], f"schedule.train_steps={STEPS}", f"run_dir={folder}"]
        return {"settings": [*inputs, *long], "stop": stop}

    first = leg(whole)
    first["settings"] += [f"checkpoint.save_every={LEG}", "checkpoint.keep_last=9"]
    on_cpu = world(short("cpu") | {"whole": first}, simulated="")
    migrate(whole, moving, LEG, "musa")
    on_musa = world(short("musa") | {"second": leg(moving, 2 * LEG)}, simulated="musa")
    migrate(moving, root / "home", 2 * LEG, "cpu")
    on_cpu |= world({"third": leg(root / "home")}, simulated="")
    return {"cpu": on_cpu, "musa": on_musa, "moving": moving / "checkpoints", "root": root}


def world(cases: dict[str, dict], simulated: str) -> dict[str, dict]:
    case, arguments = "tests.platform.cases_training:demo_runs", {"cases": list(cases.values()), "simulated": simulated}
    # megatron-core can be adapted to one device in a process, which has to be there before.
    results = run_world(case, WORLD, timeout=400, fresh=bool(simulated), **arguments)
    device = {f"{simulated}:0"} if simulated else {"cpu"}
    for rank in results:
        assert all(set(result["devices"]) == device for result in rank)
        assert all(result["queued_cuda_calls"] == 0 for result in rank)
    return dict(zip(cases, results[0], strict=True))


def migrate(source: Path, target: Path, step: int, to: str) -> None:
    migrate_checkpoint(source / "checkpoints" / name_of(step), target / "checkpoints" / name_of(step), to)


def name_of(step: int) -> str:
    return f"step_{step:08d}"


@pytest.mark.parametrize("layout", [*LAYOUTS, "recomputed"])
def test_losses_and_gradient_norms_are_those_of_cpu(runs, layout):
    cpu, musa = runs["cpu"][layout], runs["musa"][layout]
    assert len(cpu["losses"]) == 3 and cpu["losses"][0] != cpu["losses"][-1]
    assert musa["losses"] == pytest.approx(cpu["losses"], rel=1e-6)
    assert musa["norms"] == pytest.approx(cpu["norms"], rel=1e-6)


@pytest.mark.parametrize("layout", ["tp2_pp1", "vision_on_both_stages"])
def test_captures_of_another_platform_and_layout_show_no_defect(runs, layout):
    sides = open_captures(runs["root"] / "cpu/tp1_pp1", runs["root"] / "musa" / layout)
    result = compare_captures(*sides)
    assert [str(item) for item in result.defects] == [] and result.one_sided == []
    assert "cpu, " in result.sides[0] and "musa, simulated musa" in result.sides[1]
    assert max(operator.excess for operator in result.operators) < 0.5


def test_recomputed_layers_change_nothing(runs):
    for device in ("cpu", "musa"):
        assert runs[device]["recomputed"]["losses"] == runs[device]["vision_on_both_stages"]["losses"]


def test_recomputed_layers_drop_the_same_values_again(runs):
    """With a generator and a tracker of random states that other micro-batches have moved on in between."""
    for device in ("cpu", "musa"):
        dropped = runs[device]["dropout"]
        assert runs[device]["dropout_recomputed"]["losses"] == dropped["losses"]
        assert runs[device]["dropout_recomputed"]["norms"] == dropped["norms"]
        assert dropped["losses"] != runs[device]["vision_on_both_stages"]["losses"]
    # The device has a generator of its own.
    assert runs["musa"]["dropout"]["losses"] != pytest.approx(runs["cpu"]["dropout"]["losses"], rel=1e-4)


def test_a_run_that_moves_to_musa_and_back_is_the_unbroken_run(runs):
    whole = runs["cpu"]["whole"]["losses"]
    assert len(whole) == STEPS and len(set(whole)) == STEPS
    assert runs["musa"]["second"]["losses"] == pytest.approx(whole[LEG : 2 * LEG], rel=1e-6)
    assert runs["cpu"]["third"]["losses"] == pytest.approx(whole[2 * LEG :], rel=1e-6)


PLAIN_READER = """
import json, pickle, sys, torch
from pathlib import Path
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from safetensors.torch import load_file

assert not hasattr(torch, "musa") and "torch_musa" not in sys.modules
folder, kinds = Path(sys.argv[1]), {}
for path in sorted(p for p in folder.rglob("*") if p.is_file()):
    assert b"musa:" not in path.read_bytes(), path
    kind = path.suffix or path.name
    if kind == ".distcp":
        pass
    elif path.name == ".metadata":
        metadata = pickle.loads(path.read_bytes())
        tensors = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in metadata.state_dict_metadata.items()
                   if isinstance(m, TensorStorageMetadata)}
        dcp.load(tensors, checkpoint_id=path.parent, no_dist=True)
        assert tensors and all(t.device.type == "cpu" and t.isfinite().all() for t in tensors.values())
        rest = {k: None for k in metadata.state_dict_metadata if k not in tensors}
        dcp.load(rest, checkpoint_id=path.parent, no_dist=True)
        kinds["tensors"], kinds["objects"] = kinds.get("tensors", 0) + len(tensors), kinds.get("objects", 0) + len(rest)
    elif kind == ".pt":
        torch.load(path, weights_only=False)
    elif kind == ".json":
        json.loads(path.read_text())
    elif kind == ".safetensors":
        load_file(path)
    else:
        path.read_text()
    kinds[kind] = kinds.get(kind, 0) + 1
print(json.dumps(kinds))
"""


def test_every_file_of_the_musa_side_checkpoint_loads_where_musa_is_unknown(runs):
    command = [sys.executable, "-c", PLAIN_READER, str(runs["moving"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kinds = json.loads(done.stdout.splitlines()[-1])
    checkpoints = [path.name for path in runs["moving"].glob("step_*")]
    assert sorted(checkpoints) == [name_of(LEG), name_of(2 * LEG)]  # what arrived there, and what was saved there
    assert kinds["tensors"] > 200 and kinds["objects"] == WORLD and kinds[".distcp"] > WORLD


def test_what_torch_itself_saves_on_the_device_does_not_load_there(tmp_path):
    """The control of the test above: such a file carries the device, and a plain process refuses it."""
    program = (
        "import torch\nfrom tests.platform.simulated_musa import install\ninstall()\n"
        f"torch.save(torch.ones(2, device='musa'), {str(tmp_path / 'naive.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, timeout=120, check=True)
    with pytest.raises(RuntimeError, match="musa:0"):
        torch.load(tmp_path / "naive.pt")
    assert torch.equal(torch.load(tmp_path / "naive.pt", map_location="cpu"), torch.ones(2))
