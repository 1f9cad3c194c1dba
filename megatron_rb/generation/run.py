"""A rank of a generation run: builds its part of the model and answers its share of the questions."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from megatron_rb.config.schema import Config
from megatron_rb.data.build import RefusedRows, build_dataset, build_encoder
from megatron_rb.data.dataset import ConversationDataset
from megatron_rb.data.ledger import Ledger
from megatron_rb.data.problems import BadSample, NoUsableSample
from megatron_rb.data.sample import EncodedSample
from megatron_rb.generation.generator import AnswerLimits, Generator
from megatron_rb.generation.spec import GenerationSpec, part_file, plan_batches, scratch_folder
from megatron_rb.models.build import ModelOptions
from megatron_rb.parallel.collectives import rank_zero_first
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.session import Session
from megatron_rb.train.build import build_model


def answer(session: Session, config: Config, folder: Path) -> None:
    """Answer the questions of the spec in a folder; every data-parallel rank appends to its part of the answers."""
    spec, mesh = GenerationSpec.read(folder), session.mesh
    encoder = build_encoder(config.data, config.model.hf_path, session.shape)
    stages = build_model(session, ModelOptions.of(config), spec.weights)
    limits = AnswerLimits(tuple(encoder.tokenizer.eos_ids), spec.max_new_tokens)
    generator = Generator(stages, session, limits, spec.sampling)
    with Ledger(Path(spec.out).with_suffix(".ledger.jsonl"), mesh.rank) as ledger:
        index = scratch_folder(Path(spec.out)) / "index"
        refused: RefusedRows = "leave" if mesh.rank else "again"
        build = partial(build_dataset, config.data, encoder, [spec.questions], ledger, cache_dir=index, refused=refused)
        with_pixels = any(stage.part.needs_pixels for stage in stages)
        try:
            source = Source(rank_zero_first(build), with_pixels, ledger if mesh.tp_rank == 0 else None)
        except NoUsableSample as nothing:  # what is left cannot be asked, now or later; the ledger says why
            if mesh.rank == 0:
                print(nothing, flush=True)
        else:
            _answer(spec, source, generator, encoder.tokenizer.decode)


@dataclass(frozen=True)
class Round:
    """Batches that go through the pipeline together."""

    numbers: list[list[int]]
    prompts: list[list[EncodedSample]]
    unreadable: set[int]
    """Samples whose media did not decode on this rank."""

    @property
    def flat(self) -> list[int]:
        return [number for batch in self.numbers for number in batch]


@dataclass(frozen=True)
class Source:
    """The questions, read a round ahead."""

    dataset: ConversationDataset
    with_pixels: bool
    ledger: Ledger | None
    """None on ranks beside the one that notes what cannot be read."""

    def rounds(self, batches: list[list[int]], size: int) -> Iterator[Round]:
        """Rounds of `size` batches; the next one is read while the present one is answered."""
        turns = [batches[start : start + size] for start in range(0, len(batches), size)]
        with ThreadPoolExecutor(1, thread_name_prefix="prompts") as thread:
            waiting = thread.submit(self._read, turns[0]) if turns else None
            for following in [*turns[1:], None] if turns else []:
                assert waiting is not None
                present = waiting.result()
                waiting = thread.submit(self._read, following) if following is not None else None
                yield present

    def _read(self, turn: list[list[int]]) -> Round:
        unreadable: set[int] = set()
        return Round(turn, [[self._prompt(number, unreadable) for number in batch] for batch in turn], unreadable)

    def _prompt(self, number: int, unreadable: set[int]) -> EncodedSample:
        try:
            return self.dataset.prompt(number, with_pixels=self.with_pixels)
        except BadSample as problem:
            file, line = self.dataset.source(number)
            if self.ledger is not None:
                self.ledger.record("unreadable", file, str(problem), line=line, problem=problem.problem)
            unreadable.add(number)
            return self.dataset.blank_prompt(number)


def _answer(spec: GenerationSpec, source: Source, generator: Generator, decode) -> None:  # type: ignore[no-untyped-def]
    """Answer the share of this copy of the model and write as answers come."""
    mesh, dataset = generator.mesh, source.dataset
    share = range(mesh.dp_rank, len(dataset), mesh.dp_size)
    batches = plan_batches(dataset.sizes, share, spec.limits)
    start, tokens = time.perf_counter(), 0
    with _progress(mesh) as bar, _part(spec, mesh) as lines:
        task = bar.add_task("answers", total=len(share))
        for turn in source.rounds(batches, mesh.pp_size):
            said = [answer for batch in generator.answer(turn.prompts) for answer in batch]
            unreadable = _told_by_all(turn, generator.group)
            tokens += sum(map(len, said))
            if lines is not None:
                prompts = [len(prompt.input_ids) for batch in turn.prompts for prompt in batch]
                for number, ids, prompt_tokens in zip(turn.flat, said, prompts, strict=True):
                    if number not in unreadable:
                        key = str(json.loads(dataset.row(number))["id"])
                        row = {"question_id": key, "answer": decode(ids), "prompt_tokens": prompt_tokens}
                        lines.write(json.dumps(row | {"completion_tokens": len(ids)}) + "\n")
                lines.flush()
            bar.advance(task, len(said))
    seconds = time.perf_counter() - start
    if mesh.rank == 0:
        share_text = f"{len(share)} of {len(dataset)} questions" if mesh.dp_size > 1 else f"{len(share)} questions"
        print(f"{share_text} in {seconds:.1f} s, {tokens / seconds:.1f} new tokens/s per copy of the model", flush=True)


def _part(spec: GenerationSpec, mesh: Mesh):  # type: ignore[no-untyped-def]
    """The answers file of this copy of the model, on one of its ranks."""
    first = mesh.pp_rank == 0 and mesh.tp_rank == 0
    return open(part_file(Path(spec.out), mesh.dp_rank), "a", encoding="utf-8") if first else nullcontext()


def _told_by_all(turn: Round, group: dist.ProcessGroup) -> set[int]:
    """Only ranks with the patch embedding open media, so they tell the others what could not be read."""
    mask = torch.tensor([number in turn.unreadable for number in turn.flat], dtype=torch.int32)
    dist.all_reduce(mask, op=dist.ReduceOp.MAX, group=group)
    return {number for number, flag in zip(turn.flat, mask.tolist(), strict=True) if flag}


def _progress(mesh: Mesh) -> Progress:
    """A bar over the share of the first copy of the model."""
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    shown = mesh.rank == 0 and sys.stdout.isatty()
    return Progress(*columns, console=Console(), disable=not shown, transient=True)
