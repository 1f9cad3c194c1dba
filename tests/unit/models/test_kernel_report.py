"""`rb doctor --kernels`: every part that has several implementations, the one that runs, and why not the others."""

import json
import re
import subprocess
import sys

import pytest
import torch

from megatron_rb.kernels.dispatch import TABLE
from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.platform.mcore_shims import install_mcore_shims

install_mcore_shims(CpuPlatform())

from megatron_rb.models.kernel_report import kernel_report, report_text, taken_line  # noqa: E402


class OldMusa(CpuPlatform):
    """Answers like a musa device with a Triton of its own, without being one."""

    name = "musa"

    def _offers(self, capability: str) -> bool:
        return capability == "triton"


def test_every_part_has_one_implementation_that_is_taken():
    rows = kernel_report(CpuPlatform(), torch.float32)
    for part in ("layers", "adam", *TABLE):
        assert [row.implementation for row in rows if row.part == part and row.taken] in (["torch"], ["local"])
    assert all(row.why for row in rows)


def test_a_reason_is_given_for_each_other():
    reasons = {(row.part, row.implementation): row.why for row in kernel_report(OldMusa(), torch.bfloat16)}
    assert reasons["mrope", "triton"] == "on musa it has to be asked for"
    assert reasons["varlen_attention", "flash_attn"] == "it does not run on musa"
    assert reasons["layers", "transformer_engine"] == "Transformer Engine for musa is not installed"
    assert reasons["adam", "torch"] == "taken"


def test_what_is_asked_for_is_said_and_what_cannot_run_is_an_error():
    rows = kernel_report(CpuPlatform(), torch.float32, requests={"mrope": "torch"})
    taken = {row.part: row.why for row in rows if row.taken}
    assert taken["mrope"] == taken["qk_norm_mrope"] == "taken: kernels.mrope=torch asks for it"
    with pytest.raises(ValueError, match="varlen_attention=flash_attn was asked for, but it does not run on cpu"):
        kernel_report(CpuPlatform(), torch.float32, requests={"varlen_attention": "flash_attn"})


def test_line_of_a_run_names_what_is_taken_for_its_sizes(monkeypatch):
    monkeypatch.setattr(OldMusa, "device_type", "musa")
    line = taken_line(kernel_report(OldMusa(), torch.bfloat16, requests={"mrope": "triton"}, head_dim=64))
    assert line.startswith("kernels: layers local, adam torch, mrope triton, qk_norm_mrope triton, window_attention ")
    with pytest.raises(ValueError, match="mrope=triton was asked for, but head_dim 300 is above 256"):
        kernel_report(OldMusa(), torch.bfloat16, requests={"mrope": "triton"}, head_dim=300)


def test_text_says_where_it_holds():
    text = report_text(CpuPlatform(), torch.float32, kernel_report(CpuPlatform(), torch.float32))
    assert text.splitlines()[0].startswith("cpu (host), ") and "float32, collectives over gloo" in text
    assert re.search(r"^-> mrope +torch +taken$", text, re.MULTILINE)


def test_command_prints_the_table():
    command = [sys.executable, "-m", "megatron_rb.cli", "doctor", "--kernels", "--json", "platform=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {row["part"] for row in json.loads(done.stdout)} == {"layers", "adam", *TABLE}
