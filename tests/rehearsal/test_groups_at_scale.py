"""What the process groups of a rank hold in worlds that no test can start: counted where the ranks are rehearsed."""

import pytest

from megatron_rb.launch.open_files import FILES_OF_A_GROUP, files_of_groups, gloo_sizes_on_devices
from megatron_rb.rehearsal.prepare import prepare
from megatron_rb.rehearsal.run import rehearse
from megatron_rb.rehearsal.summary import GLOO, summarise
from megatron_rb.shapes.families import FAMILIES
from megatron_rb.shapes.shape import load_shape
from tests.parity.layouts import layouts
from tests.parity.tiny_models import write_model
from tests.rehearsal.conftest import request_of

TP = PP = 4


@pytest.fixture(scope="module", params=[(1024, 1), (1024, 2), (8192, 1)], ids=["1024", "1024 with cp", "8192"])
def rank_zero(request, tmp_path_factory):
    """World size, context-parallel degree, the record of rank 0 and its stage in the summary."""
    world, cp = request.param
    folder = tmp_path_factory.mktemp("scale")
    hf = write_model(folder / "hf", list(FAMILIES)[0], seed=1)
    shape = load_shape(hf)
    four = next(case for case in layouts(shape.vision.num_layers, shape.text.num_layers) if case["pp"] == PP)
    copies = world // (TP * PP * cp)
    wanted = request_of(hf, four["layout"], tp=TP, pp=PP, cp=cp, dp=copies, ranks="0", micro_batches=1)
    prepared = prepare(wanted, folder / "prepared")
    found = rehearse([prepared], folder)[0]
    (record,) = found.records
    (stage,) = summarise(prepared, found).stages
    assert record.failure == ""
    return world, cp, record, stage


@pytest.mark.timeout(240)
def test_gloo_has_the_world_and_the_ranks_of_one_sample(rank_zero):
    """Without a backend of their own, groups of megatron-core would add 1,957 peers at 1,024 ranks without cp."""
    world, cp, _, stage = rank_zero
    assert stage.gloo_peers == (world - 1) + (TP * PP * cp - 1)


def test_the_world_is_the_one_large_group_with_a_gloo_part(rank_zero):
    world, cp, record, _ = rank_zero
    groups = record.groups
    large = [group for group in groups if GLOO in group.backend and len(group.ranks) > world // (TP * PP)]
    assert [len(group.ranks) for group in large] == [world]
    assert "inherited" not in {group.backend for group in groups}


def test_no_ranks_have_two_groups_over_one_backend(rank_zero):
    groups = [(group.ranks, group.backend) for group in rank_zero[2].groups]
    assert len(groups) == len(set(groups))


def test_the_devices_of_the_world_are_connected_before_anything_else(rank_zero):
    world, _, record, _ = rank_zero
    groups = {group.name: group for group in record.groups}
    first = record.phases[0].messages[0]
    assert (first.kind, first.device, first.values) == ("allreduce_", "cuda", 1)
    assert len(groups[first.group].ranks) == world


def test_the_doctor_counts_the_gloo_groups_that_there_are(rank_zero):
    world, cp, record, stage = rank_zero
    groups = record.groups
    counted = gloo_sizes_on_devices(world, TP, PP, cp)
    assert sorted(counted) == sorted(len(group.ranks) for group in groups if GLOO in group.backend)
    assert files_of_groups(counted, lazy=False) == FILES_OF_A_GROUP * len(counted) + stage.gloo_peers
