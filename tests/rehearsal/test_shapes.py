"""The short ways to the shapes of a rehearsal: torch's own way gives the same in every figure."""

import functools
from dataclasses import replace

import pytest
import torch

from megatron_rb.rehearsal.prepare import prepare
from megatron_rb.rehearsal.records import RehearsedRank
from megatron_rb.rehearsal.run import rehearse
from megatron_rb.rehearsal.shapes import VIEWS, Shapes, may_be_kept
from megatron_rb.rehearsal.worker import REHEARSE
from megatron_rb.shapes.shape import load_shape
from tests.parity.tiny_models import write_model
from tests.rehearsal.conftest import request_of

aten = torch.ops.aten
ASKED = Shapes.__torch_dispatch__


def without_time(record: RehearsedRank) -> RehearsedRank:
    return replace(record, phases=[replace(phase, seconds=0.0) for phase in record.phases])


@pytest.mark.timeout(240)
def test_every_figure_of_a_rehearsal_is_that_of_torchs_way(tmp_path):
    """Memory and its lines, waits, messages, operations, FLOPs, kernels, and the bytes of a checkpoint."""
    hf = write_model(tmp_path / "hf", "qwen3_vl", seed=1)
    shape = load_shape(hf)
    vision, decoder = shape.vision.num_layers, shape.text.num_layers
    cut = f"P v*{vision} M E t*1 | t*{decoder - 1} L"
    recompute = ("model.recompute.vision=-1", "model.recompute.language=1")
    requests = [
        request_of(hf, cut, "name=cut", *recompute, tp=2, pp=2, sp=True, evaluation=True, checkpoint=True),
        request_of(hf, f"P v*{vision} M E t*{decoder} L", "name=whole", "model.dtype=fp32", dp=2),
    ]
    prepared = [prepare(request, tmp_path / f"prepared_{number}") for number, request in enumerate(requests)]
    ways = {"short": REHEARSE, "long": "tests.rehearsal.long_way:rehearse"}
    found = {way: rehearse(prepared, tmp_path / way, worker=worker) for way, worker in ways.items()}
    for short, long in zip(found["short"], found["long"], strict=True):
        assert [without_time(rank) for rank in short.records] == [without_time(rank) for rank in long.records]
        assert all(phase.operations > 50 for rank in short.records for phase in rank.phases if "step" in phase.name)


@pytest.fixture
def shapes(monkeypatch):
    """Has seen nothing yet."""
    monkeypatch.setattr(Shapes, "_seen", {})
    return Shapes()


def without_values(shapes: Shapes, tensor: torch.Tensor) -> torch.Tensor:
    with shapes:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def answered(shapes: Shapes, func, *args, **keywords):
    return shapes.answer(func, [type(args[0])], args, keywords)


MATRIX = torch.arange(24.0).view(4, 6)
CALLS = {
    aten._unsafe_view.default: ([2, 12],),
    aten.alias.default: (),
    aten.as_strided.default: ([2, 3], [6, 1], 4),
    aten.detach.default: (),
    aten.expand.default: ([3, 4, 6],),
    aten.permute.default: ([1, 0],),
    aten.select.int: (0, 2),
    aten.slice.Tensor: (1, 1, 5, 2),
    aten.squeeze.dim: (0,),
    aten.t.default: (),
    aten.transpose.int: (0, 1),
    aten.unsqueeze.default: (1,),
    aten.view.default: ([4, 1, 6],),
}


@pytest.mark.parametrize("func", sorted(VIEWS, key=str), ids=str)
def test_a_view_lies_where_that_of_a_tensor_with_values_lies(shapes, func):
    source = without_values(shapes, MATRIX)
    view, real = answered(shapes, func, source, *CALLS[func]), func(MATRIX, *CALLS[func])
    assert (view.shape, view.stride(), view.storage_offset()) == (real.shape, real.stride(), real.storage_offset())
    assert view.untyped_storage()._cdata == source.untyped_storage()._cdata


def test_a_view_that_cannot_be_has_torchs_words(shapes):
    source = without_values(shapes, MATRIX)
    with pytest.raises(RuntimeError) as of_torch:
        ASKED(shapes, aten.view.default, [type(source)], (source, [5, 5]), {})
    with pytest.raises(RuntimeError) as ours:
        answered(shapes, aten.view.default, source, [5, 5])
    assert str(ours.value) == str(of_torch.value)


def test_torch_is_asked_once_for_operations_on_the_same_shapes(shapes, monkeypatch):
    asked = count_questions(monkeypatch)
    one, other = (without_values(shapes, each) for each in (MATRIX, MATRIX.t()))
    asked.clear()
    results = [answered(shapes, aten.mm.default, one, other) for _ in range(3)]
    assert asked == [aten.mm.default] and {tuple(each.shape) for each in results} == {(4, 4)}
    assert len({each.untyped_storage()._cdata for each in results}) == 3


@pytest.mark.parametrize(
    "other",
    [MATRIX.double(), MATRIX.t().contiguous().t(), MATRIX[:, :1], torch.tensor(2)],
    ids=["dtype", "strides", "shape", "no dimension"],
)
def test_what_differs_is_asked_for(shapes, other):
    first = without_values(shapes, MATRIX)
    answered(shapes, aten.add.Tensor, first, first)
    again = answered(shapes, aten.add.Tensor, without_values(shapes, other), first)
    real = other + MATRIX
    assert (again.shape, again.dtype, again.stride()) == (real.shape, real.dtype, real.stride())


def test_a_number_and_a_truth_are_two_arguments(shapes):
    whole = without_values(shapes, torch.ones(3, dtype=torch.int64))
    kinds = [answered(shapes, aten.mul.Scalar, whole, factor).dtype for factor in (1, 1.0, True)]
    assert kinds == [torch.int64, torch.float32, torch.int64]


def test_what_is_changed_in_place_is_the_tensor_itself(shapes):
    tensor = without_values(shapes, MATRIX)
    assert all(answered(shapes, aten.add_.Tensor, tensor, tensor) is tensor for _ in range(3))


def test_several_results_are_several_tensors(shapes):
    tensor = without_values(shapes, MATRIX)
    for _ in range(2):
        least, most = answered(shapes, aten.aminmax.default, tensor, dim=1)
        assert least.shape == most.shape == (4,)
        assert least.untyped_storage()._cdata != most.untyped_storage()._cdata


def test_results_on_another_device_do_not_meet(shapes):
    """Torch refuses tensors of two devices every time."""
    here = without_values(shapes, MATRIX)
    with shapes:
        there = torch.empty(4, 6, device="xpu:0")
    answered(shapes, aten.add.Tensor, here, here)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="device"):
            answered(shapes, aten.add.Tensor, here, there)


def test_operators_that_look_at_values_or_share_storage_are_never_kept():
    never = [
        *(aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.index.Tensor),
        *(aten.view.default, aten.split.Tensor, aten.lift_fresh.default, aten.squeeze_.dim, aten.mul.out),
        *(aten._foreach_add_.Scalar, aten.item.default, aten.resize_.default),
    ]
    kept = [aten.mm.default, aten.add_.Tensor, aten.native_layer_norm.default, aten.empty.memory_format]
    assert not any(map(may_be_kept, never)) and all(map(may_be_kept, kept))


def count_questions(monkeypatch) -> list:
    """The operators that torch is asked for."""
    asked: list = []

    @functools.wraps(ASKED)
    def counted(self, func, types, args=(), kwargs=None):
        asked.append(func)
        return ASKED(self, func, types, args, kwargs)

    monkeypatch.setattr(Shapes, "__torch_dispatch__", counted)
    return asked
