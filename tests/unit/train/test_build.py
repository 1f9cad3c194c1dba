"""The model side of a run: first weights, what is trained, how it is wrapped."""

import json
from types import SimpleNamespace

import pytest
import torch

from megatron_rb.checkpoint.hf.reader import HFReader
from megatron_rb.config.schema import FreezeConfig
from megatron_rb.models.build import ModelOptions, build_stages, named_parameters, part_of
from megatron_rb.parallel.session import Session
from megatron_rb.shapes.balance import default_layout
from megatron_rb.shapes.shape import load_shape
from megatron_rb.train.build import (
    build_model,
    build_trainable,
    connect_schedule,
    freeze,
    initialise,
    wrap_for_data_parallelism,
)
from tests.parity.tiny_models import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hf") / "model", "qwen3_vl", seed=0)


def test_weights_of_a_hugging_face_folder_are_read_under_their_own_names(session, folder):
    shape = load_shape(folder)
    there = Session(session.platform, session.mesh, shape, default_layout(shape, 1), session.device)
    reader = HFReader(folder, shape)
    stages = build_model(there, ModelOptions(), str(folder))
    assert all(torch.equal(parameter, reader.read(name)) for name, parameter in named_parameters(stages))


def test_fresh_weights_are_those_of_the_seed(session):
    first, again, other = (
        dict(named_parameters(build_model(session, ModelOptions(), "random", seed))) for seed in (1, 1, 2)
    )
    name = "language.layers.0.mlp.linear_fc1.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


def test_the_seed_of_a_run_is_that_of_its_fresh_weights(session, config):
    found = []
    for config.seed in (3, 4):
        stage = build_trainable(session, config, "random").chunks[0].module
        found.append(dict(stage.named_parameters())["vision.merger.linear_fc1.weight"].detach().clone())
    expected = dict(named_parameters(build_model(session, ModelOptions(), "random", 3)))
    assert torch.equal(found[0], expected["vision.merger.linear_fc1.weight"]) and not torch.equal(*found)


def test_an_empty_folder_is_no_place_to_start_from(session, tmp_path):
    stages = build_stages(session, ModelOptions())
    with pytest.raises(ValueError, match="is neither a checkpoint nor a Hugging Face folder.*checkpoint.init=random"):
        initialise(stages, session, str(tmp_path), 0)


def test_a_folder_of_another_kind_is_called_by_its_kind(session, tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    (tmp_path / "iter_0000005" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=f"checkpoint.init: {tmp_path} "):
        initialise(build_stages(session, ModelOptions()), session, str(tmp_path), 0)


def test_a_hugging_face_folder_of_another_model_is_refused(session, tmp_path):
    folder = write_model(tmp_path / "other", "qwen2_5_vl", seed=0)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    with pytest.raises(ValueError):
        initialise(build_stages(session, ModelOptions()), session, str(folder), 0)


@pytest.mark.parametrize("frozen", [(), ("vision",), ("merger", "language"), ("vision", "merger")])
def test_frozen_parts_are_not_trained_and_all_others_are(session, frozen):
    stages = build_stages(session, ModelOptions())
    freeze(stages, FreezeConfig(**dict.fromkeys(frozen, True)))
    for name, parameter in named_parameters(stages):
        assert parameter.requires_grad == (part_of(name) not in frozen), name


def test_the_optimizer_has_the_parts_that_are_trained(session, config):
    config.model.freeze.vision = config.model.freeze.language = True
    trainable = build_trainable(session, config, "random")
    trained = {name for name, p in trainable.chunks[0].named_parameters() if p.requires_grad}
    assert {part_of(name) for name in trained} == {"merger"}
    sizes = sum(p.numel() for group in trainable.optimizer.param_groups for p in group["params"])
    assert sizes == sum(p.numel() for p in trainable.chunks[0].parameters() if p.requires_grad)


def test_a_model_that_is_frozen_altogether_is_refused(session, config):
    for part in ("vision", "merger", "language"):
        setattr(config.model.freeze, part, True)
    with pytest.raises(ValueError, match="every part of the model is frozen"):
        build_trainable(session, config, "random")


def test_only_the_first_chunk_cuts_its_gradients_into_buckets(session, config):
    config.parallel.overlap_grad_reduce = True
    stages = build_model(session, ModelOptions(), "random") + build_model(session, ModelOptions(), "random")
    first, second = wrap_for_data_parallelism(config, stages)
    assert first.bucket_size is not None and second.bucket_size is None


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_wait_for_the_last_micro_batch_of_every_chunk(count):
    config = SimpleNamespace()
    chunks = [SimpleNamespace(no_sync=f"chunk {number}") for number in range(count)]
    connect_schedule([SimpleNamespace(config=config)], chunks, finalize="finalize")
    assert config.finalize_model_grads_func == "finalize"
    assert config.no_sync_func == (["chunk 0", "chunk 1"] if count == 2 else "chunk 0")
