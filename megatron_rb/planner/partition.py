"""The cut of the block list over slices: exact dynamic programming, then a search among simulated schedules.

The dynamic programme minimises `sum of slice times + (micro-batches - 1) x the longest slice`, the time of a pipeline
whose micro-batches are all the average one, under the memory limit and with recompute chosen for every slice. What is
played through afterwards are sampled micro-batches: all cuts where there are few, else the neighbours of the best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from megatron_rb.planner.memory import (
    FRAGMENTATION,
    MemoryModel,
    SliceRecompute,
    layers_in,
    shared_parameters,
    waiting_before,
)
from megatron_rb.planner.schedule import Timing, most_in_flight, simulate
from megatron_rb.planner.work import PARTS, VISION_LAYERS, Part

NANOSECONDS = 1e9
NEVER = 2**60
"""Stands for a slice that does not fit."""
FEW_CUTS = 1000
"""So many cuts are all played through."""
CUTS_AT_ONCE = 128
MOST_MOVES = 12

WINDOW, FULL, DECODER = (PARTS.index(part) for part in (*VISION_LAYERS, Part.DECODER))


@dataclass(frozen=True)
class Pipeline:
    """Everything about one choice of degrees and micro-batches; only the cut is open."""

    prefix: np.ndarray
    """int64 `[blocks + 1, parts]`: parts of the first blocks."""
    vision_prefix: np.ndarray
    """int64 `[vision layers + 1, parts]`: the same over the vision layers alone, without their DeepStack mergers."""
    forward: np.ndarray
    """Seconds `[parts, draws, micro-batches]`."""
    backward: np.ndarray
    transfer: np.ndarray
    """Seconds to move what crosses a cut in front of a block, `[links, blocks + 1, draws, micro-batches]`."""
    link_of: tuple[int, ...]
    """Link behind each slice."""
    memory: MemoryModel
    limit: float
    """Bytes of a device."""
    pp_size: int
    vpp_size: int
    num_micro_batches: int
    """Of a rank in a step; where fewer are drawn, the rest is extrapolated."""
    least_first: int = 1
    """Blocks that the first slice holds at least; more than one to keep the ViT together."""

    @property
    def num_blocks(self) -> int:
        return len(self.prefix) - 1

    @property
    def num_slices(self) -> int:
        return self.pp_size * self.vpp_size

    def in_flight(self, rank: int) -> np.ndarray:
        return most_in_flight(self.pp_size, self.vpp_size, self.num_micro_batches, rank)


@dataclass(frozen=True)
class Choices:
    """Recompute of slices; arrays over whatever the slices are."""

    fits: np.ndarray
    vision: np.ndarray
    language: np.ndarray

    def take(self, places: np.ndarray) -> Choices:
        """Those of some slices."""
        return Choices(self.fits[places], self.vision[places], self.language[places])

    def again_seconds(self, pipeline: Pipeline, starts: np.ndarray, forward: np.ndarray) -> np.ndarray:
        """Time of what is computed twice; `recomputed` without its table.

        Args:
            forward: seconds of each part, `[parts]`.
        """
        layers = len(pipeline.vision_prefix) - 1
        seconds, first = pipeline.vision_prefix @ forward, np.clip(starts - 1, 0, layers)
        vision = seconds[np.minimum(first + self.vision, layers)] - seconds[first]
        return vision + self.language * forward[DECODER]

    def recomputed(self, pipeline: Pipeline, starts: np.ndarray) -> np.ndarray:
        """Parts that are computed twice, `[..., parts]`."""
        layers = len(pipeline.vision_prefix) - 1
        first = np.clip(starts - 1, 0, layers)
        parts = pipeline.vision_prefix[np.minimum(first + self.vision, layers)] - pipeline.vision_prefix[first]
        parts = parts.copy()
        parts[..., DECODER] += self.language
        return parts


def room(pipeline: Pipeline) -> float:
    """Bytes of a device that tensors may take."""
    return (pipeline.limit - pipeline.memory.reserved) / (1 + FRAGMENTATION)


def choose_recompute(pipeline: Pipeline, starts: np.ndarray, counts: np.ndarray, rank: int) -> Choices:
    """The cheapest recompute with which slices fit on a rank that holds one slice.

    Args:
        starts: number of the first block of each slice, `[slices]`.
        counts: parts of each slice, `[slices, parts]`.
    """
    memory, held = pipeline.memory, int(pipeline.in_flight(rank).max())
    static = sum(memory.static(counts, shared_parameters(memory, counts)))
    # What came with the message, beside what the slice keeps; its gradient too when the pass goes back.
    features = waiting_before(pipeline.prefix[starts]) * memory.feature
    base = static + held * (counts @ memory.kept + features) + features - room(pipeline)
    plain = (memory.working * (counts > 0)).max(axis=-1)
    vision = np.zeros(counts.shape[:-1], dtype=np.int64)
    language = vision.copy()
    fits = base + plain <= 0
    short = np.flatnonzero(~fits & (static <= room(pipeline)))
    if len(short):
        found = _recompute(pipeline, starts[short], counts[short], base[short], plain[short], held)
        fits[short], vision[short], language[short] = found
    return Choices(fits, vision, language)


def _recompute(
    pipeline: Pipeline, starts: np.ndarray, counts: np.ndarray, base: np.ndarray, plain: np.ndarray, held: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each slice every number of vision layers, with the fewest decoder layers that make it fit."""
    memory = pipeline.memory
    saved = held * (memory.kept - memory.inputs)
    again = memory.working + memory.kept
    vision_layers, decoders = layers_in(counts)
    vision = np.arange(vision_layers.max(initial=0) + 1)[None, :]
    over = base[:, None] - vision * mean_vision_layer(counts, saved)[:, None]
    working = np.maximum(plain[:, None], (vision > 0) * mean_vision_layer(counts, again)[:, None])
    language = np.zeros_like(over)
    needed = np.maximum(working, again[DECODER])
    short = over + working > 0
    if saved[DECODER] > 0:
        language = np.where(short, np.ceil((over + needed) / saved[DECODER]), 0.0)
        possible = ~short | (language <= decoders[:, None])
    else:
        possible = ~short
    possible &= vision <= vision_layers[:, None]
    forward = pipeline.forward.mean(axis=(1, 2))
    choices = Choices(possible, np.broadcast_to(vision, over.shape), language.clip(0).astype(np.int64))
    cost = choices.again_seconds(pipeline, np.broadcast_to(starts[:, None], over.shape), forward)
    cost = np.where(possible, cost, np.inf)
    best = cost.argmin(axis=1)
    rows = np.arange(len(best))
    return np.isfinite(cost[rows, best]), best, choices.language[rows, best]


def mean_vision_layer(counts: np.ndarray, of_part: np.ndarray) -> np.ndarray:
    """Bytes of the mean vision layer of slices, `[...]`: those with windows and those without keep different ones.

    Args:
        counts: parts in each slice, `[..., parts]`.
        of_part: bytes by part, `[parts]`.
    """
    layers = counts[..., [WINDOW, FULL]]
    return layers @ of_part[[WINDOW, FULL]] / np.maximum(layers.sum(axis=-1), 1)


def slice_nanoseconds(pipeline: Pipeline, rank: int) -> np.ndarray:
    """int64 `[blocks + 1, blocks + 1]`: time of the slice between two cuts for the mean micro-batch, messages and
    recompute included; `NEVER` where it is empty or does not fit on the rank.
    """
    size = pipeline.num_blocks + 1
    first, end = np.triu_indices(size, 1)
    counts = pipeline.prefix[end] - pipeline.prefix[first]
    choices = choose_recompute(pipeline, first, counts, rank)
    forward, backward = pipeline.forward.mean(axis=(1, 2)), pipeline.backward.mean(axis=(1, 2))
    seconds = counts @ (forward + backward)
    again = np.flatnonzero((choices.vision > 0) | (choices.language > 0))
    seconds[again] += choices.take(again).again_seconds(pipeline, first[again], forward)
    # Both sides of a boundary wait for its messages, one forward and one backward.
    transfer = 2 * pipeline.transfer.max(axis=0).mean(axis=(1, 2))
    seconds = seconds + transfer[first] + transfer[end]
    table = np.full((size, size), NEVER, dtype=np.int64)
    table[first, end] = np.where(choices.fits, np.round(seconds * NANOSECONDS).astype(np.int64), NEVER)
    return table


def best_cut(tables: list[np.ndarray], micro_batches: int) -> tuple[int, ...] | None:
    """The cut with the smallest `sum + (micro_batches - 1) x maximum` of slice times, exactly.

    Args:
        tables: for each slice int64 `[blocks + 1, blocks + 1]` times in any unit.

    Returns:
        Slice lengths, or None when no cut fits.
    """
    lowest = shortest_maximum(tables)
    if lowest >= NEVER:
        return None
    best = _smallest_sum(tables, lowest)
    assert best is not None
    if micro_batches == 1:
        free = _smallest_sum(tables, NEVER - 1)
        assert free is not None
        return free.lengths
    weight = micro_batches - 1
    value = best.total + weight * best.longest
    free = _smallest_sum(tables, NEVER - 1)
    assert free is not None
    # Any cut with a longer slice than this is worse, whatever its sum.
    ceiling = min(int(free.longest), (value - free.total) // weight)
    while ceiling > lowest:
        found = _smallest_sum(tables, ceiling)
        assert found is not None
        if found.total + weight * found.longest < value:
            best, value = found, found.total + weight * found.longest
        ceiling = int(found.longest) - 1
    return best.lengths


@dataclass(frozen=True)
class _Cut:
    lengths: tuple[int, ...]
    total: int
    longest: int


def shortest_maximum(tables: list[np.ndarray]) -> int:
    """The smallest possible maximum over the slices of a cut; at least `NEVER` when none fits."""
    reach = np.full(len(tables[0]), NEVER, dtype=np.int64)
    reach[0] = 0
    for table in tables:
        reach = np.maximum(reach[:, None], table).min(axis=0)
    return int(reach[-1])


def _smallest_sum(tables: list[np.ndarray], longest: int) -> _Cut | None:
    """The smallest sum among the cuts without a slice above `longest`."""
    reach = np.full(len(tables[0]), NEVER, dtype=np.int64)
    reach[0] = 0
    origins = []
    for table in tables:
        sums = np.minimum(reach[:, None] + np.where(table <= longest, table, NEVER), NEVER)
        origins.append(sums.argmin(axis=0))
        reach = sums.min(axis=0)
    if reach[-1] >= NEVER:
        return None
    lengths, times, end = [], [], len(reach) - 1
    for table, origin in zip(reversed(tables), reversed(origins), strict=True):
        start = int(origin[end])
        lengths.append(end - start)
        times.append(int(table[start, end]))
        end = start
    return _Cut(tuple(reversed(lengths)), int(reach[-1]), max(times))


@dataclass(frozen=True)
class Played:
    """Cuts played through with sampled micro-batches."""

    cuts: np.ndarray
    """int64 `[cuts, slices + 1]`: block numbers at which slices begin, and the end."""
    choices: Choices
    """`[cuts, slices]`"""
    timing: Timing
    """`[cuts, draws]`"""

    @property
    def seconds(self) -> np.ndarray:
        """Expected time of each cut; infinite when it does not fit."""
        return np.where(self.choices.fits.all(axis=1), self.timing.makespan.mean(axis=1), np.inf)

    def recompute(self, number: int) -> tuple[SliceRecompute, ...]:
        pairs = zip(self.choices.vision[number].tolist(), self.choices.language[number].tolist(), strict=True)
        return tuple(SliceRecompute(vision, language) for vision, language in pairs)

    def lengths(self, number: int) -> tuple[int, ...]:
        return tuple(np.diff(self.cuts[number]).tolist())


def play(pipeline: Pipeline, cuts: np.ndarray, choices: Choices | None = None) -> Played:
    """Simulate the schedule for cuts `[cuts, slices + 1]`, with the recompute they need or a given one."""
    counts = pipeline.prefix[cuts[:, 1:]] - pipeline.prefix[cuts[:, :-1]]
    choices = choices or _choices_of_cuts(pipeline, cuts, counts)
    choices.fits[:, 0] &= cuts[:, 1] >= pipeline.least_first
    forward, backward, transfer = durations(pipeline, cuts, counts, choices)
    timing = simulate(pipeline.pp_size, pipeline.vpp_size, forward, backward, transfer)
    first = (forward + backward).sum(axis=0)[0]
    return Played(cuts, choices, extrapolated(timing, first, forward.shape[1], pipeline.num_micro_batches))


def extrapolated(timing: Timing, first: np.ndarray, played: int, count: int) -> Timing:
    """The timing of `count` micro-batches from that of the first `played`: each further one takes as long as those
    after the first did on average.

    Args:
        first: seconds that the first micro-batch takes through all slices.
    """
    if count <= played:
        return timing
    more = (count - played) * np.maximum(timing.makespan - first, 0.0) / max(played - 1, 1)
    return Timing(timing.makespan + more, timing.busy * (count / played), timing.ends + more)


def durations(
    pipeline: Pipeline, cuts: np.ndarray, counts: np.ndarray, choices: Choices
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Forward, backward and transfer seconds `[slices, micro-batches, cuts, draws]` as `simulate` takes them."""
    again = choices.recomputed(pipeline, cuts[:, :-1])
    # Micro-batches and draws as one axis, so that it is a plain matrix product.
    parts = len(PARTS)
    shape = pipeline.forward.shape[1:]

    def times(numbers: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        product = numbers.astype(np.float64) @ seconds.reshape(parts, -1)
        return product.reshape(*numbers.shape[:2], *shape).transpose(1, 3, 0, 2)

    forward = times(counts, pipeline.forward)
    backward = times(counts, pipeline.backward) + times(again, pipeline.forward)
    links = np.array(pipeline.link_of[: pipeline.num_slices - 1], dtype=np.int64)
    transfer = pipeline.transfer[links[None, :], cuts[:, 1:-1]].transpose(1, 3, 0, 2)
    return np.ascontiguousarray(forward), np.ascontiguousarray(backward), np.ascontiguousarray(transfer)


def _choices_of_cuts(pipeline: Pipeline, cuts: np.ndarray, counts: np.ndarray) -> Choices:
    if pipeline.vpp_size > 1:
        return _choices_of_chunks(pipeline, cuts, counts)
    each = [choose_recompute(pipeline, cuts[:, rank], counts[:, rank], rank) for rank in range(pipeline.pp_size)]
    return Choices(*(np.stack([getattr(item, name) for item in each], 1) for name in ("fits", "vision", "language")))


LANGUAGE_STEPS = (0, 1, 2, 4, 8, 16, 10**6)
"""Decoder layers of a chunk that are tried for recompute where a rank holds several chunks."""


def _choices_of_chunks(pipeline: Pipeline, cuts: np.ndarray, counts: np.ndarray) -> Choices:
    """Ranks with several chunks: the same recompute for all of them, the cheapest of a few."""
    pp = pipeline.pp_size
    shape = counts.shape[:2]
    result = Choices(np.zeros(shape, bool), np.zeros(shape, np.int64), np.zeros(shape, np.int64))
    forward = pipeline.forward.mean(axis=(1, 2))
    for rank in range(pp):
        mine = counts[:, rank::pp]
        fits, vision, language = _choices_of_rank(
            pipeline, cuts[:, rank:-1:pp], mine, pipeline.in_flight(rank), forward
        )
        result.fits[:, rank::pp] = fits[:, None]
        result.vision[:, rank::pp], result.language[:, rank::pp] = vision, language
    return result


def _choices_of_rank(
    pipeline: Pipeline, starts: np.ndarray, mine: np.ndarray, in_flight: np.ndarray, forward: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each cut: does the rank fit, and the layers that its chunks recompute."""
    memory = pipeline.memory
    saved, again = memory.kept - memory.inputs, memory.working + memory.kept
    static = sum(value.sum(axis=1) for value in memory.static(mine, shared_parameters(memory, mine)))
    vision_layers, decoders = layers_in(mine)
    plain = (memory.working * (mine > 0)).max(axis=(1, 2))
    cheapest = np.full(len(mine), np.inf)
    best_vision, best_language = np.zeros(mine.shape[:2], np.int64), np.zeros(mine.shape[:2], np.int64)
    for vision in (0, 10**6):
        for language in LANGUAGE_STEPS:
            open_rows = np.flatnonzero(cheapest > 0)  # nothing is cheaper than no recompute
            if not len(open_rows):
                break
            v = np.minimum(vision, vision_layers[open_rows])
            t = np.minimum(language, decoders[open_rows])
            rows = mine[open_rows]
            features = waiting_before(pipeline.prefix[starts[open_rows]]) * memory.feature
            kept = rows @ memory.kept + features - v * mean_vision_layer(rows, saved) - t * saved[DECODER]
            computed = np.maximum((v > 0) * mean_vision_layer(rows, again), (language > 0) * again[DECODER])
            working = np.maximum(plain[open_rows], (computed + features).max(axis=1))
            used = static[open_rows] + (kept @ in_flight.T).max(axis=1) + working
            choice = Choices(used, v, t)
            cost = choice.again_seconds(pipeline, starts[open_rows], forward).sum(axis=1)
            better = (used <= room(pipeline)) & (cost < cheapest[open_rows])
            rows = open_rows[better]
            cheapest[rows], best_vision[rows], best_language[rows] = cost[better], v[better], t[better]
    return np.isfinite(cheapest), best_vision, best_language


def first_cut(pipeline: Pipeline) -> tuple[int, ...] | None:
    """The cut of the dynamic programme; with several chunks a rank the memory limit is left to what follows."""
    if pipeline.num_slices > pipeline.num_blocks:
        return None
    if pipeline.vpp_size == 1:
        tables = [slice_nanoseconds(pipeline, rank) for rank in range(pipeline.pp_size)]
        tables[0][0, : pipeline.least_first] = NEVER
        return best_cut(tables, pipeline.num_micro_batches)
    unlimited = _without_limit(pipeline)
    table = slice_nanoseconds(unlimited, 0)
    # Chunks take turns: the longest is met by every micro-batch of every rank.
    first = table.copy()
    first[0, : pipeline.least_first] = NEVER
    tables = [first, *[table] * (pipeline.num_slices - 1)]
    return best_cut(tables, pipeline.num_micro_batches * pipeline.vpp_size)


def _without_limit(pipeline: Pipeline) -> Pipeline:
    return Pipeline(**{**vars(pipeline), "limit": 1e30})


def count_cuts(num_blocks: int, num_slices: int) -> int:
    """Ways to cut a list of blocks into slices."""
    return math.comb(num_blocks - 1, num_slices - 1)


def all_cuts(num_blocks: int, num_slices: int) -> np.ndarray:
    """Every cut, `[cuts, slices + 1]`."""
    chosen = list(combinations(range(1, num_blocks), num_slices - 1))
    inner = np.array(chosen, dtype=np.int64).reshape(len(chosen), num_slices - 1)
    ends = np.zeros((len(inner), 1), dtype=np.int64)
    return np.concatenate([ends, inner, ends + num_blocks], axis=1)


def refine(pipeline: Pipeline, lengths: tuple[int, ...]) -> Played:
    """The best cut by simulation: of all when they are few, else by moving blocks over boundaries, from a first one."""
    if count_cuts(pipeline.num_blocks, pipeline.num_slices) <= FEW_CUTS:
        return _best_of(pipeline, all_cuts(pipeline.num_blocks, pipeline.num_slices))
    best = play(pipeline, _cut_of(lengths)[None])
    for _ in range(MOST_MOVES):
        found = _best_of(pipeline, _neighbours(best.cuts[0]))
        if not found.seconds[0] < best.seconds[0] * (1 - 1e-6):
            break
        best = found
    return best


def _best_of(pipeline: Pipeline, cuts: np.ndarray) -> Played:
    groups = [play(pipeline, cuts[start : start + CUTS_AT_ONCE]) for start in range(0, len(cuts), CUTS_AT_ONCE)]
    group = min(groups, key=lambda item: float(item.seconds.min()))
    return play(pipeline, group.cuts[[int(group.seconds.argmin())]])


def _cut_of(lengths: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def _neighbours(cut: np.ndarray) -> np.ndarray:
    """Cuts that differ by one or two blocks at one boundary, or by one block at up to four boundaries in a row."""
    found = []
    for first in range(1, len(cut) - 1):
        for last in range(first, min(first + 4, len(cut) - 1)):
            for step in (-2, -1, 1, 2) if last == first else (-1, 1):
                moved = cut.copy()
                moved[first : last + 1] += step
                if moved[first] > moved[first - 1] and moved[last] < moved[last + 1]:
                    found.append(moved)
    return np.array(found) if found else cut[None]
