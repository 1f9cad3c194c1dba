"""Cases for test_first_weights: what every rank reads at a start, and what it holds then."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.in_turn import adapted_cpu, each_layout


def starts(cases: list[dict], fails_on: int | None = None) -> list[dict[str, Any]]:
    """Per case what this rank read (bytes by tensor), its error, hashes of its weights and of those read alone.

    Args:
        fails_on: the rank whose file cannot be read.
    """
    adapted_cpu()
    from megatron_rb.checkpoint.hf.reader import HFReader
    from megatron_rb.models.build import ModelOptions, build_stages, named_parameters
    from megatron_rb.train import build

    found = []
    for case, session in each_layout(cases):
        read: dict[str, int] = {}
        error = ""
        stages = build_stages(session, ModelOptions())
        with _counted(HFReader, build, read, dist.get_rank() == fails_on):
            try:
                build.initialise(stages, session, case.get("init", case["hf"]), seed=3)
            except OSError as problem:
                error = str(problem)
        weights = {name: _hash(parameter) for name, parameter in named_parameters(stages)}
        described = replace(session.mesh, groups={})
        build.initialise(stages, replace(session, mesh=described), case.get("init", case["hf"]), seed=3)
        alone = {name: _hash(parameter) for name, parameter in named_parameters(stages)}
        place = [session.mesh.tp_rank, session.mesh.pp_rank]
        found.append({"read": read, "weights": weights, "alone": alone, "error": error, "place": place})
    return found


class _counted:
    """Notes what the readers of a block read, how often in bytes."""

    def __init__(self, reader: Any, build: Any, read: dict[str, int], fails: bool) -> None:
        self.reader, self.build, self.read, self.fails = reader, build, read, fails

    def __enter__(self) -> None:
        self.old = plain, random = self.reader.read, self.build.random_weights
        self.reader.read = lambda reader, name: self._note(name, lambda: plain(reader, name))

        def noted(stages: Any, seed: int) -> Any:
            draw = random(stages, seed)
            return lambda name: self._note(name, lambda: draw(name))

        self.build.random_weights = noted

    def __exit__(self, *_: object) -> None:
        self.reader.read, self.build.random_weights = self.old

    def _note(self, name: str, get: Any) -> torch.Tensor:
        if self.fails:
            raise OSError(f"{name} lies on a disk that is gone")
        full = get()
        self.read[name] = self.read.get(name, 0) + full.numel() * full.element_size()
        return full


def _hash(parameter: torch.Tensor) -> str:
    return hashlib.sha256(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def missing_on(case: dict, rank: int) -> str:
    """What a rank says when `rank` alone looks for the weights where nothing is."""
    adapted_cpu()
    from megatron_rb.models.build import ModelOptions
    from megatron_rb.train.build import build_model

    for _, session in each_layout([case]):
        try:
            build_model(session, ModelOptions(), "/nowhere" if dist.get_rank() == rank else case["hf"])
        except ValueError as error:
            return str(error)
    return ""
