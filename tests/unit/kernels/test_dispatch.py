"""The table that says which implementation an operator takes."""

import ast
import importlib
import inspect
import re

import pytest
import torch

from megatron_rb.config.rules import CHOICES, check_values
from megatron_rb.config.schema import Config, KernelsConfig
from megatron_rb.kernels import dispatch
from megatron_rb.kernels.dispatch import TABLE, Call, kernel_table, select
from megatron_rb.models.kernel_report import SETTING
from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.platform.cuda import CudaPlatform


class FakePlatform(CpuPlatform):
    """A platform of any name that offers what it is told to."""

    def __init__(self, name: str, *offers: str) -> None:
        self.name = self.device_type = name  # type: ignore[misc]
        self.known = offers

    def _offers(self, capability: str) -> bool:
        return capability in self.known


@pytest.fixture
def hopper(monkeypatch):
    """A CUDA device of capability 9.0 on which every optional package is installed."""
    monkeypatch.setattr(dispatch, "platform_arch", lambda platform: (9, 0))
    monkeypatch.setattr(dispatch, "module_exists", lambda name: True)
    monkeypatch.setattr(dispatch, "why_no_triton", lambda platform: None)
    return FakePlatform("cuda", "triton", "flash_attn", "te")


WINDOW = Call(torch.bfloat16, 80, 64)


def test_cpu_takes_torch():
    for operator in dispatch.TABLE:
        assert select(operator, CpuPlatform(), Call(torch.float32, 64, 64)).name == "torch"


def test_cuda_takes_the_fused_kernels(hopper):
    assert select("window_attention", hopper, WINDOW).name == "triton"
    assert select("mrope", hopper, Call(torch.bfloat16, 128)).name == "triton"
    assert select("varlen_attention", hopper, Call(torch.bfloat16, 128)).name == "flash_attn_3"
    for operator in ("linear_cross_entropy", "rms_norm", "swiglu"):
        assert select(operator, hopper, Call(torch.bfloat16)).name == "liger"


def test_without_liger_kernel_torch_computes_losses_norms_and_gates(hopper, monkeypatch):
    monkeypatch.setattr(dispatch, "module_exists", lambda name: not name.startswith("liger_kernel"))
    for operator in ("linear_cross_entropy", "rms_norm", "swiglu"):
        choice = select(operator, hopper, Call(torch.bfloat16))
        assert choice.name == "torch" and "is not installed" in choice.declined["liger"]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (Call(torch.float64, 80, 64), "does not compute torch.float64"),
        (Call(torch.bfloat16, 96, 64), "head_dim 96 is above 80"),
        (Call(torch.bfloat16, 20, 64), "head_dim 20 is not a multiple of 8"),
        (Call(torch.bfloat16, 80, 65), "a sequence of 65 rows is above 64"),
    ],
)
def test_a_kernel_declines_what_it_cannot_take_and_says_why(hopper, call, reason):
    choice = select("window_attention", hopper, call)
    assert choice.name == "torch"
    assert reason in choice.declined["triton"]
    with pytest.raises(ValueError, match=f"window_attention=triton was asked for, but .*{reason}"):
        select("window_attention", hopper, call, "triton")


def test_an_old_device_declines(hopper, monkeypatch):
    monkeypatch.setattr(dispatch, "platform_arch", lambda platform: (7, 5))
    choice = select("varlen_attention", hopper, Call(torch.float16, 128))
    assert choice.name == "torch"
    assert "needs compute capability 8.0, this device has 7.5" in choice.declined["flash_attn"]


def test_moore_threads_takes_a_triton_kernel_only_when_asked(hopper):
    musa = FakePlatform("musa", "triton")
    assert select("window_attention", musa, WINDOW).name == "torch"
    assert select("window_attention", musa, WINDOW).declined["triton"] == "on musa it has to be asked for"
    assert select("window_attention", musa, WINDOW, "triton").name == "triton"


def test_packages_that_are_missing_are_declined(monkeypatch):
    monkeypatch.setattr(dispatch, "platform_arch", lambda platform: (9, 0))
    monkeypatch.setattr(dispatch, "module_exists", lambda name: name == "torch.nn.attention.varlen")
    choice = select("varlen_attention", FakePlatform("cuda"), Call(torch.bfloat16, 128))
    assert choice.name == "torch_varlen"
    assert choice.declined == {
        "flash_attn_3": "flash_attn_interface is not installed",
        "flash_attn": "platform cuda does not offer flash_attn",
        "flash_attn_4": "flash-attn-4 is not installed",
    }


@pytest.fixture
def flash_attn_4_alone(tmp_path, monkeypatch):
    """A folder as the distribution flash-attn-4 installs it: `flash_attn/cute` and nothing else in `flash_attn`."""
    for folder in ("flash_attn/cute", "flash_attn_4-4.0.0b1.dist-info"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "flash_attn/cute/__init__.py").touch()
    (tmp_path / "flash_attn_4-4.0.0b1.dist-info/METADATA").write_text("Name: flash-attn-4\nVersion: 4.0.0b1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(dispatch, "platform_arch", lambda platform: (10, 0))
    return tmp_path


def test_flash_attn_4_alone_is_taken_and_not_mistaken_for_release_2(flash_attn_4_alone):
    assert not CudaPlatform().offers("flash_attn")
    choice = select("varlen_attention", CudaPlatform(), Call(torch.bfloat16, 128))
    assert choice.name == "flash_attn_4"
    assert choice.declined["flash_attn"] == "platform cuda does not offer flash_attn"


def test_release_2_beside_flash_attn_4_comes_first(flash_attn_4_alone):
    (flash_attn_4_alone / "flash_attn/__init__.py").touch()
    importlib.invalidate_caches()
    assert select("varlen_attention", CudaPlatform(), Call(torch.bfloat16, 128)).name == "flash_attn"


def test_flash_attn_4_declines_large_heads_and_ampere(flash_attn_4_alone, monkeypatch):
    assert (
        "head_dim 256 is above 128"
        in select("varlen_attention", CudaPlatform(), Call(torch.bfloat16, 256)).declined["flash_attn_4"]
    )
    monkeypatch.setattr(dispatch, "platform_arch", lambda platform: (8, 0))
    choice = select("varlen_attention", CudaPlatform(), Call(torch.bfloat16, 128))
    assert "needs compute capability 9.0" in choice.declined["flash_attn_4"]


def test_a_plug_in_platform_is_served_by_torch():
    assert select("mrope", FakePlatform("tpu"), Call(torch.bfloat16, 128)).name == "torch"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="there is no operator 'rope'; there are mrope"):
        select("rope", CpuPlatform(), WINDOW)
    with pytest.raises(ValueError, match="mrope has no implementation 'cuda'; use auto, triton, torch"):
        select("mrope", CpuPlatform(), WINDOW, "cuda")


@pytest.mark.parametrize("name", vars(KernelsConfig()))
def test_what_a_setting_of_kernels_may_be_is_what_is_implemented(name):
    implemented = ("auto", *(row.name for row in TABLE[name]))
    assert CHOICES[f"kernels.{name}"] == implemented
    documented = set(re.findall(r"`(\w+)`", field_docs(KernelsConfig)[name]))
    assert documented == set(implemented)


def test_every_operator_follows_a_setting():
    assert {SETTING.get(operator, operator) for operator in TABLE} == set(vars(KernelsConfig()))
    for operator, setting in SETTING.items():
        assert [row.name for row in TABLE[operator]] == [row.name for row in TABLE[setting]]


def test_an_implementation_that_does_not_exist_is_refused_with_the_settings():
    with pytest.raises(ValueError, match="kernels.varlen_attention 'transformer_engine' is not known; use auto, flash"):
        check_values(Config(kernels=KernelsConfig(varlen_attention="transformer_engine")))


def field_docs(section: type) -> dict[str, str]:
    """The docstring under every field of a dataclass, by its name."""
    [body] = ast.parse(inspect.getsource(section)).body
    assert isinstance(body, ast.ClassDef)
    pairs = zip(body.body, body.body[1:], strict=False)
    return {ast.unparse(a.target): b.value.value for a, b in pairs if isinstance(a, ast.AnnAssign)}  # type: ignore


def test_the_choice_is_logged_once(caplog):
    call = Call(torch.float32, 24)
    with caplog.at_level("INFO"):
        for _ in range(3):
            dispatch.choose("mrope", torch.device("cpu"), call)
    lines = [record.message for record in caplog.records if "mrope" in record.message]
    assert len(lines) == 1 and "mrope on cpu in torch.float32 runs torch (not triton:" in lines[0]


def test_table_for_people_names_every_implementation_once(hopper):
    lines = kernel_table(hopper, WINDOW)
    assert len(lines) == sum(len(rows) for rows in dispatch.TABLE.values())
    taken = [operator for operator, _, state in lines if state == "taken"]
    assert taken == list(dispatch.TABLE)
    assert ("window_attention", "torch", "triton comes first") in lines
