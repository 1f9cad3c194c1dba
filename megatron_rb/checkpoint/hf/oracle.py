"""transformers' own model on our samples: block outputs, logits, losses and gradients to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText

from megatron_rb.checkpoint.hf.table import weight_table
from megatron_rb.data.sample import EncodedSample
from megatron_rb.models.inputs import IGNORED
from megatron_rb.shapes.shape import RoboBrainShape


@dataclass
class Trace:
    """What a model did with a list of samples; rows of all samples stand below each other, in fp32."""

    blocks: dict[str, torch.Tensor] = field(default_factory=dict)
    """Output of every block by name, in the order of the pipeline."""
    logits: torch.Tensor | None = None
    """`[tokens, vocab]`"""
    loss: float = float("nan")
    """Cross entropy per label."""
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """Gradients of `loss` by native parameter name, full shapes."""


def load_transformers(folder: str | Path) -> Any:
    """The model of a Hugging Face folder in fp32."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def model_inputs(sample: EncodedSample, shape: RoboBrainShape) -> dict[str, torch.Tensor]:
    """Keyword arguments of transformers' forward for one sample."""
    ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
    kinds = (ids == shape.image_token_id).int() + 2 * (ids == shape.video_token_id).int()
    inputs: dict[str, torch.Tensor] = {"input_ids": ids, "mm_token_type_ids": kinds}
    for kind, pixels_name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        chosen = [(g, p) for g, p in zip(sample.grids, sample.pixels or [], strict=True) if g.kind == kind]
        if not chosen:
            continue
        inputs[pixels_name] = torch.from_numpy(np.concatenate([pixels for _, pixels in chosen]))
        inputs[f"{kind}_grid_thw"] = torch.tensor([[g.t, g.h, g.w] for g, _ in chosen])
        if kind == "video" and shape.vision.tokens_per_second:
            inputs["second_per_grid_ts"] = torch.tensor([g.second_per_grid for g, _ in chosen])
    return inputs


def sample_loss(logits: torch.Tensor, sample: EncodedSample) -> torch.Tensor:
    """Summed cross entropy over the labels of one sample; logits `[tokens, vocab]`."""
    labels = torch.from_numpy(np.append(sample.labels[1:], IGNORED).astype(np.int64))
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def count_labels(samples: Sequence[EncodedSample]) -> int:
    """Labels over all samples; the first token of a sample is never predicted."""
    return sum(int((sample.labels[1:] != IGNORED).sum()) for sample in samples)


def run_transformers(folder: str | Path, shape: RoboBrainShape, samples: Sequence[EncodedSample], grads: bool) -> Trace:
    """Run every sample on its own and collect what `rb parity` compares."""
    return trace_of(load_transformers(folder), shape, samples, grads)


def trace_of(model: Any, shape: RoboBrainShape, samples: Sequence[EncodedSample], grads: bool) -> Trace:
    """The same with a model of transformers that is loaded already."""
    recorder = _BlockHooks(model, shape)
    total = max(count_labels(samples), 1)
    logits, loss = [], 0.0
    for sample in samples:
        recorder.start(sample)
        with torch.set_grad_enabled(grads):
            out = model(**model_inputs(sample, shape)).logits[0]
            part = sample_loss(out, sample) / total
        if grads:
            part.backward()
        loss += float(part.detach())
        logits.append(out.detach().float())
    trace = Trace(recorder.blocks(), torch.cat(logits), loss)
    if grads:
        trace.gradients = native_gradients(model, shape)
    return trace


def native_gradients(model: torch.nn.Module, shape: RoboBrainShape) -> dict[str, torch.Tensor]:
    """Gradients of a transformers model by native name; a parameter that was not used has a gradient of zeros."""
    parameters = dict(model.named_parameters())
    gradients = {}
    for name, rule in weight_table(shape).items():
        if all(hf_name in parameters for hf_name in rule.hf_names):
            parts = [parameters[hf_name] for hf_name in rule.hf_names]
            gradients[name] = rule.join([p.grad if p.grad is not None else torch.zeros_like(p) for p in parts])
    if shape.text.tied_embeddings:
        gradients.pop("language.head.output.weight", None)
    return gradients


class _BlockHooks:
    """Hooks on transformers' blocks; vision rows are put into the order in which the sample shows its images."""

    def __init__(self, model: Any, shape: RoboBrainShape) -> None:
        self.shape = shape
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.sample: EncodedSample | None = None
        self.calls: dict[str, list[torch.Tensor]] = {}
        visual, text = model.model.visual, model.model.language_model
        for index, block in enumerate(visual.blocks):
            self._hook(block, f"vision.layers.{index}", visual=True)
        for number, merger in enumerate(getattr(visual, "deepstack_merger_list", [])):
            self._hook(merger, f"vision.deepstack.{number}", visual=True)
        self._hook(visual.merger, "vision.merger", visual=True)
        for index, layer in enumerate(text.layers):
            self._hook(layer, f"language.layers.{index}", visual=False)

    def start(self, sample: EncodedSample) -> None:
        self._flush()
        self.sample = sample

    def blocks(self) -> dict[str, torch.Tensor]:
        self._flush()
        return {name: torch.cat(rows) for name, rows in self.rows.items()}

    def _hook(self, module: torch.nn.Module, name: str, visual: bool) -> None:
        def record(_module, _args, output):
            value = (output[0] if isinstance(output, tuple) else output).detach().float()
            if visual:
                self.calls.setdefault(name, []).append(value)
            else:
                self.rows.setdefault(name, []).append(value.reshape(-1, value.shape[-1]))

        module.register_forward_hook(record)

    def _flush(self) -> None:
        """transformers runs all images, then all videos; our order is that of the sequence."""
        if self.sample is None:
            return
        for name, calls in self.calls.items():
            per_kind = [kind for kind in ("image", "video") if any(g.kind == kind for g in self.sample.grids)]
            pieces: dict[str, list[torch.Tensor]] = {}
            for kind, rows in zip(per_kind, calls, strict=True):
                grids = [g for g in self.sample.grids if g.kind == kind]
                unit = sum(g.patches for g in grids) // rows.shape[0]
                pieces[kind] = list(rows.split([g.patches // unit for g in grids]))
            ordered = [pieces[g.kind].pop(0) for g in self.sample.grids]
            self.rows.setdefault(name, []).extend(ordered)
        self.calls = {}
