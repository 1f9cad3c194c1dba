"""Every command that the documentation shows is run, or stands in `NOT_RUN` with the reason, checked by its words."""

import argparse
import importlib.util
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_rb import cli
from megatron_rb.app.plan_words import read_request
from megatron_rb.config.compose import load_config
from megatron_rb.launch.main import OF_A_RUN, split_words, sweep_of
from tests.docs.shown_commands import REPOSITORY, Session, sessions, shown_commands
from tests.docs.workspace import after_the_first_run, furnish, inside

pytestmark = pytest.mark.timeout(600)

FIRST_RUN = tuple(
    shown.line for shown in shown_commands() if shown.page == "getting-started.md" and shown.words[0] in ("rb", "head")
)
"""The page is one story: its commands are run in their order."""

SHORTER = "schedule.train_steps=40 platform.threads_per_rank=1"
"""Added to the line that trains: on a machine with other work, two threads of such a model wait for each other."""

RUN = (
    "rb plan model=robobrain20_32b cluster=h200 gpus=512 data=stats.json seq_length=16384 global_batch_size=2048 "
    "max_gpu_memory=120GB tp=4 pp=2 --yaml plan.yaml --json plan.json --png plan.png",
    "rb data stats data.train=[my.jsonl] model.hf_path=models/RoboBrain2.5-4B --out stats.json",
    "rb data stats experiment=robobrain20_32b_stage1 data.train=[my.jsonl] --out stats.json",
    "rb launch experiment=robobrain20_7b_stage2 cluster=slurm data.train=[my.jsonl] action=dryrun",
    "rb launch experiment=robobrain20_7b_stage2 data.train=[my.jsonl] optimizer.lr=1e-5 action=dryrun",
    "rb launch experiment=finetune_20_7b_lora data.train=[my.jsonl] action=dryrun",
    "rb launch experiment=finetune_25_8b_lora data.train=[my.jsonl] model.adapters.lora.rank=8 "
    "model.adapters.lora.patterns=[q_proj,v_proj] action=dryrun",
    "rb launch experiment=demo cluster=slurm action=dryrun",
    "rb launch experiment=demo cluster=slurm cluster.slurm.partition=gpu action=dryrun",
    "rb launch experiment=demo kernels.mrope=torch action=dryrun",
    "rb launch experiment=demo optimizer.lr=1e-4,3e-4 run_dir=runs/rates cluster=slurm action=dryrun",
    "rb launch experiment=demo optimizer.lr=5e-4 platform.env.NAME=value action=dryrun",
    "rb launch experiment=demo platform=cuda action=dryrun",
    "rb launch run_dir=runs/my_run action=status",
    "rb doctor --kernels",
    "rb doctor --kernels platform=cpu",
    "rb convert export --ckpt runs/my_run --out my_hf",
    "rb convert inspect imported --json",
    "rb convert migrate --ckpt runs/my_run --out migrated --to musa",
    "rb eval --data my_benchmark --answers answers.json --out runs/recorded",
    "rb compare runs runs/nvidia runs/mtt",
    "rb demo-data --tasks pointing uvd trace_2d --windows 0 --out my_rows",
    "rb demo-data --tasks pointing --windows 0 --answer-form 2.0 --out my_rows_20",
    "rb value label --data episodes.jsonl --out samples.jsonl --seed 0",
)

NOT_RUN = {
    "trains until it ends, or submits a job; the same line is tried as a dry run": (
        "rb launch experiment=robobrain20_7b_stage2 data.train=[my.jsonl]",
        "rb launch experiment=finetune_20_7b_lora data.train=[my.jsonl]",
        "rb launch model=robobrain20_7b data.train=[my.jsonl]",
        "rb launch experiment=robobrain20_32b_stage1 settings=plan.yaml data.train=[my.jsonl]",
        "rb launch model=robobrain20_3b task=value data.train=[samples.jsonl]",
        "rb launch experiment=demo",
        "rb launch experiment=demo cluster=slurm cluster.nodes=2",
        "rb launch experiment=demo cluster=ssh cluster.ssh.hostfile=hosts.txt follow=true",
    ),
    "is one process of many, which a launcher starts; tests/distributed does": (
        "rb train experiment=robobrain20_7b_stage2",
    ),
    "acts on a run that lives, or waits for one; tests/slurm does": (
        "rb launch experiment=robobrain20_7b_stage2 cluster=slurm cluster.after=runs/robobrain20_7b_stage1",
        "rb launch run_dir=runs/my_run action=logs -f --rank 3",
        "rb launch run_dir=runs/my_run action=stop",
        "rb launch run_dir=runs/my_run action=requeue",
        "rb doctor cluster=slurm cluster.nodes=4",
    ),
    "needs the device of the example; tests/platform simulates it": (
        "rb doctor --kernels platform.name=npu",
        "rb launch experiment=demo platform.name=npu platform.env.NPU_VERBOSE=1",
        "rb convert migrate --ckpt runs/my_run --to npu --out migrated",
    ),
    "needs the weights of a published model, or a checkpoint of Megatron": (
        "rb convert import --hf models/RoboBrain2.0-7B --out imported --dtype keep",
        "rb convert verify models/RoboBrain2.0-7B my_hf",
        "rb convert from-megatron --ckpt megatron_ckpt --out imported --hf models/RoboBrain2.0-7B",
        "rb convert export --ckpt runs/robobrain20_7b_stage1 --out runs/robobrain20_7b_stage1/hf",
        "rb eval --data my_benchmark --hf models/RoboBrain2.0-7B --out runs/hf_eval",
        "rb parity --hf models/RoboBrain2.0-3B --layout 'P v*20 | v*12 M E t*36 L' --tp 2 --grads",
    ),
    "needs a run with adapters; tests/unit/checkpoint/conversion/test_merge.py makes one": (
        "rb convert export --adapters --ckpt runs/my_adapter --out my_lora",
        "rb convert export --ckpt runs/my_adapter --out my_merged",
        "rb convert merge --base models/RoboBrain2.0-7B --adapter my_lora --out my_merged_too",
    ),
    "starts processes that other tests start with other words": (
        "rb eval --ckpt runs/my_run --data my_questions.jsonl --out runs/my_eval",
        "rb eval --data my_benchmark --ckpt runs/my_run --out runs/my_eval",
        "rb eval --data my_benchmark --ckpt runs/my_run --out runs/my_eval --tp 2 --processes 4 --batch 16",
        "rb convert verify runs/my_run my_hf --forward",
        "rb compare capture experiment=demo --out captured/nvidia --steps 1",
        "rb compare numerics captured/nvidia captured/mtt",
        "rb value score --data episodes.jsonl --ckpt runs/my_run --out curves.jsonl",
        "rb value plot --curves curves.jsonl --data episodes.jsonl --out curves",
    ),
    "searches through all layouts for half a minute; with some of them given it is run": (
        "rb plan model=robobrain20_32b cluster=h200 gpus=512 data=stats.json",
        "rb launch experiment=robobrain20_32b_stage1 parallel=auto world_size=512 planner.device=h200 "
        "planner.histogram=stats.json",
        "rb plan model=robobrain20_7b cluster=h200 gpus=64 data=stats.json calibration=blocks.json",
        "rb plan --published published",
    ),
    "takes the ranks of a GPU run through a step; tests/rehearsal does with others": (
        "rb rehearse experiment=robobrain20_7b_stage2",
        "rb rehearse experiment=robobrain20_32b_stage1 world_size=1024 --html rehearsal.html --json rehearsal.json",
        "rb rehearse experiment=robobrain25_8b_stage1 world_size=512 --ranks 0,256-259 --micro-batches 4 "
        "--data stats.json --device h200 --evaluation",
        "rb launch experiment=robobrain20_7b_stage2 action=dryrun rehearse=true",
        "rb rehearse --recipes my_recipes",
        "rb rehearse experiment=robobrain20_7b_stage2 --with flash_attn=2.8.3,transformer_engine=2.9",
        "rb rehearse experiment=robobrain25_8b_stage1 --device mtt_s5000",
        "rb rehearse experiment=robobrain20_7b_stage2 world_size=64 --checkpoint",
    ),
    "measures for minutes": (
        "rb bench",
        "rb bench train",
        "rb bench train --model RoboBrain2.0-7B --mix video_16k parallel=tp2_pp2 world_size=8",
        "rb bench train model=robobrain20_3b data.train=[my.jsonl]",
        "rb bench train --baseline hf",
        "rb bench device",
        "rb bench device --dry --out runs/dry",
        "rb bench device --rehearse benchmarks/device/rehearsed-h200.json",
        "rb bench compare runs/bench/A runs/bench/B --limit 3",
        "rb bench packing --ranks 64",
        "rb bench launch",
        "rb bench convert",
        "rb bench data",
        "rb bench kernels",
        "rb bench kernels --aot",
        "rb bench numerics",
        "rb bench plan",
        "rb bench blocks --model RoboBrain2.0-7B --device h200 --out blocks.json",
    ),
    "sets up, or runs these tests": (
        "make demo",
        "make test",
        "make .venv/.ready",
        "source .venv/bin/activate",
        "pre-commit install",
        "pip install --no-build-isolation -e .",
        "pip install ./examples/npu_platform",
        "docker build --target cpu -t megatron-rb .",
        "python -m pytest tests/architecture",
        "python -m pytest tests/parity",
        "python -m pytest tests/unit/config",
        "python -m pytest tests/unit/shapes tests/unit/checkpoint",
        "python -m pytest tests/unit/kernels",
        "python -m pytest tests/platform/test_conformance.py -rs",
        "TRITON_INTERPRET=1 python -m pytest tests/interpreter",
        "python -m tests.interpreter.mutations",
    ),
}
"""Reason: the commands it holds for. Their options, settings, files and targets are checked all the same."""

UNTRIED = tuple(line for lines in NOT_RUN.values() for line in lines)
DRY = next(iter(NOT_RUN.values()))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder in which getting-started.md has been followed to its end."""
    folder = tmp_path_factory.mktemp("docs")
    on_term = signal.getsignal(signal.SIGTERM)
    furnish(folder)
    with inside(folder):
        for line in FIRST_RUN:
            assert _execute(f"{line} {SHORTER}" if "train_steps" in line else line) == 0, line
        after_the_first_run()
        yield folder
    signal.signal(signal.SIGTERM, on_term)


def _execute(line: str) -> int:
    """An `rb` command in this process, another one in a shell."""
    words = shlex.split(line)
    return cli.main(words[1:]) if words[0] == "rb" else subprocess.run(line, shell=True, timeout=60).returncode


def test_every_command_is_run_or_says_why_not():
    known = {*FIRST_RUN, *RUN, *UNTRIED}
    assert [f"{shown.page}: {shown.line}" for shown in shown_commands() if shown.line not in known] == []


def test_the_tables_name_nothing_that_no_page_shows():
    shown = {command.line for command in shown_commands()}
    assert [line for line in (*RUN, *UNTRIED) if line not in shown] == []


def test_getting_started_ends_with_answers_and_a_model_to_take_away(workspace):
    assert Path("runs/first/eval/report.html").is_file()
    assert Path("runs/first/export/config.json").is_file()


@pytest.mark.parametrize("line", RUN)
def test_command_ends_well(line: str, workspace):
    assert _execute(line) == 0


@pytest.mark.parametrize("line", DRY)
def test_run_passes_as_a_dry_run(line: str, workspace):
    Path("hosts.txt").write_text("localhost slots=4\n")
    assert _execute(f"{line} action=dryrun") == 0


class Parsed(Exception):
    """Carries what the parser of a command has made of its words."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


def _parse(words: list[str], monkeypatch) -> argparse.Namespace:
    """The words of a command as its own parser reads them; it goes no further."""

    def stop_after(parse):
        def parse_and_stop(parser, args=None, namespace=None):
            raise Parsed(parse(parser, args, namespace))

        return parse_and_stop

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop_after(getattr(argparse.ArgumentParser, name)))
    with pytest.raises(Parsed) as parsed:
        cli.main(words)
    return parsed.value.options


@pytest.mark.parametrize("line", [line for line in UNTRIED if line.startswith("rb ")])
def test_options_and_settings_of_a_command_that_is_not_run_exist(line: str, workspace, monkeypatch):
    words = shlex.split(line)[1:]
    # --to takes the names of platforms that are installed.
    options = _parse(["musa" if word == "npu" else word for word in words], monkeypatch)
    if words[0] == "plan":
        assert options.published or read_request(options.words)
        return
    action, settings = split_words(getattr(options, "settings", []))
    assert action.action in OF_A_RUN or all(load_config(one) for one in sweep_of(settings))


@pytest.mark.parametrize("line", [line for line in UNTRIED if not line.startswith("rb ")])
def test_what_another_command_names_exists(line: str):
    words = [word for word in shlex.split(line) if "=" not in word and not word.startswith("-")]
    match words:
        case ["make", target]:
            assert re.search(rf"^{re.escape(target)}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        case ["python", "pytest", *paths] | ["pip", "install", *paths]:
            assert paths and all((REPOSITORY / path).exists() for path in paths)
        case ["source", ".venv/bin/activate"]:
            pass
        case ["python", module]:
            assert importlib.util.find_spec(module)
        case ["pre-commit", "install"]:
            assert (REPOSITORY / ".pre-commit-config.yaml").is_file()
        case ["docker", "build", stage, _, "."]:
            assert f" AS {stage}\n" in (REPOSITORY / "Dockerfile").read_text()
        case _:
            pytest.fail(f"nothing here knows how to check `{line}`")


@pytest.mark.parametrize("session", sessions(), ids=lambda session: session.line)
def test_wrong_input_is_answered_as_it_is_shown(session: Session, workspace, capsys):
    assert _execute(session.line) == 2
    assert session.answer in capsys.readouterr().err
