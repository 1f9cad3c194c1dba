"""Operations with adapters are those that torch counts in transformers' models with peft's adapters."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from megatron_rb.checkpoint.hf.adapters import open_adapter
from megatron_rb.checkpoint.hf.in_full import trained_in_full
from megatron_rb.checkpoint.hf.oracle import model_inputs
from megatron_rb.models.adapters.flops import adapted_flops
from megatron_rb.models.inputs import build_micro_batch
from megatron_rb.models.work import Work, work_of
from megatron_rb.parity.samples import draw_samples
from megatron_rb.shapes.shape import load_shape
from tests.parity.tiny_models import MODELS, write_model

CASES = {
    "all": {"target_modules": "all-linear"},
    "upper layers": {"target_modules": r".*language_model\.layers\.[23]\..*(v_proj|up_proj)"},
    "queries of one layer": {"target_modules": r".*language_model\.layers\.1\..*q_proj"},
    "output of attention": {"target_modules": ["o_proj", "attn.proj"]},
    "head in full": {"target_modules": ["down_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("family", list(MODELS))
@pytest.mark.parametrize("name", CASES)
def test_formula_equals_the_count_of_torch(family, name, tmp_path):
    from peft import LoraConfig, get_peft_model

    folder = write_model(tmp_path / family, family, seed=0)
    shape = load_shape(folder)
    # Eager attention is made of plain products, which the counter counts without rules of its own.
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(r=3, **CASES[name]))
    model.save_pretrained(tmp_path / "adapter")
    sample = draw_samples(shape, seed=3, scale=2)[2]
    sample.labels = sample.input_ids.copy()
    with FlopCounterMode(display=False) as counter:
        model(**model_inputs(sample, shape), use_cache=False).logits.sum().backward()
    work = work_of(build_micro_batch([sample], shape, tp_rank=0, tp_size=1, sequence_parallel=False))
    adapter = open_adapter(tmp_path / "adapter", "lora", shape).adapter
    full = trained_in_full(CASES[name].get("modules_to_save", []), shape)
    # transformers computes logits of every token, and the whole square of causal attention.
    whole = Work(
        work.samples,
        work.tokens,
        work.tokens,
        work.patches,
        2 * work.token_squares,
        work.frame_squares,
        work.window_squares,
    )
    assert counter.get_total_flops() == pytest.approx(adapted_flops(shape, whole, [adapter], full).total, rel=1e-12)
