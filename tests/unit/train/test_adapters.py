"""Adapters of a run: first values, what is trained, what a checkpoint of them says."""

import pytest
import torch
from megatron.core import tensor_parallel

from megatron_rb.app.forecast import stage_forecast
from megatron_rb.checkpoint.hf.digest import DigestingReader, combined_digest
from megatron_rb.checkpoint.hf.run_adapters import adapters_of_run
from megatron_rb.checkpoint.hf.table import stored_rules
from megatron_rb.config.derive import derive
from megatron_rb.config.schema import AdapterConfig, ModelConfig
from megatron_rb.models.adapters.attach import is_factor
from megatron_rb.models.build import ModelOptions, build_stages, named_parameters
from megatron_rb.models.inputs import build_micro_batch
from megatron_rb.parallel.session import Session
from megatron_rb.parity.samples import draw_samples
from megatron_rb.shapes.balance import default_layout
from megatron_rb.shapes.shape import load_shape
from megatron_rb.train.adapters import add_adapters, fill_base, identity, train_adapters_only
from megatron_rb.train.build import build_trainable
from megatron_rb.train.step import Runner, train_pass
from tests.parity.peft_models import write_adapter
from tests.parity.tiny_models import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hf") / "model", "qwen3_vl", seed=0)


@pytest.fixture
def there(session, folder):
    """A session of that model."""
    shape = load_shape(folder)
    return Session(session.platform, session.mesh, shape, default_layout(shape, 1), session.device)


def folder_digest(folder, shape) -> str:
    """Of all tensors of a folder, read one by one."""
    reader = DigestingReader(folder, shape)
    for name in stored_rules(shape):
        reader.read(name)
    return combined_digest(reader.digests)


def settings_of(*in_full: str, **adapter) -> ModelConfig:
    return ModelConfig(adapters={"lora": AdapterConfig(**adapter)}, train_in_full=list(in_full))


def test_the_digest_of_the_base_is_that_of_its_folder(there, folder):
    assert fill_base(build_stages(there, ModelOptions()), there, str(folder)) == folder_digest(folder, there.shape)


def test_another_base_has_another_digest(folder, tmp_path):
    other = write_model(tmp_path / "other", "qwen3_vl", seed=0)
    assert folder_digest(folder, load_shape(folder)) == folder_digest(other, load_shape(other))
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert folder_digest(folder, load_shape(folder)) != folder_digest(other, load_shape(other))


def test_factors_alone_are_trained_and_what_is_named(there, folder):
    stages = build_stages(there, ModelOptions())
    fill_base(stages, there, str(folder))
    settings = settings_of("lm_head", "merger", patterns=["q_proj"])
    add_adapters(stages, there, settings, seed=0)
    train_adapters_only(stages, settings.train_in_full)
    trained = {name for name, parameter in named_parameters(stages) if parameter.requires_grad}
    others = {name for name in trained if not is_factor(name)}
    assert {name.split(".linear")[0].split(".norm")[0] for name in others} == {
        "language.head.output.weight",
        "vision.merger",
    }
    assert len(trained) - len(others) == 2 * there.shape.text.num_layers


def test_frozen_weights_have_no_gradient_buffer_and_no_state(there, folder, config):
    config.model.adapters = settings_of(patterns=["q_proj"], rank=2).adapters
    trainable = build_trainable(there, config, str(folder))
    (chunk,) = trainable.chunks
    factors = sum(parameter.numel() for name, parameter in chunk.named_parameters() if is_factor(name))
    held = sum(parameter.numel() for group in trainable.optimizer.param_groups for parameter in group["params"])
    assert held == factors
    assert sum(buffer.grad_data.numel() for buffer in chunk.buffers) < 1.1 * factors + 1024
    assert all(not hasattr(parameter, "main_grad") for parameter in chunk.parameters() if not parameter.requires_grad)


def test_a_checkpoint_has_what_is_trained(there, folder, config):
    config.model.adapters = settings_of(patterns=["q_proj"], rank=2).adapters
    stage = build_trainable(there, config, str(folder)).chunks[0].module
    assert all(is_factor(name) for name in stage.sharded_state_dict())


def test_a_folder_of_peft_says_modules_rank_and_scale(there, folder, tmp_path):
    adapter = write_adapter(
        folder, tmp_path / "peft", 0, r=3, lora_alpha=5, use_rslora=True, target_modules=["o_proj", "qkv"]
    )
    (found,) = adapters_of_run(settings_of(init=str(adapter), dropout=0.25), there.shape)
    assert (found.rank, found.alpha, found.rslora, found.dropout) == (3, 5, True, 0.25)
    assert {name.rpartition(".")[2] for name in found.modules} == {"o_proj", "qkv"}
    told = identity(settings_of(init=str(adapter)), there.shape, "digest")
    assert told["adapters"]["lora"] == {"modules": ["o_proj", "qkv"], "rank": 3, "alpha": 5, "rslora": True}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (settings_of("lm_haed"), "model.train_in_full: 'lm_haed' is no module of this model; did you mean lm_head"),
        (settings_of("q_proj", patterns=["o_proj"]), "is one tensor here with .*k_proj.weight.*name all of them"),
        (settings_of("mlp", patterns=["up_proj"]), "trained in full .* and has factors"),
    ],
)
def test_what_cannot_be_trained_in_full_is_refused(settings, sentence, there):
    with pytest.raises(ValueError, match=sentence):
        adapters_of_run(settings, there.shape)


def test_what_a_folder_has_in_full_is_named_or_refused(there, folder, tmp_path):
    settings = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    init = str(write_adapter(folder, tmp_path / "peft", 0, **settings))
    with pytest.raises(ValueError, match="holds lm_head.weight, which was trained in full; name its module in"):
        adapters_of_run(settings_of(init=init), there.shape)
    (adapter,) = adapters_of_run(settings_of("lm_head", init=init), there.shape)
    assert adapter.rank == 2


def test_an_adapter_of_another_base_is_refused(there, folder, config, tmp_path):
    adapter = write_adapter(folder, tmp_path / "peft", 0, r=2, target_modules=["q_proj"])
    config.model.adapters = settings_of(init=str(adapter)).adapters
    (adapter / "manifest.json").write_text(f'{{"base": "{folder_digest(folder, there.shape)}"}}')
    build_trainable(there, config, str(folder))
    (adapter / "manifest.json").write_text('{"base": "another"}')
    with pytest.raises(ValueError, match=r"belongs to other base weights \(another\) than this run has"):
        build_trainable(there, config, str(folder))


def test_weights_of_a_checkpoint_are_no_base(there, config, tmp_path):
    config.model.adapters = settings_of().adapters
    (tmp_path / "checkpoint.json").write_text('{"format": 1, "model": {}}')
    with pytest.raises(ValueError, match="is a checkpoint; make one of it with: rb convert export"):
        build_trainable(there, config, str(tmp_path))


def test_factors_of_a_folder_are_its_values(there, folder, tmp_path):
    adapter = write_adapter(folder, tmp_path / "peft", 0, r=2, target_modules=["down_proj"])
    stages = build_stages(there, ModelOptions())
    add_adapters(stages, there, settings_of(init=str(adapter)), seed=0)
    factors = {name: parameter for name, parameter in named_parameters(stages) if is_factor(name)}
    assert len(factors) == 2 * there.shape.text.num_layers
    assert all(parameter.any() for parameter in factors.values())
    assert not torch.equal(*list(factors.values())[:3:2])


def test_what_is_recomputed_drops_the_same_inputs(there, folder, config):
    gradients = []
    for recompute in (0, -1):
        config.model.adapters = settings_of(rank=2, dropout=0.4).adapters
        config.model.recompute.vision = config.model.recompute.language = recompute
        trainable = build_trainable(there, config, str(folder))
        factors = {name: each for name, each in trainable.chunks[0].module.named_parameters() if each.requires_grad}
        for name, parameter in factors.items():
            if name.endswith("lora_B"):
                torch.nn.init.constant_(parameter, 0.01)
        torch.manual_seed(5)
        tensor_parallel.model_parallel_cuda_manual_seed(5, force_reset_rng=True)
        (batch,) = micro_batches_of(there)
        train_pass(Runner(trainable.chunks, there), [batch])
        gradients.append({name: parameter.main_grad.clone() for name, parameter in factors.items()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(each.any() for each in gradients[0].values())


def micro_batches_of(session):
    """One micro-batch of three samples."""
    options = {"tp_rank": 0, "tp_size": 1, "sequence_parallel": False}
    return [build_micro_batch(draw_samples(session.shape, seed=0)[:3], session.shape, **options)]


def test_the_planner_counts_what_is_held_and_trained(there, folder, config):
    config.model.adapters = settings_of(patterns=["all-linear"], rank=2).adapters
    config.model.train_in_full = ["lm_head", "visual.patch_embed"]
    config.model.hf_path = str(folder)
    trainable = build_trainable(there, config, str(folder))
    parameters = list(trainable.chunks[0].parameters())
    (stage,) = stage_forecast(config, derive(config, there.shape, 1), there.shape, "cpu", 0.0)
    held = sum(each.numel() for each in parameters)
    trained = sum(each.numel() for each in parameters if each.requires_grad)
    assert stage.weights == pytest.approx(4 * held, rel=1e-6)
    assert stage.gradients == pytest.approx(4 * trained, rel=1e-6)
    assert stage.optimizer == pytest.approx(8 * trained, rel=1e-6)
