"""The samples of each step, packed and decoded ahead of time, with a state that resumes exactly."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from megatron_rb.data.fingerprint import DataFingerprint, of_state
from megatron_rb.data.ledger import Ledger
from megatron_rb.data.packing import Budget, Plan, fill_step, most_that_fit, plan_step, share_out
from megatron_rb.data.padding import Size, plan_sizes
from megatron_rb.data.problems import BadSample
from megatron_rb.data.sample import EncodedSample
from megatron_rb.data.sampler import Sampler, SamplerState

log = logging.getLogger(__name__)


class SampleSource(Protocol):
    """A data set as the loader sees it; all methods may be called from several threads."""

    @property
    def sizes(self) -> np.ndarray:
        """int `[samples, 2]`: tokens and patches."""

    def __len__(self) -> int: ...

    def get(self, number: int, *, with_pixels: bool) -> EncodedSample:
        """One sample; BadSample when its media do not decode."""

    def blank(self, number: int) -> EncodedSample:
        """The same sample with zeros for pixels."""

    def source(self, number: int) -> tuple[str, int]:
        """File and line."""


@dataclass(frozen=True)
class Unreadable:
    """A sample of a step whose pixels are zeros since its media do not decode."""

    micro_batch: int
    place: int
    """In the micro-batch."""
    sample_id: str
    file: str
    line: int
    reason: str
    problem: str
    """A few words that samples with the same fault share."""


@dataclass(frozen=True)
class StepSamples:
    """What one rank trains on in one step."""

    micro_batches: list[list[EncodedSample]]
    """As many on every rank; one may be empty."""
    failed: list[Unreadable]
    epoch: int
    """Epoch of the first sample."""
    wait_seconds: float
    """Time that the caller waited for it."""
    sizes: tuple[Size, ...] = ()
    """For each micro-batch number its largest size over the data-parallel ranks; the same on every rank."""


@dataclass(frozen=True)
class StepSize:
    """How much one optimizer step holds, over all ranks."""

    budget: Budget
    """Of one micro-batch."""
    samples: int
    micro_batches: int = 0
    """Micro-batches, filled with as many samples as fit; 0 = a step is so many samples."""
    multiple: int = 1
    """Every rank gets a multiple of this many micro-batches."""


@dataclass(frozen=True)
class RankShare:
    """Which part of a step this rank reads."""

    dp_rank: int = 0
    dp_size: int = 1
    needs_pixels: bool = False
    """This rank holds the patch embedding."""
    decode_rank: int = 0
    decode_size: int = 1
    """Place among the ranks that hold the same patch embedding and read the same micro-batches. Each opens its share of
    the media of a step; the other samples have zeros for pixels."""


@dataclass(frozen=True)
class SampleOrder:
    """The order of samples, and what a state says of the data they are of."""

    seed: int
    shuffle: bool = True
    fingerprint: DataFingerprint | None = None
    """Of the data set; None = states say nothing of the data, and fit any."""
    allow_changed: bool = False
    """Accept the state of other data, with a warning."""


@dataclass(frozen=True)
class ReadAhead:
    """What is prepared before it is asked for."""

    steps: int
    """Steps beyond the one that is asked for."""
    threads: int


@dataclass(frozen=True)
class _Prepared:
    """A step under way."""

    numbers: list[list[int]]
    """For each micro-batch its samples in the data set."""
    samples: list[list[Future[tuple[EncodedSample, BadSample | None]]]]
    epoch: int
    after: SamplerState
    sizes: tuple[Size, ...]


class StepLoader:
    """Steps of so many samples, or micro-batches, in the order of the sampler; every rank gets its share of each.

    Which samples a step holds depends on the seed and on the samples consumed so far, not on `dp_size`.
    """

    def __init__(
        self,
        dataset: SampleSource,
        size: StepSize,
        share: RankShare,
        order: SampleOrder,
        ledger: Ledger,
        read_ahead: ReadAhead,
    ) -> None:
        self._dataset = dataset
        self._size, self._share, self._order, self._read_ahead = size, share, order, read_ahead
        self._ledger = ledger
        self._sampler = Sampler(len(dataset), order.shuffle)
        self._consumed = SamplerState(order.seed)
        self._ahead: deque[_Prepared] = deque()
        self._pool = ThreadPoolExecutor(read_ahead.threads, thread_name_prefix="decode")

    def next_step(self) -> StepSamples:
        """The next step; waits until its samples are decoded.

        Raises:
            ValueError: a data file has changed since it was indexed.
        """
        started = time.perf_counter()
        while len(self._ahead) <= self._read_ahead.steps:
            self._prepare()
        step = self._ahead.popleft()
        results = [[future.result() for future in members] for members in step.samples]
        failed: list[Unreadable] = []
        for batch, members in enumerate(results):
            for place, (sample, problem) in enumerate(members):
                if problem is not None:
                    file, line = self._dataset.source(step.numbers[batch][place])
                    failed.append(Unreadable(batch, place, sample.sample_id, file, line, str(problem), problem.problem))
        self._consumed = step.after
        micro_batches = [[sample for sample, _ in members] for members in results]
        return StepSamples(micro_batches, failed, step.epoch, time.perf_counter() - started, step.sizes)

    def note(self, step: StepSamples) -> None:
        """Write the unreadable samples of a step into the ledger; a step that is thrown away leaves no trace there."""
        for sample in step.failed:
            self._ledger.record(
                "unreadable",
                sample.file,
                sample.reason,
                line=sample.line,
                id=sample.sample_id,
                problem=sample.problem,
                epoch=step.epoch,
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the steps handed out so far end: `seed`, `epoch`, `position`, and of which data; equal on all ranks."""
        data = {} if self._order.fingerprint is None else {"data": self._order.fingerprint.as_state()}
        return asdict(self._consumed) | data

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the steps that a state stands for, whatever the layout that saved it.

        Raises:
            ValueError: the state is one of other data, or lies beyond the end of this data set.
        """
        restored = SamplerState(int(state["seed"]), int(state["epoch"]), int(state["position"]))
        if self._changed(state, restored) and restored.position >= len(self._dataset):
            restored = SamplerState(restored.seed, restored.epoch + 1)
        if not 0 <= restored.position < len(self._dataset):
            raise ValueError(
                f"the loader state stands at sample {restored.position} of an epoch but there are {len(self._dataset)} "
                f"samples; resume with the data the run was started with, or start a new run"
            )
        self._drop_ahead()
        self._consumed = restored

    def _changed(self, state: Mapping[str, Any], restored: SamplerState) -> bool:
        """Whether a state is one of other data than these, and may be continued all the same.

        Raises:
            ValueError: it is, and may not.
        """
        if self._order.fingerprint is None:
            return False
        if "data" not in state:
            self._warn("the checkpoint does not say of which data it is; whether they have changed is not checked")
            return False
        change = self._order.fingerprint.change_since(of_state(state["data"]))
        if change and not self._order.allow_changed:
            raise ValueError(
                f"the data are not those of the checkpoint: {change}. Samples would come in another order, some of the "
                f"epoch twice and others never. Put the old data back, choose another run_dir for a new run, or set "
                f"data.allow_changed=true to go on at sample {restored.position} of the new order"
            )
        if change:
            self._warn(
                f"the data are not those of the checkpoint: {change}; data.allow_changed is set, so the run goes on in "
                f"the new order, and some samples of this epoch come twice and others never"
            )
        return bool(change)

    def _warn(self, text: str) -> None:
        if self._ledger.rank == 0:
            log.warning(text)

    def close(self) -> None:
        """Stop the threads; what was prepared is lost, and belongs to no returned step."""
        self._drop_ahead()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _drop_ahead(self) -> None:
        for step in self._ahead:
            for members in step.samples:
                for future in members:
                    future.cancel()
        self._ahead.clear()

    def _prepare(self) -> None:
        """Plan one more step and hand its samples to the decode threads."""
        before = self._ahead[-1].after if self._ahead else self._consumed
        numbers, after, plan = self._plan(before)
        rows = self._dataset.sizes[numbers]
        mine = [numbers[members].tolist() for members in plan[self._share.dp_rank]]
        owners = iter(
            share_out(self._dataset.sizes[[n for members in mine for n in members], 1], self._share.decode_size)
        )
        samples = [
            [self._pool.submit(self._fetch, number, next(owners) == self._share.decode_rank) for number in members]
            for members in mine
        ]
        self._ahead.append(_Prepared(mine, samples, before.epoch, after, plan_sizes(rows, plan)))

    def _plan(self, before: SamplerState) -> tuple[np.ndarray, SamplerState, Plan]:
        """Samples of the next step, the state after them, and which micro-batch each goes to."""
        if not self._size.micro_batches:
            numbers, after = self._sampler.take(before, self._size.samples)
            return (
                numbers,
                after,
                plan_step(self._dataset.sizes[numbers], self._size.budget, self._share.dp_size, self._size.multiple),
            )
        numbers = self._more_than_fit(before)
        taken, plan = fill_step(
            self._dataset.sizes[numbers], self._size.budget, self._share.dp_size, self._size.micro_batches
        )
        return numbers[:taken], self._sampler.advance(before, taken), plan

    def _more_than_fit(self, before: SamplerState) -> np.ndarray:
        """Coming samples, one more at least than the micro-batches of a step can hold."""
        count = 8 * self._size.micro_batches
        while True:
            numbers, _ = self._sampler.take(before, count)
            if most_that_fit(self._dataset.sizes[numbers], self._size.budget, self._size.micro_batches) < count:
                return numbers
            count *= 2

    def _fetch(self, number: int, mine: bool) -> tuple[EncodedSample, BadSample | None]:
        """The sample, and why its pixels are zeros, if they are for another reason than that another rank has them."""
        if self._share.needs_pixels and not mine:
            return self._dataset.blank(number), None
        try:
            return self._dataset.get(number, with_pixels=self._share.needs_pixels), None
        except BadSample as problem:
            return self._dataset.blank(number), problem
