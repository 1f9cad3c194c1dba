"""transformers' own training step on our samples: the yardstick of `rb bench step` and `rb bench train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from megatron_rb.checkpoint.hf.oracle import count_labels, load_transformers, model_inputs
from megatron_rb.config.schema import OptimizerConfig
from megatron_rb.data.sample import EncodedSample
from megatron_rb.models.inputs import IGNORED
from megatron_rb.platform import Platform
from megatron_rb.shapes.families import FAMILIES, ExampleSizes
from megatron_rb.shapes.shape import RoboBrainShape

BENCHMARK_SIZES = ExampleSizes(
    vision_layers=6,
    vision_hidden=256,
    vision_heads=4,
    vision_ffn=1024,
    text_layers=6,
    text_hidden=512,
    text_heads=8,
    text_kv_heads=4,
    text_ffn=1536,
    vocab_size=8192,
    position_grid_side=24,
    deepstack_layers=(1, 3, 5),
    full_attention_layers=(2, 5),
    max_positions=4096,
)
"""Small models with the proportions of the real ones, about 30 million weights."""
_TOKENS = {"image_token_id": 8191, "video_token_id": 8190, "vision_start_token_id": 8189, "vision_end_token_id": 8188}


def example_model(family: str, sizes: ExampleSizes, tokens: Mapping[str, int]) -> PreTrainedModel:
    """transformers' model of a family at these sizes, with random weights.

    Args:
        tokens: `image_token_id` and the other special tokens of config.json.
    """
    raw = {**FAMILIES[family].example(sizes), **tokens}
    raw["text_config"] |= {"bos_token_id": None, "eos_token_id": None}
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(raw.pop("model_type"), **raw))


def write_benchmark_model(folder: str | Path, family: str, seed: int = 0) -> None:
    """Save a randomly initialised benchmark model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        example_model(family, BENCHMARK_SIZES, _TOKENS).float().save_pretrained(folder)


def write_random_weights(folder: str | Path, dtype: torch.dtype, seed: int = 0) -> None:
    """Give a folder that holds a `config.json` alone random weights, drawn as transformers draws them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        AutoModelForImageTextToText.from_config(config, dtype=dtype).save_pretrained(folder)


class TransformersStep:
    """Forward, backward, clipping and fused AdamW, as transformers' Trainer does them.

    Weights and optimizer state are fp32; with `dtype` bf16 the passes run under autocast (Trainer's `bf16=True`).

    Args:
        batches: the samples of each forward pass, padded to the longest of them; gradients are accumulated.
    """

    def __init__(
        self,
        folder: str | Path,
        shape: RoboBrainShape,
        batches: Sequence[Sequence[EncodedSample]],
        settings: OptimizerConfig,
        platform: Platform,
        dtype: str = "fp32",
    ) -> None:
        self.platform, self.device = platform, platform.current_device()
        self.autocast = dtype == "bf16"
        self.model = load_transformers(folder).to(self.device).train()
        self.clip_grad = settings.clip_grad
        self.num_labels = count_labels([sample for samples in batches for sample in samples])
        self.batches = [padded_inputs(samples, shape) for samples in batches]
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        betas = (settings.beta1, settings.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)

    def __call__(self) -> float:
        """Take one step; returns the loss per label before it."""
        loss = torch.zeros((), device=self.device)
        for batch in self.batches:
            inputs = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                # Labels of the whole step, so that accumulated gradients are those of one batch.
                part = self.model(**inputs, num_items_in_batch=self.num_labels, use_cache=False).loss
            part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.platform.synchronize()
        return float(loss)


def padded_batches(samples: Sequence[EncodedSample], most_tokens: int) -> list[list[EncodedSample]]:
    """Samples of similar length together, as many as padded to the longest of them have at most so many tokens."""
    batches: list[list[EncodedSample]] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.input_ids)):
        longest = len(batches[-1][0].input_ids) if batches else 0
        if not batches or (len(batches[-1]) + 1) * longest > most_tokens:
            batches.append([])
        batches[-1].append(sample)
    return batches


def padded_inputs(samples: Sequence[EncodedSample], shape: RoboBrainShape) -> dict[str, torch.Tensor]:
    """Keyword arguments of transformers' forward for several samples, padded on the right."""
    parts = [model_inputs(sample, shape) for sample in samples]
    labels = [torch.from_numpy(sample.labels).long() for sample in samples]
    rows = {
        "input_ids": ([part["input_ids"][0] for part in parts], 0),
        "mm_token_type_ids": ([part["mm_token_type_ids"][0] for part in parts], 0),
        "labels": (labels, IGNORED),
        "attention_mask": ([torch.ones_like(label) for label in labels], 0),
    }
    # Pictures of all samples lie one after the other; a sample without any adds nothing.
    media = {name for part in parts for name in part} - set(rows)
    inputs = {name: torch.cat([part[name] for part in parts if name in part]) for name in sorted(media)}
    for name, (values, filler) in rows.items():
        inputs[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filler)
    return inputs
