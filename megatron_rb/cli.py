"""`rb`: a table of its words and what each runs in tools/; imports nothing heavy itself."""

from __future__ import annotations

import difflib
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from megatron_rb.config.commands import Command, listing
from megatron_rb.config.failures import complain, exit_code_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rb <command> <arguments>`; wrong input is one sentence and exit code 2, `--debug` shows its traceback.

    A ValueError of another package is no wrong input that was foreseen: it keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    try:
        code = _run(arguments[0] if arguments else "--help", arguments[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _lost_its_reader():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return 128 + signal.SIGPIPE
    except Exception as error:
        code_or_none = exit_code_of(error)
        if code_or_none is None:
            raise
        if debug:
            traceback.print_exc()
        else:
            complain(error)
        return code_or_none


def _lost_its_reader() -> bool:
    """Whether nobody reads the output of this process any more (`rb doctor | head`)."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # it is no file
        return False
    poll = select.poll()
    poll.register(output, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _run(name: str, arguments: list[str]) -> int:
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"megatron-rb {_version()}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(COMMANDS)}"
        raise ValueError(f"rb has no command '{name}'{hint}")
    return COMMANDS[name].run(arguments)


def _version() -> str:
    try:
        return version("megatron-rb")
    except PackageNotFoundError:
        return "(its source, which is not installed)"


def _overview() -> str:
    usage, more = "usage: rb [--debug] [--version] <command> [arguments]", "`rb <command> --help` tells more about one."
    return "\n".join([usage, "", *listing(COMMANDS), "", more])


def _bench(argv: list[str]) -> int:
    from megatron_rb.tools.bench import main as run

    return run(argv)


def _compare(argv: list[str]) -> int:
    from megatron_rb.tools.compare import main as run

    return run(argv)


def _convert(argv: list[str]) -> int:
    from megatron_rb.tools.convert import main as run

    return run(argv)


def _data(argv: list[str]) -> int:
    from megatron_rb.tools.data import main as run

    return run(argv)


def _demo(argv: list[str]) -> int:
    from megatron_rb.tools.demo import main as run

    return run(argv)


def _demo_data(argv: list[str]) -> int:
    from megatron_rb.tools.demo_data import main as run

    return run(argv)


def _demo_model(argv: list[str]) -> int:
    from megatron_rb.tools.demo_model import main as run

    return run(argv)


def _doctor(argv: list[str]) -> int:
    from megatron_rb.tools.doctor import main as run

    return run(argv)


def _eval(argv: list[str]) -> int:
    from megatron_rb.tools.eval import main as run

    return run(argv)


def _launch(argv: list[str]) -> int:
    from megatron_rb.tools.launch import main as run

    return run(argv)


def _parity(argv: list[str]) -> int:
    from megatron_rb.tools.parity import main as run

    return run(argv)


def _plan(argv: list[str]) -> int:
    from megatron_rb.tools.plan import main as run

    return run(argv)


def _rehearse(argv: list[str]) -> int:
    from megatron_rb.tools.rehearse import main as run

    return run(argv)


def _train(argv: list[str]) -> int:
    from megatron_rb.tools.train import main as run

    return run(argv)


def _value(argv: list[str]) -> int:
    from megatron_rb.tools.value import main as run

    return run(argv)


COMMANDS = {
    "bench": Command(
        "Measure training steps, packing, conversions, recovery, data, kernels and captures; compare two results.",
        _bench,
    ),
    "compare": Command(
        "Compare two runs of one recipe, or the tensors inside one step of each: runs, capture, numerics.", _compare
    ),
    "convert": Command(
        "Move checkpoints between formats and clusters, and prove that nothing was lost: import, export, "
        "migrate, verify.",
        _convert,
    ),
    "data": Command(
        "Look at a data set: `rb data stats data.train=[my.jsonl] model.hf_path=DIR --out stats.json` counts "
        "sample sizes.",
        _data,
    ),
    "demo": Command(
        "The main job on this machine: import, train in 4 processes, evaluate, export, reload with transformers.", _demo
    ),
    "demo-data": Command("`rb demo-data`: training and held-out conversations from simulated episodes.", _demo_data),
    "demo-model": Command(
        "`rb demo-model`: a tiny randomly initialised Hugging Face folder of the RoboBrain architecture.", _demo_model
    ),
    "doctor": Command(
        "Check every machine of a cluster: devices, memory, disk, libraries, speed and links; name the bad one.",
        _doctor,
    ),
    "eval": Command(
        "Score a model, or recorded answers, on FlagEvalMM's data.json: table, json and an HTML report with pictures.",
        _eval,
    ),
    "launch": Command(
        "Start a training run here, over ssh or under Slurm, and look after it, e.g. `rb launch experiment=demo`.",
        _launch,
    ),
    "parity": Command("Compare this stack with transformers on the same samples: blocks, logits, gradients.", _parity),
    "plan": Command(
        "Predict the fastest layout for a model, a kind of device and a data set, e.g. `rb plan "
        "model=robobrain20_32b ...`.",
        _plan,
    ),
    "rehearse": Command(
        "Run the real step of single ranks of a GPU run on this machine without a GPU, and find what would fail there.",
        _rehearse,
    ),
    "train": Command("Be one process of a training run; srun, torchrun or `rb launch` start one per device.", _train),
    "value": Command(
        "Dense value: `label` episodes into hop samples, `score` episodes with answers of a model, `plot` the curves.",
        _value,
    ),
}

if __name__ == "__main__":
    sys.exit(main())
