"""What the rehearsed ranks together say of a run: memory by stage, waits, messages by link, defects."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_rb.rehearsal.launches import Launch
from megatron_rb.rehearsal.match import Defect, Transcript, defects
from megatron_rb.rehearsal.messages import BETWEEN_TWO, Group, Message
from megatron_rb.rehearsal.moved import CheckpointSummary, summarise_checkpoint
from megatron_rb.rehearsal.packages.catalogue import BY_NAME
from megatron_rb.rehearsal.prepare import Rehearsal
from megatron_rb.rehearsal.records import Phase, RehearsedRank
from megatron_rb.rehearsal.run import Rehearsed

SHOWN_LINES = 12
"""Of the memory of a stage."""
INSIDE, BETWEEN, ALONE = "inside a node", "between nodes", "alone"
GLOO = "gloo"

APPROXIMATIONS = (
    "values: none are computed; what the host reads is taken to be 1, finite and not stopped",
    "memory: blocks of 512 bytes as torch's allocator rounds them, without fragmentation, workspaces of cuBLAS and "
    "cuDNN, buffers of NCCL and the driver's context (reserved_memory of the device stands for these)",
    "kernels: their arguments are checked, their results are not; operators of torch are told by their shapes",
    "FLOPs: of matrix products, convolutions and attention over packed sequences, for the keys that each query sees",
    "time, links and faults of hardware: not at all",
    "ranks that were not rehearsed are taken to be like those of their class",
)


@dataclass(frozen=True)
class StageSummary:
    """One pipeline rank: the largest figures of its rehearsed ranks."""

    pp_rank: int
    blocks: str
    """Of the layout."""
    peak_bytes: int
    peak_phase: str
    peak_rank: int
    kinds: dict[str, int]
    lines: list[tuple[str, str, int]]
    """Kind, line and bytes of what is held at the peak."""
    memory_bytes: int
    """Of the device, less what its libraries take."""
    waits: list[tuple[str, str, int]]
    """Kind, line and number in the last step."""
    operations: int
    flops: int
    """Of the last step."""
    uncounted: int
    """Calls of attention that are not among them."""
    groups: int
    communicators: int
    """Groups over NCCL that a step or the start has used."""
    gloo_peers: int
    """Other ends of the rank's gloo groups: sockets when all of them are opened."""
    bytes_by_link: dict[str, int]
    """What the rank sends in the last step, by kind of link."""

    @property
    def headroom(self) -> float:
        """Share of the memory that stays free; negative = it does not fit."""
        return 1 - self.peak_bytes / self.memory_bytes


@dataclass(frozen=True)
class RehearsalSummary:
    """All that `rb rehearse` tells."""

    name: str
    world_size: int
    degrees: dict[str, int]
    layout: str
    device: str
    packages: dict[str, str]
    """Releases that were stood in for, by name."""
    samples: str
    """What they were drawn from."""
    micro_batches: int
    largest_batch: tuple[int, int]
    """Tokens and patches, padding included."""
    ranks: list[int]
    stages: list[StageSummary]
    defects: list[Defect]
    launches: int
    """Different ways in which Triton kernels are started."""
    seconds: float
    """CPU time of the rehearsal."""
    checkpoint: CheckpointSummary | None = None
    """None = none was rehearsed."""

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong: every message has its other side, and everything fits."""
        return not self.defects and all(stage.headroom >= 0 for stage in self.stages)

    @property
    def unseen_stages(self) -> list[int]:
        """Pipeline ranks of which no rank was rehearsed."""
        return sorted(set(range(self.degrees["pp"])) - {stage.pp_rank for stage in self.stages})

    @property
    def verdict(self) -> str:
        """What is said where no defect was found."""
        if self.unseen_stages:
            numbers = ", ".join(map(str, self.unseen_stages))
            return (
                f"what the rehearsed ranks send and call has its other side among them; pipeline rank {numbers} was "
                f"not rehearsed: its memory is not known, and its messages are taken to fit (--ranks classes takes all)"
            )
        return "every message and every collective has its other side; nobody waits for ever"

    @property
    def approximations(self) -> list[str]:
        """What a rehearsal does not know, the packages that were stood in for among them."""
        words = [f"{name}: {text}" for name in self.packages for text in BY_NAME[name].approximations]
        return [*APPROXIMATIONS, *words]

    def as_json(self) -> dict[str, Any]:
        tree = asdict(self)
        for stage, written in zip(self.stages, tree["stages"], strict=True):
            written["headroom"] = stage.headroom
        return tree | {"sound": self.sound, "unseen_stages": self.unseen_stages, "approximations": self.approximations}


def summarise(rehearsal: Rehearsal, rehearsed: Rehearsed) -> RehearsalSummary:
    """Put the records of the ranks together."""
    records = rehearsed.records
    by_stage: dict[int, list[RehearsedRank]] = defaultdict(list)
    for record in records:
        by_stage[record.pp_rank].append(record)
    sizes = [size for record in records for size in record.sizes]
    launches: set[Launch] = {launch for record in records for phase in record.phases for launch in phase.launches}
    grid = rehearsal.grid
    return RehearsalSummary(
        rehearsal.config.name,
        grid.world_size,
        {"tp": grid.tp_size, "pp": grid.pp_size, "cp": grid.cp_size, "dp": grid.dp_size},
        str(rehearsal.layout),
        rehearsal.device.name,
        rehearsal.packages,
        rehearsal.request.histogram or f"the mix {rehearsal.mix.name}",
        max(len(record.sizes) for record in records),
        (max(tokens for tokens, _ in sizes), max(patches for _, patches in sizes)),
        [record.rank for record in records],
        [_stage(rehearsal, number, by_stage[number]) for number in sorted(by_stage)],
        [
            *defects([_transcript(record) for record in records]),
            *(
                Defect("failure", f"{each.name} fails in {_words(each.phases[-1])}: {each.failure}")
                for each in records
                if each.failure
            ),
            *(Defect("kernel", line) for line in rehearsed.kernels),
        ],
        len(launches),
        sum(phase.seconds for record in records for phase in record.phases),
        summarise_checkpoint(records, grid, rehearsal.device.devices_per_node),
    )


def _words(phase: Phase) -> str:
    return "a step" if phase.name.startswith("step") else f"its {phase.name}"


def _transcript(record: RehearsedRank) -> Transcript:
    messages = [message for phase in record.phases for message in phase.messages]
    return Transcript(record.rank, {group.name: group for group in record.groups}, messages)


def _stage(rehearsal: Rehearsal, number: int, records: Sequence[RehearsedRank]) -> StageSummary:
    record, phase = max(
        ((record, phase) for record in records for phase in record.phases), key=lambda pair: pair[1].peak.bytes
    )
    last = [phase for phase in record.phases if phase.name.startswith("step")][-1]
    device = rehearsal.device
    return StageSummary(
        number,
        " and ".join(_slices(rehearsal)[part.index] for part in rehearsal.layout.slices_of_rank(number)),
        phase.peak.bytes,
        phase.name,
        record.rank,
        phase.peak.kinds,
        phase.peak.lines[:SHOWN_LINES],
        int(device.memory - device.reserved_memory),
        last.waits,
        last.operations,
        last.flops,
        last.uncounted,
        len(record.groups),
        len(_used(record)),
        sum(len(group.ranks) - 1 for group in record.groups if _over_gloo(group)),
        dict(_bytes_by_link(record, last, device.devices_per_node)),
    )


def _slices(rehearsal: Rehearsal) -> list[str]:
    """The slices of the layout as text."""
    return str(rehearsal.layout).split(" | ")


def _over_gloo(group: Group) -> bool:
    return GLOO in group.backend or group.backend == "inherited"


def _used(record: RehearsedRank) -> set[str]:
    return {message.group for phase in record.phases for message in phase.messages if message.device != "cpu"}


def _bytes_by_link(record: RehearsedRank, phase: Phase, devices_per_node: int) -> Counter[str]:
    """Bytes that a rank sends, collectives counted as rings."""
    groups = {group.name: group for group in record.groups}
    sent: Counter[str] = Counter()
    for message in phase.messages:
        link, size = _way(record.rank, groups, message, devices_per_node)
        sent[link] += size
    return sent


def _way(rank: int, groups: Mapping[str, Group], message: Message, devices_per_node: int) -> tuple[str, int]:
    ranks = groups[message.group].ranks
    others = (message.peer,) if message.kind in BETWEEN_TWO else ranks
    if len(ranks) == 1 or message.kind == "recv_":
        return ALONE, 0
    link = INSIDE if all(other // devices_per_node == rank // devices_per_node for other in others) else BETWEEN
    share = (len(ranks) - 1) / len(ranks)
    factor = {"send": 1.0, "allreduce_": 2 * share, "broadcast_": 1.0}.get(message.kind, share)
    return link, round(message.size * factor)
