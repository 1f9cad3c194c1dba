"""The adaptation of megatron-core: scoped, reversible, version-gated."""

import importlib
import logging
import subprocess
import sys

import pytest
import torch

from megatron_rb.platform import mcore_shims, mcore_version
from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.platform.group_step_adamw import GroupStepAdamW
from megatron_rb.platform.mcore_shims import install_mcore_shims


@pytest.fixture
def handle():
    handle = install_mcore_shims(CpuPlatform())
    yield handle
    install_mcore_shims(CpuPlatform())


def _snapshot():
    state = {}
    for name in mcore_shims.DEVICE_MODULES:
        module = importlib.import_module(f"megatron.core.{name}")
        state[name] = module.__dict__.get("torch")
        for function in mcore_shims._functions_of(module):
            state[name, function.__qualname__, function.__code__.co_firstlineno] = (
                function.__code__,
                function.__defaults__,
                function.__kwdefaults__,
            )
    optimizers = importlib.import_module("megatron.core.optimizer")
    state["adam"] = (optimizers.Adam, optimizers.USING_PYTORCH_OPTIMIZER, optimizers.distrib_optimizer.HAVE_APEX_OR_TE)
    return state


def test_undo_restores_and_install_is_repeatable(handle):
    adapted = _snapshot()
    handle.undo()
    plain = _snapshot()
    assert plain["adam"][0] is not GroupStepAdamW
    assert plain["timers"] is torch
    again = install_mcore_shims(CpuPlatform())
    assert again is not handle
    assert _snapshot().keys() == adapted.keys()
    again.undo()
    assert _snapshot() == plain


def test_install_twice_gives_the_same_handle(handle):
    assert install_mcore_shims(CpuPlatform()) is handle


def test_torch_itself_is_untouched(handle):
    assert not torch.cuda.is_available()
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert torch.compile.__module__ == "torch"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()


def test_another_device_is_refused_while_installed(handle):
    class Other(CpuPlatform):
        name = device_type = "musa"

    with pytest.raises(RuntimeError, match="adapted to cpu in this process"):
        install_mcore_shims(Other())


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(mcore_version, "found_version", lambda: "0.20.0")
    with pytest.raises(ValueError, match="megatron-core 0.20.0 of .* is not supported"):
        install_mcore_shims(CpuPlatform())


@pytest.mark.parametrize("module", ["optimizer", "distrib_optimizer"])
def test_groups_are_told_apart_without_their_learning_rates(handle, monkeypatch, module):
    """From 0.19 on megatron-core asks for equal ones; other checkpoints have none, a resumed run may change them."""
    handle.undo()
    optimizer = importlib.import_module(f"megatron.core.optimizer.{module}")
    as_in_0_19 = ("optimizer", "max_lr", "min_lr", "start_wd", "end_wd", "wd_mult", "lr_mult", "is_decoupled_lr")
    monkeypatch.setattr(optimizer, "param_group_identifier_keys", as_in_0_19)
    again = install_mcore_shims(CpuPlatform())
    assert optimizer.param_group_identifier_keys == ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
    again.undo()
    assert optimizer.param_group_identifier_keys == as_in_0_19


def test_what_nobody_can_change_is_not_logged(handle, caplog):
    logger = logging.getLogger("megatron.core.dist_checkpointing.strategies.common")
    logger.warning("load_common is deprecated and will be removed in a future release.")
    logger.warning("another line")
    assert caplog.messages == ["another line"]
    handle.undo()
    logger.warning("load_common is deprecated")
    assert caplog.messages == ["another line", "load_common is deprecated"]


def test_a_missing_symbol_is_named(handle):
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    with pytest.raises(RuntimeError, match="has no megatron.core.tensor_parallel.random.absent"):
        handle.set(random, "absent", None)


def test_rewriting_speaks_of_the_device_wherever_cuda_is_named():
    namespace: dict = {}
    source = """
def f(x, t):
    def inner():
        return torch.cuda.current_device(), x.cuda(), 'cuda'
    return inner(), x.type() in ['torch.cuda.HalfTensor', 'torch.cuda.FloatTensor'], 'cuda is a word'
"""
    exec(source, namespace)
    code = mcore_shims._rewrite_code(namespace["f"].__code__, "musa")
    inner = next(constant for constant in code.co_consts if hasattr(constant, "co_names"))
    assert "musa" in inner.co_names and "cuda" not in inner.co_names
    assert "musa" in inner.co_consts
    assert ("torch.musa.HalfTensor", "torch.musa.FloatTensor") in code.co_consts
    assert "cuda is a word" in code.co_consts


def test_code_without_cuda_keeps_its_identity():
    code = test_code_without_cuda_keeps_its_identity.__code__
    assert mcore_shims._rewrite_code(code, "cpu") is code


def test_order_of_import_is_checked():
    program = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import megatron.core\n"
        "from megatron_rb.platform.cpu import CpuPlatform\n"
        "from megatron_rb.platform.mcore_shims import install_mcore_shims\n"
        "try: install_mcore_shims(CpuPlatform())\n"
        "except RuntimeError as error: print(error)\n"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert "call install_mcore_shims first" in output.stdout


def test_float16_module_casts_tensors_by_dtype(handle):
    from megatron.core.transformer.module import float16_to_fp32, fp32_to_float16

    assert fp32_to_float16(torch.ones(1), lambda t: t.bfloat16()).dtype == torch.bfloat16
    assert float16_to_fp32(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
