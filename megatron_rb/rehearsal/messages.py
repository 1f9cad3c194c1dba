"""Every collective and message of a rank in order, with its group, tensors and line; nothing is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_iter

from megatron_rb.rehearsal.sites import site
from megatron_rb.rehearsal.stand_ins import StandIns

NO_PEER = -1


@dataclass(frozen=True)
class Group:
    """One process group that a rank is in."""

    name: str
    """Counted by torch: the same on all ranks that make the same groups in the same order."""
    ranks: tuple[int, ...]
    backend: str
    """As asked; `inherited` = that of the world."""
    site: str


@dataclass(frozen=True)
class Message:
    """One call of a collective, or one message to or from a peer."""

    kind: str
    """As in c10d: `allreduce_`, `send`, `recv_`, …; `barrier`; those of objects by their Python names."""
    group: str
    dtype: str
    device: str
    sent: tuple[tuple[int, ...], ...]
    """Shapes of what the rank gives."""
    received: tuple[tuple[int, ...], ...]
    """Shapes of what it gets, empty where that is what it gives, changed in place."""
    peer: int = NO_PEER
    """Global rank of the other side of a message; of the root of a collective that has one."""
    blocks: bool = True
    """Later calls of the rank wait for it."""
    batch: int = 0
    """Messages of one number are started together; 0 = alone."""
    site: str = ""

    @property
    def values(self) -> int:
        """Of the larger side."""
        return max(_values(self.sent), _values(self.received))

    @property
    def size(self) -> int:
        """Bytes of the larger side."""
        return self.values * getattr(torch, self.dtype).itemsize if self.values else 0


@dataclass(frozen=True)
class _Signature:
    """Where the arguments of a c10d operator are."""

    group: int
    sent: int
    received: int | None = None
    """None = in place."""
    peer: int | None = None


SIGNATURES = {
    "broadcast_": _Signature(1, 0, peer=2),
    "allreduce_": _Signature(1, 0),
    "allreduce_coalesced_": _Signature(1, 0),
    "reduce_": _Signature(1, 0, peer=3),
    "send": _Signature(1, 0, peer=2),
    "recv_": _Signature(1, 0, peer=2),
    "allgather_": _Signature(2, 1, 0),
    "_allgather_base_": _Signature(2, 1, 0),
    "allgather_into_tensor_coalesced_": _Signature(2, 1, 0),
    "reduce_scatter_": _Signature(2, 1, 0),
    "_reduce_scatter_base_": _Signature(2, 1, 0),
    "reduce_scatter_tensor_coalesced_": _Signature(2, 1, 0),
    "gather_": _Signature(2, 1, 0, peer=3),
    "scatter_": _Signature(2, 1, 0, peer=3),
    "alltoall_": _Signature(2, 1, 0),
    "alltoall_base_": _Signature(2, 1, 0),
    "barrier": _Signature(1, 0),
}
BETWEEN_TWO = ("send", "recv_")


@dataclass
class Messages:
    """What a rank says to others; `restart` forgets what was before."""

    groups: dict[str, Group] = field(default_factory=dict)
    """Those that this rank is in, by name."""
    log: list[Message] = field(default_factory=list)
    _batch: int = 0
    _batches: int = 0

    def restart(self) -> None:
        self.log = []

    def answer(self, func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Note a call of c10d and say that it is done."""
        name = func._schema.name.removeprefix("c10d::")
        if name not in SIGNATURES:
            raise RuntimeError(f"a rehearsal does not know the collective {name}")
        self._note(name, SIGNATURES[name], args, self._blocks(func, args, keywords))
        work = FakeWork().boxed()
        return (args[0], work) if len(func._schema.returns) == 2 else work

    def _blocks(self, func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
        """Whether the caller waits: not when it was told `async_op=True`, nor for messages, whose work it waits for."""
        names = [argument.name for argument in func._schema.arguments]
        if "async_op" not in names:
            return bool(self._batch)
        place = names.index("async_op")
        return not (args[place] if len(args) > place else keywords.get("async_op", True))

    def _note(self, name: str, signature: _Signature, args: tuple[Any, ...], blocks: bool) -> None:
        group = ProcessGroup.unbox(args[signature.group])
        ranks = dist.get_process_group_ranks(group)
        sent = _tensors(args[signature.sent])
        received = [] if signature.received is None else _tensors(args[signature.received])
        peer = NO_PEER if signature.peer is None else ranks[args[signature.peer]]
        plain = name == "barrier"
        first = sent[0] if sent else received[0]
        self.log.append(
            Message(
                name,
                group.group_name,
                "" if plain else str(first.dtype).removeprefix("torch."),
                "" if plain else first.device.type,
                () if plain else tuple(tuple(each.shape) for each in sent),
                tuple(tuple(each.shape) for each in received),
                peer,
                blocks,
                self._batch if name in BETWEEN_TWO else 0,
                site(),
            )
        )

    def note_objects(self, name: str, group: dist.ProcessGroup | None) -> None:
        """A collective of Python objects, which go over CPU tensors of unequal size."""
        self.log.append(Message(name, (group or _world()).group_name, "object", "cpu", (), (), site=site()))

    def together(self, operations: Sequence[dist.P2POp]) -> list[Any]:
        """Stands in for `batch_isend_irecv`."""
        self._batches += 1
        self._batch = self._batches
        try:
            return [each.op(each.tensor, each.peer, each.group, each.tag) for each in operations]
        finally:
            self._batch = 0


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None, "the world has been joined"
    return world


def stand_in_for_groups(stand_ins: StandIns, messages: Messages) -> None:
    """Let torch.distributed make groups without other processes; the world is that of the environment."""
    join, make = dist.init_process_group, dist.new_group

    def init_process_group(backend: str | None = None, **options: Any) -> None:
        rank, world_size = options["rank"], options["world_size"]
        join("fake", store=FakeStore(), rank=rank, world_size=world_size)
        name = _world().group_name
        messages.groups[name] = Group(name, tuple(range(world_size)), backend or "inherited", site())

    def new_group(ranks: Sequence[int] | None = None, timeout: Any = None, backend: str | None = None, *_, **options):
        known = {key: value for key, value in options.items() if key in ("use_local_synchronization", "group_desc")}
        group = make(ranks=ranks, backend="fake", **known)
        members = tuple(ranks) if ranks is not None else tuple(range(dist.get_world_size()))
        if dist.get_rank() in members:
            messages.groups[group.group_name] = Group(group.group_name, members, backend or "inherited", site())
        return group

    for owner in (dist, dist.distributed_c10d):
        stand_ins.set(owner, "init_process_group", init_process_group)
        stand_ins.set(owner, "new_group", new_group)
        stand_ins.set(owner, "batch_isend_irecv", messages.together)
        for name, answer in OBJECTS.items():
            stand_ins.set(owner, name, partial(answer, messages))


def _all_gather_object(
    messages: Messages, objects: list[Any], own: Any, group: dist.ProcessGroup | None = None
) -> None:
    """Everybody has what this rank has."""
    messages.note_objects("all_gather_object", group)
    objects[:] = [own] * len(objects)


def _gather_object(
    messages: Messages,
    obj: Any,
    object_gather_list: list[Any] | None = None,
    dst: int | None = None,
    group: dist.ProcessGroup | None = None,
    group_dst: int | None = None,
) -> None:
    messages.note_objects("gather_object", group)
    if object_gather_list is not None:
        object_gather_list[:] = [obj] * len(object_gather_list)


def _broadcast_object_list(
    messages: Messages, objects: list[Any], src: int | None = None, group: dist.ProcessGroup | None = None, **_: Any
) -> None:
    """What rank 0 sends is what this rank had in its place."""
    messages.note_objects("broadcast_object_list", group)


OBJECTS: dict[str, Callable[..., None]] = {
    "all_gather_object": _all_gather_object,
    "gather_object": _gather_object,
    "broadcast_object_list": _broadcast_object_list,
}


def _tensors(argument: Any) -> list[torch.Tensor]:
    return [each for each in tree_iter(argument) if isinstance(each, torch.Tensor)]


def _values(shapes: Sequence[Sequence[int]]) -> int:
    return sum(int(torch.Size(shape).numel()) for shape in shapes)
