"""What torch.cuda answers in a rehearsal."""

import pytest
import torch

from megatron_rb.rehearsal.device import DataSheet, Waits, stand_in_for_cuda
from megatron_rb.rehearsal.stand_ins import StandIns


@pytest.fixture
def waits():
    """What waits are noted of while torch.cuda is stood in for."""
    noted = Waits()
    with StandIns() as stand_ins:
        stand_in_for_cuda(stand_ins, DataSheet("a device", (9, 0), 1 << 30, 132), noted)
        yield noted


@pytest.mark.parametrize("name", ["Stream", "Event"])
def test_streams_and_events_are_types_as_libraries_write_them(name, waits):
    kind = getattr(torch.cuda, name)
    assert kind | None
    assert isinstance(kind(), kind)


def test_the_stream_at_work_is_one_and_waits_are_noted(waits):
    stream = torch.cuda.current_stream()
    assert isinstance(stream, torch.cuda.Stream)
    stream.synchronize()
    torch.cuda.Event(enable_timing=True).synchronize()
    assert sorted(kind for kind, _ in waits.seen) == ["event.synchronize", "stream.synchronize"]
