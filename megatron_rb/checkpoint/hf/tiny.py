"""Tiny randomly initialised RoboBrain folders: same architecture and files as the real ones, a few million weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel, Qwen2Tokenizer

from megatron_rb.data.problems import BadSample
from megatron_rb.data.rows import parse_line
from megatron_rb.shapes.families import FAMILIES, NEWEST, ExampleSizes, Family

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen cuts text before merging; every digit stands alone."""

DEFAULT_SYSTEM = "You are a helpful assistant."

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- else -%}
{{- raise_exception('unknown content type ' + part['type'] + '; use text, image or video') -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


BRANCH_ENDS = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "linear_fc2.weight", "mlp.fc2.weight")


@dataclass(frozen=True)
class TinySize:
    """Sizes of a tiny model; head counts and widths divide by 2, so that two tensor-parallel ranks can hold it.

    The defaults learn the demo data on two CPU cores within minutes.
    """

    vision_layers: int = 2
    vision_hidden: int = 128
    vision_heads: int = 4
    vision_ffn: int = 256
    deepstack_layers: tuple[int, ...] = (0, 1)
    """Vision layers whose DeepStack features the first decoder layers add (Qwen3-VL)."""
    position_grid_side: int = 8
    """Side of the learned position grid (Qwen3-VL)."""
    text_layers: int = 3
    text_hidden: int = 128
    text_heads: int = 4
    text_kv_heads: int = 2
    head_dim: int = 32
    text_ffn: int = 384
    vocab_size: int = 1024
    """Most tokens of the vocabulary, special ones included; rounded up to a multiple of 128 in the embedding."""
    min_pixels: int = 32 * 32
    max_pixels: int = 128 * 128
    """Largest image area after resizing."""
    initializer_range: float = 0.02
    """Written to the config for whoever draws weights anew; the folder's own weights come from `draw_weights`."""


def write_tiny_model(texts: Iterable[str], out: Path, *, family: str = NEWEST, size: TinySize, seed: int) -> int:
    """Write a complete Hugging Face folder whose vocabulary is learnt from `texts`; returns the number of weights.

    Raises:
        ValueError: the family is unknown, or `out` holds something already or is no folder.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; choose from {', '.join(FAMILIES)}")
    taken = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    if taken is not None:
        raise ValueError(f"{taken} is a file; name a new folder for the model")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name a new folder or remove it first")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(texts, size.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build_model(FAMILIES[family], tokenizer, size)
        draw_weights(model)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[_token(tokenizer, "<|im_end|>"), _token(tokenizer, "<|endoftext|>")],
        pad_token_id=_token(tokenizer, "<|endoftext|>"),
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _write_processors(out, FAMILIES[family], model.config.vision_config.patch_size, size)
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def draw_weights(model: PreTrainedModel) -> None:
    """Random weights a narrow model learns from within minutes.

    Matrices scale with 1 / sqrt(inputs), so that a signal keeps its size at any width; residual branches end softly;
    image positions are as loud as the pixels (at the usual 0.02 the model is blind to places for long).
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, _standard_deviation(name, parameter))


def _standard_deviation(name: str, parameter: torch.nn.Parameter) -> float:
    if "pos_embed" in name or "embed_tokens" in name:
        return 0.5
    if "lm_head" in name:
        return 0.02
    ends_a_branch = name.endswith(BRANCH_ENDS) and "merger" not in name
    return (0.35 if ends_a_branch else 1.0) * parameter[0].numel() ** -0.5


def conversation_texts(file: Path) -> list[str]:
    """Every turn of a jsonl file of conversations in any form that is trained on, with the words of the chat template.

    Raises:
        ValueError: there is no such file, it holds no row, or a row that cannot be trained on.
    """
    if not file.is_file():
        raise ValueError(f"no file {file}; `rb demo-data` writes one")
    lines = [(number, line) for number, line in enumerate(file.read_bytes().splitlines(), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{file} holds no row; name a jsonl file of conversations (`rb demo-data` writes one)")
    turns = [text for number, line in lines for text in _texts_of(line, file, number)]
    return [*turns, *([f"system user assistant\n{DEFAULT_SYSTEM}"] * len(lines))]


def _texts_of(line: bytes, file: Path, number: int) -> list[str]:
    try:
        conversation = parse_line(line, "", file.parent)
    except BadSample as error:
        raise ValueError(f"{file}, line {number}: {error}") from error
    row = json.loads(line)
    if "conversations" in row and all(isinstance(turn.get("value"), str) for turn in row["conversations"]):
        return [turn["value"] for turn in row["conversations"]]  # with the markers of its pictures
    return [part for turn in conversation.turns for part in turn.parts if isinstance(part, str)]


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen's splitting and special tokens, trained on `texts`."""
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is below {smallest}, the bytes and the special tokens alone")
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    state = json.loads(bpe.to_str())["model"]
    merges: list[Any] = [tuple(merge) for merge in state["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=32768,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _token(tokenizer: Qwen2Tokenizer, token: str) -> int:
    return tokenizer.get_vocab()[token]


def _token_ids(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    return {
        "image_token_id": _token(tokenizer, "<|image_pad|>"),
        "video_token_id": _token(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": _token(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": _token(tokenizer, "<|vision_end|>"),
    }


def _build_model(family: Family, tokenizer: Qwen2Tokenizer, size: TinySize) -> PreTrainedModel:
    raw = family.example(_example_sizes(tokenizer, size)) | _token_ids(tokenizer)
    raw["text_config"] |= {"bos_token_id": None, "eos_token_id": _token(tokenizer, "<|im_end|>")}
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(raw.pop("model_type"), **raw))


def _example_sizes(tokenizer: Qwen2Tokenizer, size: TinySize) -> ExampleSizes:
    return ExampleSizes(
        vision_layers=size.vision_layers,
        vision_hidden=size.vision_hidden,
        vision_heads=size.vision_heads,
        vision_ffn=size.vision_ffn,
        text_layers=size.text_layers,
        text_hidden=size.text_hidden,
        text_heads=size.text_heads,
        text_kv_heads=size.text_kv_heads,
        text_ffn=size.text_ffn,
        vocab_size=-(-len(tokenizer) // 128) * 128,
        head_dim=size.head_dim,
        position_grid_side=size.position_grid_side,
        deepstack_layers=size.deepstack_layers,
        full_attention_layers=tuple(range(1, size.vision_layers, 2)),
        initializer_range=size.initializer_range,
    )


def _write_processors(out: Path, family: Family, patch_size: int, size: TinySize) -> None:
    """`preprocessor_config.json` and its video twin, written as files: the video class needs torchvision."""
    shared = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": family.videos.mean,
        "image_std": family.videos.std,
        "merge_size": 2,
        "patch_size": patch_size,
        "processor_class": family.processor,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size.min_pixels, "longest_edge": size.max_pixels},
        "temporal_patch_size": 2,
    }
    images = shared | {"image_processor_type": "Qwen2VLImageProcessor"}
    videos = shared | {
        "video_processor_type": family.video_processor,
        "do_sample_frames": True,
        "fps": 2,
        "max_frames": 64,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    (out / "video_preprocessor_config.json").write_text(json.dumps(videos, indent=2) + "\n")
