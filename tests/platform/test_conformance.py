"""What every platform must do. Run for all that are present, plug-ins included.

In a process with SIMULATED_DEVICE=musa the platform is `musa` on the simulated device, and so for a plug-in;
test_simulated_musa and test_own_platform start such processes.
"""

import json
import os
import time

import pytest
import torch

from megatron_rb.platform import CAPABILITIES, MemoryStats, available_platforms, get_platform

SIMULATED = os.environ.get("SIMULATED_DEVICE")
if SIMULATED:
    from tests.platform.simulated_musa import install_named

    install_named(SIMULATED)
NAMES = [SIMULATED] if SIMULATED else available_platforms()
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(params=NAMES)
def platform(request):
    try:
        platform = get_platform(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    platform.set_device(0)
    return platform


def test_says_who_it_is(platform):
    assert platform.name in NAMES and platform.vendor
    assert platform.probe().available and platform.probe().reason
    about = json.loads(json.dumps(platform.info()))
    assert about["platform"] == platform.name and about["torch"] == torch.__version__


def test_current_device_is_a_device_with_its_index(platform):
    device = platform.current_device()
    assert isinstance(device, torch.device) and device.type == platform.device_type
    assert platform.device() == device
    if device.type != "cpu":
        assert device.index == 0 and platform.device(0) == device
    assert torch.ones(2, device=device).sum().item() == 2.0
    assert torch.ones(1, device=device).device == device
    platform.synchronize()


def test_a_device_that_is_not_there_is_refused(platform, monkeypatch):
    for name in filter(None, ("SLURM_STEP_GPUS", platform.visible_devices_env)):
        monkeypatch.delenv(name, raising=False)
    count = platform.device_count()
    assert count >= 1
    if platform.device_type == "cpu":
        platform.set_device(7)  # every rank of a machine has the same CPU
        return
    with pytest.raises(ValueError, match=f"local rank {count} has no {platform.name} device, this process sees"):
        platform.set_device(count)


def test_backend_is_named_for_host_and_device(platform):
    words = platform.collective_backend.split(",")
    assert words[0] in ("gloo", "cpu:gloo")
    assert platform.device_type == "cpu" or words[1].startswith(f"{platform.device_type}:")


def test_random_state_returns(platform):
    device = platform.current_device()
    platform.seed(5)
    state = platform.get_rng_state()
    first = torch.rand(4, device=device)
    second = torch.rand(4, device=device)
    platform.set_rng_state(state)
    assert torch.equal(torch.rand(4, device=device), first)
    assert not torch.equal(first, second)
    assert state.dtype == torch.uint8 and state.device.type == "cpu"


def test_random_state_of_another_platform_is_refused(platform):
    with pytest.raises(ValueError, match="seed anew"):
        platform.set_rng_state(torch.zeros(7, dtype=torch.uint8))


def test_random_numbers_of_the_device_leave_the_host_alone(platform):
    if platform.device_type == "cpu":
        pytest.skip("host and device are one")
    before = torch.get_rng_state()
    torch.nn.functional.dropout(torch.ones(64, device=platform.current_device()), 0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_is_in_bytes(platform):
    stats = platform.memory()
    assert isinstance(stats, MemoryStats)
    assert stats.total > 1 << 20
    assert all(value is None or value >= 0 for value in vars(stats).values())
    platform.empty_cache()


def test_peak_memory_starts_anew(platform):
    if platform.memory().peak_allocated is None:
        pytest.skip("this device does not tell the peak")
    big = torch.ones(64 << 20, dtype=torch.uint8, device=platform.current_device())
    with_big = platform.memory().peak_allocated
    del big
    platform.reset_peak_memory()
    assert platform.memory().peak_allocated < with_big - (32 << 20)


def test_events_measure_time(platform):
    start, end = platform.new_event(), platform.new_event()
    start.record()
    time.sleep(0.02)
    torch.ones(8, device=platform.current_device()).sum()
    end.record()
    end.synchronize()
    assert 19 < start.elapsed_time(end) < 10_000 and end.query()
    with pytest.raises(RuntimeError):
        platform.new_event().elapsed_time(end)


def test_work_on_a_stream_can_be_waited_for(platform):
    side, main = platform.new_stream(), platform.current_stream()
    values = torch.ones(4, device=platform.current_device())
    side.wait_stream(main)
    with platform.use_stream(side):
        doubled = values * 2
        done = side.record_event()
    main.wait_event(done)
    side.synchronize()
    assert doubled.sum().item() == 8.0


@pytest.mark.parametrize("use", ["compute", "collective", "autocast"])
def test_dtypes_run_or_say_why_not(platform, use):
    for dtype in DTYPES:
        reason = platform.why_not(dtype, use)
        assert platform.supports(dtype, use) == (reason is None)
        if reason is None and use == "compute":
            x = torch.eye(8, device=platform.current_device(), dtype=dtype)
            assert torch.equal(x @ x, x)
        elif reason is not None:
            name = str(dtype).removeprefix("torch.")
            with pytest.raises(ValueError, match=f"{name} for {use} on {platform.name}: .*use model.dtype=fp32"):
                platform.require(dtype, use)
    assert platform.supports(torch.float32, "compute") and not platform.supports(torch.int8, "compute")
    assert platform.supports(torch.int64, "collective")


def test_autocast_computes_low_and_gives_gradients_in_fp32(platform):
    device = platform.current_device()
    weight = torch.ones(4, 4, device=device, requires_grad=True)
    with platform.autocast(torch.bfloat16):
        y = torch.ones(2, 4, device=device) @ weight
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.device == device
    with platform.autocast(torch.bfloat16, enabled=False):
        assert (torch.ones(2, 4, device=device) @ weight).dtype == torch.float32
    with pytest.raises(ValueError, match="float64 for autocast"):
        platform.autocast(torch.float64)


def test_fp32_products_are_fp32_unless_asked_otherwise(platform):
    platform.allow_tf32(False)
    device = platform.current_device()
    # 1 + 2**-12 is no TF32 number: rounded, the product would be 8.
    x = torch.full((8, 8), 1 + 2.0**-12, device=device)
    assert (x @ torch.ones(8, 8, device=device)).max().item() == 8 * (1 + 2.0**-12)
    platform.allow_tf32(True)
    platform.allow_tf32(False)


def tied_module():
    module = torch.nn.Module()
    module.embedding = torch.nn.Embedding(6, 4)
    module.head = torch.nn.Linear(4, 6, bias=True)
    module.head.weight = module.embedding.weight
    module.register_buffer("scale", torch.full((1,), 2.0))
    module.alias = torch.nn.Module()
    module.alias.register_buffer("scale", module.scale)
    module.head.weight.tensor_model_parallel = True
    module.head.bias.sequence_parallel = False
    return module


def test_a_moved_module_keeps_parameters_attributes_ties_and_optimizer(platform):
    device = platform.current_device()
    module = tied_module()
    before = dict(module.named_parameters())
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module.head.bias.grad = torch.ones(6)
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    assert platform.move_module(module) is module
    after = dict(module.named_parameters())
    for name, parameter in after.items():
        assert parameter is before[name] and parameter.device == device and parameter.requires_grad
        assert type(parameter) is torch.nn.Parameter and torch.equal(parameter.detach().cpu(), values[name])
    assert module.head.weight is module.embedding.weight
    assert module.head.weight.tensor_model_parallel is True and module.head.bias.sequence_parallel is False
    assert module.scale is module.alias.scale and module.scale.device == device
    assert module.head.bias.grad.device == device
    optimizer.zero_grad()
    out = module.head(module.embedding(torch.tensor([1, 2], device=device))) * module.scale
    out.sum().backward()
    optimizer.step()
    assert not torch.equal(module.head.weight.detach().cpu(), values["embedding.weight"])
    assert torch.equal(module.head.bias.detach().cpu(), values["head.bias"] - 4.0)


def test_capabilities_are_answered(platform):
    assert all(platform.offers(capability) in (True, False) for capability in CAPABILITIES)
    with pytest.raises(ValueError, match="unknown platform capability 'magic'"):
        platform.offers("magic")
