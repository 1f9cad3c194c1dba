"""Answers of this stack to prompts, on any layout: images once through the ViT, then token by token from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rb.data.sample import EncodedSample
from megatron_rb.generation.sampling import choose_tokens, draws_of
from megatron_rb.generation.spec import Sampling
from megatron_rb.layout import Kind
from megatron_rb.models.generation_inputs import first_new_positions, next_tokens, prompt_batch
from megatron_rb.models.inputs import MicroBatch, text_to_device, to_device
from megatron_rb.models.language.blocks import HeadOutput
from megatron_rb.models.language.cache import DecoderCache
from megatron_rb.models.stage import RoboBrainStage
from megatron_rb.parallel.collectives import gather_over
from megatron_rb.parallel.groups import replica_group_gloo
from megatron_rb.parallel.session import Session
from megatron_rb.train.pipeline import ReceivedValues, received_values, run_schedule


@dataclass(frozen=True)
class AnswerLimits:
    """When an answer ends."""

    eos_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass
class _Batch:
    """Sequences that go through the pipeline side by side."""

    prompts: MicroBatch
    cache: DecoderCache
    positions: np.ndarray
    """Of the token that comes next, `[sequences]`."""
    draws: list[np.random.Generator]
    answers: list[list[int]]
    running: list[bool]

    @property
    def last_tokens(self) -> list[int]:
        """What is fed next; a finished sequence goes on with token 0, which nobody reads."""
        return [answer[-1] if running else 0 for answer, running in zip(self.answers, self.running, strict=True)]

    def take(self, tokens: Sequence[int], limits: AnswerLimits) -> None:
        """Append a chosen token to every sequence that still runs."""
        for number, token in enumerate(tokens):
            if not self.running[number]:
                continue
            if token in limits.eos_ids:
                self.running[number] = False
                continue
            self.answers[number].append(token)
            self.running[number] = len(self.answers[number]) < limits.max_new_tokens

    def draw(self) -> torch.Tensor:
        """The next draw of every sequence that runs."""
        pairs = zip(self.draws, self.running, strict=True)
        return torch.tensor([draws.random() if running else 0.0 for draws, running in pairs], dtype=torch.float32)


class Generator:
    """Generates with the chunks of this rank; all ranks of one copy of the model call it with the same prompts.

    Args:
        watch: called with the logits `[sequences, vocab]` of every pass on the ranks with the head.
    """

    def __init__(
        self,
        stages: Sequence[RoboBrainStage],
        session: Session,
        limits: AnswerLimits,
        sampling: Sampling,
        watch: Callable[[torch.Tensor], None] = lambda logits: None,
    ) -> None:
        self.stages = list(stages)
        self.session = session
        self.shape, self.mesh, self.device = session.shape, session.mesh, session.device
        self.limits = limits
        self.sampling = sampling
        self.sequence_parallel = self.stages[0].config.sequence_parallel
        self.watch = watch
        self.source = self.mesh.answering_rank
        self.group = replica_group_gloo(self.mesh)

    def answer(self, batches: Sequence[Sequence[EncodedSample]]) -> list[list[list[int]]]:
        """New tokens of every prompt of every batch, without the end token, on every rank.

        Batches fill the stages of a pipeline, so give `pp_size` of them at a time.

        Args:
            batches: prompts, with pixels on ranks with the patch embedding.
        """
        if not batches:
            return []
        running = [self._start(prompts) for prompts in batches]
        everything = list(running)
        interleaved = self.mesh.vpp_size > 1
        if interleaved:  # whose schedule takes multiples of the stages only
            running += [self._start([]) for _ in range(-len(running) % self.mesh.pp_size)]
        with torch.no_grad():
            logits = self._pass(running, self._read_prompts, self._prompt_values)
            while True:
                self._choose(running, logits)
                unfinished = [batch for batch in running if any(batch.running)]
                if not unfinished:
                    return [batch.answers for batch in everything]
                running = running if interleaved else unfinished
                for batch in running:
                    batch.cache.advance()
                logits = self._pass(running, self._read_tokens, self._token_values)
                for batch in running:
                    batch.positions = batch.positions + 1

    def _pass(self, batches: Sequence[_Batch], step: Callable, values: ReceivedValues) -> list[torch.Tensor]:
        """Logits of every batch on ranks with the head."""
        return run_schedule(
            self.session, self.stages, batches, step, values, forward_only=True, collect_non_loss_data=True
        )

    def _prompt_values(self, number: int, batch: _Batch) -> int:
        return received_values(self.session, self.stages[0].rows_split_over, number, batch.prompts)

    def _token_values(self, number: int, batch: _Batch) -> int:
        """See `RoboBrainStage.decode`: what has not passed the embedding is one number."""
        before = self.session.layout.slice(number - 1).blocks
        if all(block.kind in (Kind.PATCH_EMBED, Kind.VISION, Kind.MERGER) for block in before):
            return 1
        rows = -(-max(1, len(batch.running)) // self._multiple) * self._multiple
        return rows // self.stages[0].rows_split_over * self.shape.text.hidden_size

    @property
    def _multiple(self) -> int:
        """Of the tokens of a pass."""
        return self.mesh.tp_size if self.sequence_parallel else 1

    def _start(self, prompts: Sequence[EncodedSample]) -> _Batch:
        mesh, count = self.mesh, len(prompts)
        packed = prompt_batch(
            prompts,
            self.shape,
            tp_rank=mesh.tp_rank,
            tp_size=mesh.tp_size,
            sequence_parallel=self.sequence_parallel,
        )
        lengths = [len(prompt.input_ids) for prompt in prompts]
        return _Batch(
            prompts=packed,
            cache=DecoderCache(lengths, self.limits.max_new_tokens, self.device),
            positions=first_new_positions(packed, count),
            draws=[draws_of(self.sampling.seed, prompt.sample_id) for prompt in prompts],
            answers=[[] for _ in prompts],
            running=[True] * count,
        )

    def _read_prompts(self, batches: Iterator[_Batch], chunk: RoboBrainStage) -> tuple[torch.Tensor, Callable]:
        batch = next(batches)
        prompts = to_device(batch.prompts, self.shape, self.device)
        return chunk(prompts, HeadOutput.LABEL_LOGITS, batch.cache), _as_fp32

    def _read_tokens(self, batches: Iterator[_Batch], chunk: RoboBrainStage) -> tuple[torch.Tensor, Callable]:
        batch = next(batches)
        text = next_tokens(batch.last_tokens, batch.positions, self._multiple)
        return chunk.decode(text_to_device(text, self.shape, self.device), batch.cache), _as_fp32

    def _choose(self, batches: Sequence[_Batch], outputs: Sequence[torch.Tensor]) -> None:
        """Choose on the last stage, tell all ranks of this copy of the model, append."""
        sizes = [len(batch.running) for batch in batches]
        chosen = torch.zeros(sum(sizes), dtype=torch.int64)
        if outputs:
            parts = [self._tokens(batch, local) for batch, local in zip(batches, outputs, strict=True)]
            chosen = torch.cat(parts).cpu()
        # One rank decides, so that a difference in rounding between two can never part them.
        dist.broadcast(chosen, src=self.source, group=self.group)
        for batch, tokens in zip(batches, chosen.split(sizes), strict=True):
            batch.take(tokens.tolist(), self.limits)

    def _tokens(self, batch: _Batch, local: torch.Tensor) -> torch.Tensor:
        shards = gather_over(local, self.mesh.tp_group)
        logits = torch.cat(shards, dim=-1)[: len(batch.running), : self.shape.text.vocab_size]
        self.watch(logits)
        return choose_tokens(logits, self.sampling, batch.draw())


def _as_fp32(logits: torch.Tensor, non_loss_data: bool = True) -> Any:
    return logits.float()
