"""Ten optimizer steps give transformers' losses under every layout, whatever runs in parallel."""

from functools import partial

import pytest
import torch

from megatron_rb.checkpoint.hf.oracle import count_labels, load_transformers, model_inputs, sample_loss
from megatron_rb.parity.samples import draw_samples
from megatron_rb.shapes.shape import load_shape
from tests.distributed.world import run_world
from tests.parity.layouts import context_layouts, layouts
from tests.parity.tiny_models import write_model

STEPS, LR, SAMPLE_SEED = 10, 1e-3, 20


ADAMW = partial(torch.optim.AdamW, lr=LR, betas=(0.9, 0.999), eps=1e-8)
SGD_LR = 0.05


def transformers_losses(folder, frozen=(), build=ADAMW):
    """Losses of plain transformers with an optimizer of torch on the same batches."""
    model = load_transformers(folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    return losses_of(model, load_shape(folder), build)


def losses_of(model, shape, build=ADAMW):
    """The same of a model whose parameters say whether they are trained."""
    torch.set_num_threads(1)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for n, p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = build(groups)
    losses = []
    for step in range(STEPS):
        samples = draw_samples(shape, seed=SAMPLE_SEED + step % 2)
        total = count_labels(samples)
        optimizer.zero_grad()
        loss = sum(sample_loss(model(**model_inputs(s, shape)).logits[0], s) for s in samples) / total
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_losses_equal_transformers(family, tmp_path):
    folder = write_model(tmp_path / "model", family, seed=1)
    shape = load_shape(folder)
    expected = transformers_losses(folder)
    cuts = [cut for cut in layouts(shape.vision.num_layers, shape.text.num_layers) if "packed" not in cut]
    cuts += [
        cuts[0] | {"distributed_optimizer": False},
        cuts[0] | {"overlap": False},
        cuts[3] | {"recompute": -1},
        cuts[3] | {"recompute_per_slice": [-1, *[0] * (cuts[3]["layout"].count("|"))]},
        cuts[0] | {"padded": [180, 300]},
        next(cut for cut in cuts if cut.get("sp") and cut["pp"] == 2) | {"padded": [181, 301]},
    ]
    context = context_layouts(shape.vision.num_layers, shape.text.num_layers)
    cuts += [
        context[0] | {"distributed_optimizer": False, "padded": [180, 300]},
        context[1] | {"recompute": -1},
        context[2],
        context[4],
    ]
    cases = [{"hf": str(folder), "lr": LR, "sample_seed": SAMPLE_SEED, **cut} for cut in cuts]
    for case, curve in zip(cases, run_losses(cases), strict=True):
        assert curve == pytest.approx(expected, rel=1e-4), case
    assert expected[-1] < 0.9 * expected[0]


def test_frozen_parts_stay_and_the_rest_trains(tmp_path):
    folder = write_model(tmp_path / "model", "qwen3_vl", seed=0)
    shape = load_shape(folder)
    whole = f"P v*{shape.vision.num_layers} M E t*{shape.text.num_layers} L"
    split = f"P v*{shape.vision.num_layers} | M E t*{shape.text.num_layers} L"
    frozen_vit = {"freeze_vision": True, "lr": LR}
    only_merger = frozen_vit | {"freeze_language": True}
    cuts = [{"tp": 1, "pp": 1, "layout": whole}, {"tp": 2, "pp": 2, "layout": split}]
    cases = [
        {"hf": str(folder), "sample_seed": SAMPLE_SEED, **cut, **f} for f in (frozen_vit, only_merger) for cut in cuts
    ]
    curves = run_losses(cases)
    vit = ("visual.blocks", "visual.patch_embed", "visual.pos_embed")
    for curve, frozen in zip(
        curves, (vit, vit, (*vit, "language_model", "lm_head"), (*vit, "language_model", "lm_head")), strict=True
    ):
        assert curve == pytest.approx(transformers_losses(folder, frozen), rel=1e-4)


def test_sgd_gives_the_losses_of_torch_on_every_layout_and_across_a_change_of_it(tmp_path):
    folder = write_model(tmp_path / "model", "qwen2_vl", seed=1)
    shape = load_shape(folder)
    sgd = {
        "hf": str(folder),
        "sample_seed": SAMPLE_SEED,
        "lr": SGD_LR,
        "optimizer": "sgd",
        "distributed_optimizer": False,
    }
    cuts = layouts(shape.vision.num_layers, shape.text.num_layers)
    cuts = [cuts[0], cuts[3], cuts[5], cuts[8], context_layouts(shape.vision.num_layers, shape.text.num_layers)[0]]
    half = str(tmp_path / "half")
    cases = [sgd | cut for cut in cuts]
    cases += [sgd | cuts[1] | {"save": half, "last": STEPS // 2}, sgd | cuts[2] | {"load": half}]
    *curves, first, rest = run_losses(cases)
    expected = transformers_losses(folder, build=partial(torch.optim.SGD, lr=SGD_LR, momentum=0.9))
    for case, curve in zip(cases, [*curves, first + rest], strict=False):
        assert curve == pytest.approx(expected, rel=1e-4), case
    assert expected[-1] < 0.9 * expected[0]


def test_bf16_with_fp32_main_weights_stays_near_fp32(tmp_path):
    folder = write_model(tmp_path / "model", "qwen3_vl", seed=0)
    shape = load_shape(folder)
    split = f"P v*2 | v*{shape.vision.num_layers - 2} M E t*{shape.text.num_layers} L"
    case = {"hf": str(folder), "sample_seed": SAMPLE_SEED, "lr": LR, "dtype": "bf16", "tp": 2, "pp": 2, "layout": split}
    expected = transformers_losses(folder)
    for curve in run_losses([case | {"sp": True}, case | {"tp": 1, "cp": 2}]):
        assert curve == pytest.approx(expected, rel=0.05)
        assert curve != pytest.approx(expected, rel=1e-4)  # it really ran in bf16


def run_losses(cases, timeout=500):
    return run_world("tests.distributed.cases_training:losses", 4, timeout=timeout, cases=cases, steps=STEPS)[0]
