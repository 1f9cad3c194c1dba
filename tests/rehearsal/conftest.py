"""Rehearsals of tiny models: several runs share the processes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_rb.platform.guard import COMPILERS
from megatron_rb.rehearsal import run as starting
from megatron_rb.rehearsal.prepare import RehearsalRequest, prepare
from megatron_rb.rehearsal.run import rehearse
from megatron_rb.rehearsal.summary import RehearsalSummary, summarise
from megatron_rb.rehearsal.worker import REHEARSE
from tests.rehearsal.preloaded import fork_worker


def pytest_collection_modifyitems(items):
    if not any(shutil.which(compiler) for compiler in COMPILERS):
        here = [item for item in items if Path(__file__).parent in item.path.parents]
        for item in here:
            item.add_marker(pytest.mark.skip(reason="a rehearsal needs a C++ compiler"))


@pytest.fixture(scope="session", autouse=True)
def workers_are_forked():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(starting, "start_worker", fork_worker)
        yield


def rehearsed(requests: list[RehearsalRequest], folder: Path, worker: str = REHEARSE) -> list[RehearsalSummary]:
    """What the rehearsals of several runs say."""
    prepared = [prepare(request, folder / f"prepared_{number}") for number, request in enumerate(requests)]
    found = rehearse(prepared, folder, worker=worker)
    return [summarise(run, each) for run, each in zip(prepared, found, strict=True)]


def request_of(hf: Path, layout: str, *settings: str, tp=1, pp=1, cp=1, sp=False, dp=1, **options) -> RehearsalRequest:
    """A run of a tiny model."""
    words = [
        f"model.hf_path={hf}",
        f"parallel.layout='{layout}'",
        *(f"parallel.{name}_size={size}" for name, size in (("tp", tp), ("pp", pp), ("cp", cp))),
        f"parallel.sequence_parallel={sp}",
        f"world_size={tp * pp * cp * dp}",
        "data.seq_length=1536",
        "data.max_patches=6144",
        *settings,
    ]
    return RehearsalRequest(tuple(words), **{"micro_batches": 2, "compiled": False, "mix": "tiny"} | options)
