"""Messages between pipeline stages: both sides compute their sizes, so nothing but the values is sent.

megatron-core sends the shape of every message in front of it, reads it on the host and waits for the whole device on
both sides. A stage knows its micro-batches and the layout, thus what its neighbours send it and in which order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, cast

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_rb.layout import PipelineLayout
from megatron_rb.models.flow import Boundary, boundary_before, sizes_of
from megatron_rb.models.inputs import MicroBatch
from megatron_rb.parallel.session import Session
from megatron_rb.shapes.shape import RoboBrainShape

ReceivedValues = Callable[[int, Any], int]
"""Values that a slice, by its number, gets for a batch from the slice before it."""


def received_values(session: Session, rows_split_over: int, number: int, batch: MicroBatch) -> int:
    """Values that slice `number` gets for a micro-batch."""
    return sum(sizes_of(_boundary(session.layout, session.shape, number), batch, session.shape, rows_split_over))


@cache
def _boundary(layout: PipelineLayout, shape: RoboBrainShape, number: int) -> Boundary:
    """Asked for every message, and the same in all steps."""
    return boundary_before(layout.slice(number), shape, layout.num_vision_layers, layout.num_decoder_layers)


class StatedMessages(P2PCommunicator):
    """megatron-core's messages, for which nobody asks the other side.

    Args:
        forward, backward: values of the messages that come from the stage before and after, in the order of the
            schedule.
    """

    def __init__(
        self, session: Session, config: ModelParallelConfig, forward: Iterator[int], backward: Iterator[int]
    ) -> None:
        super().__init__(session.mesh.pp_group, config)
        self._forward, self._backward = forward, backward

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        none = [0, 0, 0]
        return (
            [next(self._forward), 1, 1] if recv_prev else none,
            [next(self._backward), 1, 1] if recv_next else none,
        )


def order_of_passes(num_batches: int, session: Session) -> list[tuple[int, int]]:
    """Micro-batch and chunk of the forward passes of a rank, one after the other; backward passes of chunks counted
    from the last come in the same order."""
    mesh = session.mesh
    if mesh.vpp_size == 1:
        return [(number, 0) for number in range(num_batches)]
    return [tuple(entry) for entry in get_schedule_table(num_batches, mesh.vpp_size, mesh.pp_size)]


def stated_messages(
    session: Session, config: ModelParallelConfig, batches: Sequence[Any], values: ReceivedValues
) -> StatedMessages:
    """The messages that a rank gets in one pass over its micro-batches."""
    parts = session.layout.slices_of_rank(session.mesh.pp_rank)
    order = order_of_passes(len(batches), session)
    last = session.layout.num_slices - 1
    forward = [(parts[chunk].index, number) for number, chunk in order]
    backward = [(parts[-1 - chunk].index + 1, number) for number, chunk in order]
    return StatedMessages(
        session,
        config,
        iter([values(part, batches[number]) for part, number in forward if part > 0]),
        iter([values(part, batches[number]) for part, number in backward if part <= last]),
    )


def run_schedule(
    session: Session,
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Any],
    step: Callable[..., Any],
    values: ReceivedValues,
    *,
    forward_only: bool,
    **options: Any,
) -> list[Any]:
    """Send batches through the pipeline by megatron-core's schedule for this layout.

    Args:
        step: called with an iterator over the batches and a chunk; see megatron-core's `forward_step_func`.
        options: further arguments of the schedule.
    """
    function = get_forward_backward_func()
    # Chunks of one rank run the same micro-batches at different times, so each has its own iterator.
    iterators = [iter(batches) for _ in chunks]
    several = len(chunks) > 1
    if session.mesh.pp_size > 1:
        options["p2p_communicator"] = stated_messages(session, cast(Any, chunks[0]).config, batches, values)
        options["pg_collection"] = _groups(session)
    return function(
        forward_step_func=step,
        data_iterator=iterators if several else iterators[0],
        model=list(chunks) if several else chunks[0],
        num_microbatches=len(batches),
        seq_length=1,  # not read: every boundary states its own shape
        micro_batch_size=1,
        forward_only=forward_only,
        **options,
    )


def _groups(session: Session) -> ProcessGroupCollection:
    """What the schedules ask for; tied embeddings are kept equal elsewhere, so their groups are not there."""
    mesh, groups = session.mesh, ProcessGroupCollection()
    groups.tp, groups.cp, groups.pp, groups.dp_cp = mesh.tp_group, mesh.cp_group, mesh.pp_group, mesh.dp_cp_group
    groups.embd = groups.pos_embd = None
    return groups
