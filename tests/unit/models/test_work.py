"""FLOPs counted by formula are those that torch counts in transformers' own models."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from megatron_rb.checkpoint.hf.oracle import model_inputs
from megatron_rb.config.schema import FreezeConfig
from megatron_rb.data.padding import Size
from megatron_rb.models.inputs import build_micro_batch
from megatron_rb.models.work import Work, training_flops, work_of
from megatron_rb.parity.samples import draw_samples
from megatron_rb.planner.cost import model_flops
from megatron_rb.planner.trained import Frozen
from megatron_rb.planner.workload import MicroBatches
from megatron_rb.shapes.published import published_shape
from megatron_rb.shapes.shape import load_shape, shape_from_dict
from tests.parity.tiny_models import MODELS, write_model


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("work") / request.param, request.param, seed=0)
    shape = load_shape(folder)
    # Eager attention is made of plain products, which the counter counts without rules of its own.
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    sample = draw_samples(shape, seed=3, scale=2)[2]
    sample.labels = sample.input_ids.copy()
    return shape, model.train(), sample


def _micro_batch(shape, samples, **options):
    return build_micro_batch(samples, shape, tp_rank=0, tp_size=1, sequence_parallel=False, **options)


def _as_transformers_computes(shape, work: Work, freeze: FreezeConfig) -> float:
    """It computes logits of every token, and the whole square of causal attention."""
    all_logits = replace(work, labels=work.tokens)
    attention = replace(work, tokens=0, labels=0, patches=0, frame_squares=0, window_squares=0)
    return training_flops(shape, all_logits, freeze).total + training_flops(shape, attention, freeze).total


def _freeze(model, freeze: FreezeConfig) -> None:
    for name, parameter in model.named_parameters():
        part = "merger" if "merger" in name else "vision" if "visual" in name else "language"
        parameter.requires_grad_(not getattr(freeze, part))


@pytest.mark.parametrize(
    "freeze",
    [FreezeConfig(), FreezeConfig(vision=True), FreezeConfig(vision=True, merger=True), FreezeConfig(language=True)],
    ids=["all", "frozen vit", "language only", "vision only"],
)
def test_formula_equals_the_count_of_torch(case, freeze):
    shape, model, sample = case
    _freeze(model, freeze)
    with FlopCounterMode(display=False) as counter:
        model(**model_inputs(sample, shape), use_cache=False).logits.sum().backward()
    expected = _as_transformers_computes(shape, work_of(_micro_batch(shape, [sample])), freeze)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)


def test_work_of_a_pack_is_the_sum_of_its_samples_and_padding_is_no_work(case):
    shape, _, _ = case
    samples = draw_samples(shape, seed=4)
    alone = [work_of(_micro_batch(shape, [sample])) for sample in samples]
    packed = work_of(_micro_batch(shape, samples, padded=Size(4096, 4096)))
    assert packed == sum(alone, Work())
    assert work_of(_micro_batch(shape, [], padded=Size(64, 64))) == Work()


def test_a_hand_computed_language_model():
    shape = load_shape_of_hand_case()
    # 10 tokens of 2 layers: (q 8x8 + k, v 8x4 each + o 8x8 + mlp 3x8x16) = 576 weights, 3 passes of 2 x 10 x 576;
    # attention: 3 passes of 2 x heads 2 x head_dim 4 x 100; head: 3 labels x 8 x 32 weights x 2 x 3 passes.
    work = Work(samples=1, tokens=10, labels=3, token_squares=100)
    assert training_flops(shape, work).total == 2 * (3 * 2 * 10 * 576 + 3 * 2 * 2 * 4 * 100) + 3 * 2 * 3 * 8 * 32


@pytest.mark.parametrize("name", ["RoboBrain2.5-8B", "RoboBrain2.0-7B"])
def test_the_planner_counts_the_same_work(name):
    shape = published_shape(name)
    # Whole windows of 64 patches, as the planner takes them to be.
    work = Work(
        samples=2,
        tokens=6000,
        labels=900,
        patches=16384,
        token_squares=2 * 3000**2,
        frame_squares=4 * 4096**2,
        window_squares=256 * 64**2,
    )
    counts = (work.tokens, work.token_squares, work.patches, work.frame_squares, work.labels, work.samples)
    planned = model_flops(shape, MicroBatches(*(np.array([float(count)]) for count in counts)), Frozen())
    assert planned.item() == pytest.approx(training_flops(shape, work).total, rel=1e-9)


def load_shape_of_hand_case():
    text = {
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "head_dim": 4,
        "num_key_value_heads": 1,
        "vocab_size": 32,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e6, "mrope_section": [1, 1, 0]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "num_heads": 2,
        "intermediate_size": 8,
        "patch_size": 2,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 8,
        "num_position_embeddings": 4,
        "deepstack_visual_indexes": [],
    }
    tokens = dict(image_token_id=1, video_token_id=2, vision_start_token_id=3, vision_end_token_id=4)
    return shape_from_dict({"model_type": "qwen3_vl", "text_config": text, "vision_config": vision, **tokens})
