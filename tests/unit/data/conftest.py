"""A small tokenizer, processor folders of both model families, and transformers' own processors over them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from transformers.video_utils import VideoMetadata

from megatron_rb.config.schema import DataConfig
from megatron_rb.data.build import build_encoder
from megatron_rb.data.encoder import SampleEncoder
from megatron_rb.data.tokenizer import SPECIAL_TOKENS
from megatron_rb.shapes.families import FAMILIES
from megatron_rb.shapes.shape import RoboBrainShape, shape_from_dict

PATCH = {"qwen2_5_vl": 14, "qwen3_vl": 16, "qwen2_vl": 14}
WORDS = [
    "system user assistant\nYou are a helpful assistant.\n",
    "Where is the red cube? Point to it. [(512, 340)] <0.5 seconds> The arm opens its gripper above the table.",
]
TEMPLATE = """\
{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\\nDefault.<|im_end|>\\n' }}{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{ part.text }}
{%- elif part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


@pytest.fixture(scope="session")
def hf_tokenizer() -> Qwen2Tokenizer:
    """Qwen's tokenizer class over a vocabulary learnt from WORDS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        WORDS * 20, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    )
    learnt = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
    )


def _config(family: str, tokenizer: Qwen2Tokenizer) -> dict:
    token = tokenizer.convert_tokens_to_ids
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "patch_size": PATCH[family],
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 32,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    text = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 512,
        "rope_parameters": {"rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    return {
        "model_type": family,
        "vision_config": vision,
        "text_config": text,
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
    }


def _image_processor(family: str) -> Qwen2VLImageProcessorPil:
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if family == "qwen3_vl" else {}
    size = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
    return Qwen2VLImageProcessorPil(patch_size=PATCH[family], size=size, **half)


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def folder(family, hf_tokenizer, tmp_path_factory) -> Path:
    """A Hugging Face folder without weights."""
    path = tmp_path_factory.mktemp(family)
    hf_tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "config.json").write_text(json.dumps(_config(family, hf_tokenizer)))
    images = _image_processor(family)
    images.save_pretrained(path)
    videos = json.loads((path / "preprocessor_config.json").read_text())
    area = 8 * 128 * 128 if FAMILIES[family].videos.whole_clip else 128 * 128
    videos["size"] = {"shortest_edge": 32 * 32, "longest_edge": area}
    (path / "video_preprocessor_config.json").write_text(json.dumps(videos))
    return path


@pytest.fixture(scope="session")
def shape(folder) -> RoboBrainShape:
    return shape_from_dict(json.loads((folder / "config.json").read_text()))


@pytest.fixture(scope="session")
def encoder(folder, shape) -> SampleEncoder:
    return build_encoder(DataConfig(system_prompt=""), folder, shape)


@pytest.fixture
def draw_image(tmp_path):
    """Write a noisy image of a size and return its path."""

    def write(name: str, width: int, height: int, mode: str = "RGB", **options) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
        noise = np.random.default_rng(width * height).integers(0, 256, (height, width, *channels), dtype=np.uint8)
        Image.fromarray(noise, mode).save(path, **options)
        return str(path)

    return write


class _SizesOnly:
    """Stands in for transformers' video processor, which needs torchvision: the grids, without pixels."""

    temporal_patch_size = 2
    merge_size = 2
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, grids: list[tuple[int, int, int]], metadata: list[VideoMetadata]) -> None:
        self.grids, self.metadata = grids, metadata

    def __call__(self, videos, **options) -> dict:
        return {"video_grid_thw": np.array(self.grids), "video_metadata": self.metadata}


@pytest.fixture(scope="session")
def reference(family, hf_tokenizer):
    """transformers' processor; the part that looks at video pixels is replaced by given grids."""
    base = {"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor, "qwen2_vl": Qwen2VLProcessor}[family]

    class Reference(base):
        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

    def build(grids=(), metadata=()):
        processor = Reference(
            _image_processor(family), hf_tokenizer, _SizesOnly(list(grids), list(metadata)), chat_template=TEMPLATE
        )
        return SimpleNamespace(render=processor.apply_chat_template, process=processor)

    return build
