"""What goes wrong on a musa device in stacks that were written for CUDA, one test each.

test_simulated_musa runs this file in a process of its own, in which `musa` is the simulated device. Every module of the
product is imported before the device is there: what binds to a device at its import would bind to the CPU.
"""

import importlib

import pytest
import torch
import torch.distributed as dist

from megatron_rb.platform import get_platform, registry
from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.platform.mcore_shims import install_mcore_shims
from tests.architecture.source_tree import sources
from tests.platform.simulated_musa import install

on_cpu = install_mcore_shims(CpuPlatform())
IMPORTED = [importlib.import_module(source.module) for source in sources() if not source.uses("triton", "liger_kernel")]
on_cpu.undo()
CHOSEN_AT_IMPORT = registry._load_platform.cache_info().currsize + registry._probe_platform.cache_info().currsize
install()

HIDDEN = 8


@pytest.fixture(scope="module")
def mesh():
    """A world of one on the platform with megatron-core adapted to it."""
    platform = get_platform()
    install_mcore_shims(platform)
    from megatron_rb.layout.mesh import RankGrid
    from megatron_rb.parallel.groups import build_mesh
    from megatron_rb.parallel.world import start_process_group

    start_process_group(platform, 1.0)
    yield build_mesh(RankGrid(), 1, 1.0, seed=3)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def platform(mesh):
    """The platform of that world."""
    return get_platform()


@pytest.fixture(scope="module")
def config(platform):
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
    )


def linear(config, **options):
    from megatron.core.tensor_parallel import ColumnParallelLinear

    return ColumnParallelLinear(
        HIDDEN, HIDDEN, config=config, init_method=torch.nn.init.normal_, bias=False, gather_output=False, **options
    )


def test_auto_takes_the_one_accelerator(platform):
    assert platform.name == "musa"


def test_nothing_was_bound_to_a_device_at_its_import(platform):
    """All other tests here would fail too, on what was."""
    assert len(IMPORTED) > 300 and CHOSEN_AT_IMPORT == 0


def test_mixed_precision_modules_cast_tensors_of_the_device(platform):
    """megatron-core asks for `torch.cuda.FloatTensor` and its like, in tuples that it makes at import."""
    from megatron.core.transformer.module import float16_to_fp32, fp32_to_float16

    device = platform.current_device()
    assert fp32_to_float16(torch.ones(1, device=device), lambda tensor: tensor.bfloat16()).dtype == torch.bfloat16
    assert float16_to_fp32(torch.ones(1, dtype=torch.bfloat16, device=device)).dtype == torch.float32


def test_modules_that_torch_moves_lose_identity_attributes_and_ties(platform):
    """Why there is `Platform.move_module`, which the conformance tests hold to the opposite."""
    module = torch.nn.Module()
    module.one, module.two = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    module.two.weight = before = module.one.weight
    before.tensor_model_parallel = True
    module.to("musa")
    assert module.one.weight is not before and not hasattr(module.one.weight, "tensor_model_parallel")
    assert module.one.weight is not module.two.weight


def test_megatron_cores_modules_can_be_moved(platform, config):
    layer = linear(config)
    weight = layer.weight
    assert weight.device.type == "cpu" and weight.tensor_model_parallel is True
    platform.move_module(layer)
    assert layer.weight is weight and weight.device == torch.device("musa", 0)
    assert weight.tensor_model_parallel is True and weight.allreduce is True


def test_bare_numbers_are_devices_of_the_accelerator(platform):
    assert torch.device(1) == torch.device("musa", 1) == torch.ones(1, device=1).device
    assert torch.ones(1).to(0).device == torch.device("musa", 0)


def test_current_device_follows_the_local_rank(platform):
    platform.set_device(1)
    try:
        assert platform.current_device() == torch.device("musa", 1)
        assert torch.ones(1, device="musa").device == torch.device("musa", 1)
    finally:
        platform.set_device(0)


def test_everything_of_a_rank_lies_on_its_own_device(platform, mesh, tmp_path):
    """On the second one, where a forgotten index means the first. Without a backward pass, since torch's autograd runs
    on one simulated device only."""
    from megatron_rb.config.schema import Config
    from megatron_rb.models.inputs import build_micro_batch
    from megatron_rb.parallel.session import Session
    from megatron_rb.parity.samples import draw_samples
    from megatron_rb.shapes.balance import default_layout
    from megatron_rb.shapes.shape import load_shape
    from megatron_rb.train.build import build_trainable
    from megatron_rb.train.step import Runner, logits_pass
    from tests.parity.tiny_models import write_model

    hf = write_model(tmp_path / "model", "qwen3_vl", 0)
    shape, config = load_shape(hf), Config()
    config.model.dtype = "bf16"
    platform.set_device(1)
    try:
        session = Session(platform, mesh, shape, default_layout(shape, 1), platform.current_device())
        trainable = build_trainable(session, config, str(hf))
        runner = Runner(trainable.chunks, session)
        [chunk] = trainable.chunks
        batch = build_micro_batch(draw_samples(shape, seed=0), shape, tp_rank=0, tp_size=1, sequence_parallel=False)
        logits = logits_pass(runner, [batch])
        held = [*chunk.parameters(), *chunk.module.buffers(), *logits]
        held += [buffer.grad_data for buffer in chunk.buffers]
        held += [main for group in trainable.optimizer.param_groups for main in group["params"]]
        assert len(held) > 100 and {str(tensor.device) for tensor in held} == {"musa:1"}
    finally:
        platform.set_device(0)


def test_megatron_core_asks_for_device_zero_when_it_is_zero(platform):
    from megatron.core.pipeline_parallel import p2p_communication
    from megatron.core.tensor_parallel import mappings

    for module in (p2p_communication, mappings):
        assert module.torch.musa.current_device() == torch.device("musa", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distributed", [True, False])
def test_optimizers_take_tensors_whose_type_is_spelt_musa(platform, config, dtype, distributed):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    layer = platform.move_module(linear(config).to(dtype))
    kinds = {torch.float32: "torch.musa.FloatTensor", torch.bfloat16: "torch.musa.BFloat16Tensor"}
    assert layer.weight.type() == kinds[dtype]
    before = layer.weight.detach().clone()
    settings = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    ddp = DistributedDataParallel(config, settings, layer)
    options = OptimizerConfig(
        optimizer="adam",
        lr=0.1,
        min_lr=0.0,
        clip_grad=1.0,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(options, [ddp], config_overrides={}, use_gloo_process_groups=False)
    ddp.zero_grad_buffer()
    ddp(torch.ones(2, HIDDEN, dtype=dtype, device=platform.current_device()))[0].float().sum().backward()
    ddp.finish_grad_sync()
    done, norm, _ = optimizer.step()
    assert done and norm == pytest.approx(2 * HIDDEN)  # each of the 64 gradients is 2
    # Adam's first step is the learning rate, whatever the gradient.
    assert (before - layer.weight).float().mean().item() == pytest.approx(0.1, rel=0.02)


def test_nothing_waits_in_cudas_queue(platform):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    waiting = len(torch.cuda._queued_calls)
    before = platform.get_rng_state()
    for seed in range(3):
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        with get_cuda_rng_tracker().fork():
            torch.rand(2, device=platform.current_device())
    assert len(torch.cuda._queued_calls) == waiting
    assert not torch.equal(platform.get_rng_state(), before)
    torch.cuda._lazy_call(lambda: None)  # what megatron-core does by itself
    assert len(torch.cuda._queued_calls) == waiting + 1
    torch.cuda._queued_calls.pop()


def test_tracker_draws_from_the_device_and_keeps_sixteen_bytes(platform):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    tracker, device = get_cuda_rng_tracker(), platform.current_device()
    assert {state.numel() for state in tracker.get_states().values()} == {16}
    states, outside = tracker.get_states(), platform.get_rng_state()
    with tracker.fork():
        first = torch.rand(4, device=device)
    assert torch.equal(platform.get_rng_state(), outside)
    with tracker.fork():
        assert not torch.equal(torch.rand(4, device=device), first)
    tracker.set_states(states)
    with tracker.fork():
        assert torch.equal(torch.rand(4, device=device), first)


def test_a_part_that_runs_again_draws_the_same_numbers_on_the_device(platform):
    """Inside megatron-core's tracker and outside; torch alone would keep neither."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
    from torch.utils.checkpoint import checkpoint

    from megatron_rb.parallel.random_states import replayed

    def part(x: torch.Tensor) -> torch.Tensor:
        with get_cuda_rng_tracker().fork():
            x = torch.nn.functional.dropout(x, 0.5)
        return torch.nn.functional.dropout(x * x, 0.5)

    def gradient(run) -> tuple[torch.Tensor, torch.Tensor]:
        model_parallel_cuda_manual_seed(3, force_reset_rng=True)
        x = torch.arange(1.0, 65, device=platform.current_device(), requires_grad=True)
        (run(x) + run(x)).sum().backward()
        return x.grad.cpu(), platform.get_rng_state()

    grad, state = gradient(part)
    options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": replayed}
    again, state_after = gradient(lambda x: checkpoint(part, x, **options))
    assert torch.equal(again, grad) and torch.equal(state_after, state)
    assert not torch.equal(gradient(lambda x: checkpoint(part, x, use_reentrant=False))[0], grad)


def test_linears_of_megatron_core_go_back_through_autocast(platform, config):
    """Their autograd functions learn at import for which device type they look at autocast."""
    layer = platform.move_module(linear(config))
    x = torch.randn(3, HIDDEN, device=platform.current_device(), requires_grad=True)
    with platform.autocast(torch.bfloat16):
        y, _ = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    expected = x.detach().bfloat16().sum(0).float().expand(HIDDEN, HIDDEN)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=2e-2, atol=2e-2)
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32


def test_every_group_serves_both_devices_under_the_full_name(platform, mesh):
    assert dist.get_backend_config() == "cpu:gloo,musa:mccl"
    groups = [dist.group.WORLD, *mesh.groups.values(), dist.new_group([0])]
    for group in groups:
        assert dist.get_backend_config(group) == "cpu:gloo,musa:mccl"
        for device in ("cpu", platform.current_device()):
            values = torch.ones(2, device=device)
            dist.all_reduce(values, group=group)
            assert values.tolist() == [1.0, 1.0]


def test_a_group_for_the_device_alone_is_made_over_mccl_and_sums_there(platform):
    group = dist.new_group([0], backend=platform.device_backend)
    assert dist.get_backend_config(group) == "musa:mccl"
    values = torch.ones(2, device=platform.current_device())
    dist.all_reduce(values, group=group)
    assert values.tolist() == [1.0, 1.0]


def test_the_default_backend_would_be_looked_for_under_letters(platform):
    """torch_musa registers its devices as a string, which torch takes apart; hence the full name."""
    dist.Backend.register_backend("spelt", lambda *arguments: None, devices="xyz")
    assert {dist.Backend.default_device_backend_map.pop(letter) for letter in "xyz"} == {"spelt"}
    dist.Backend.backend_list.remove("spelt")


def test_gloo_alone_takes_no_musa_tensor(platform):
    group = dist.new_group([0], backend="gloo")
    with pytest.raises(RuntimeError, match="No backend type associated with device type musa"):
        dist.all_reduce(torch.ones(1, device=platform.current_device()), group=group)


@pytest.mark.parametrize(("arch", "works"), [((2, 1), False), ((2, 2), True), ((3, 1), True)])
def test_bf16_collectives_depend_on_the_architecture(platform, monkeypatch, arch, works):
    monkeypatch.setattr(torch.musa, "_arch", arch)
    assert platform.arch == arch
    assert platform.supports(torch.bfloat16, "collective") == platform.supports(torch.bfloat16) == works
    values = torch.ones(1, device=platform.current_device(), dtype=torch.bfloat16)
    if works:
        dist.all_reduce(values)
        return
    with pytest.raises(RuntimeError, match="all_?reduce of torch.bfloat16 is not built for mp_21"):
        dist.all_reduce(values)
    reason = "bfloat16 for collective on musa: it needs mp_22 .S4000. or newer, this device is mp_21; use model.dtype"
    with pytest.raises(ValueError, match=reason):
        platform.require(torch.bfloat16, "collective")


def test_a_build_without_mccl_is_told_before_the_start(platform, monkeypatch):
    monkeypatch.setattr(dist.Backend, "backend_list", ["gloo"])
    with pytest.raises(ValueError, match="float32 for collective on musa: this torch_musa is built without MCCL"):
        platform.require(torch.float32, "collective")


def test_nobody_asks_torch_cuda_about_musa(platform, monkeypatch):
    """Vendors' stacks answer for torch.cuda, so its answers say nothing."""
    from megatron_rb.platform.cuda import CudaPlatform
    from megatron_rb.platform.musa import MusaPlatform

    asked = []
    for name in ("is_available", "device_count", "current_device", "get_device_capability", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: asked.append(name) or True)
    musa = MusaPlatform()
    assert musa.probe().available and musa.probe().reason == "2 musa device(s)"
    assert not CudaPlatform().probe().available
    assert musa.info()["device"] == "simulated musa" and musa.info()["capability"] == "2.2"
    assert musa.current_device().type == "musa" and musa.supports(torch.bfloat16)
    assert asked == []


def test_tensors_on_two_devices_do_not_mix(platform):
    for other in ("cpu", "musa:1"):
        with pytest.raises(RuntimeError, match=f"same device.* {other}"):
            torch.ones(2, device=platform.current_device()) + torch.ones(2, device=other)
    with pytest.raises(TypeError, match="can't convert musa:0"):
        torch.ones(2, device=platform.current_device()).numpy()


@pytest.mark.parametrize(
    ("arch", "backends", "dtype", "words"),
    [
        ((2, 1), ["gloo", "mccl"], "bf16", "bfloat16 for compute on musa: it needs mp_22"),
        ((2, 2), ["gloo"], "fp32", "float32 for collective on musa: this torch_musa is built without MCCL"),
    ],
)
def test_what_the_device_cannot_do_is_said_before_training_starts(
    platform, monkeypatch, tmp_path, arch, backends, dtype, words
):
    from megatron_rb.app.assemble import assemble
    from megatron_rb.config.compose import load_config
    from megatron_rb.metrics.heartbeat import Heartbeat
    from megatron_rb.parallel.attempt import attempt_from_environment
    from tests.parity.tiny_models import write_model

    monkeypatch.setattr(torch.musa, "_arch", arch)
    monkeypatch.setattr(dist.Backend, "backend_list", backends)
    model = write_model(tmp_path / "model", "qwen3_vl", 0)
    run = tmp_path / "run"
    settings = [f"model.hf_path={model}", f"model.dtype={dtype}", "data.train=[absent.jsonl]", f"run_dir={run}"]
    with pytest.raises(ValueError, match=words):
        assemble(load_config(settings), Heartbeat(None, None, 0), attempt_from_environment())
    assert not run.exists()
