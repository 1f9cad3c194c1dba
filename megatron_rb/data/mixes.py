"""Mixes: what the samples of a benchmark look like; published with every result, so that it can be measured again."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_rb.config.written import load_yaml, value_of


@dataclass(frozen=True)
class SampleKind:
    """Samples of one kind; ranges are least and most, each value in them equally likely."""

    share: float
    """Part of all samples; the shares of a mix add up to 1."""
    text_tokens: tuple[int, int, int]
    """Least, median and most; log-normal, the 84th percentile at 2.2 x the median."""
    images: tuple[int, int] = (0, 0)
    """Number of images."""
    side: tuple[int, int] = (448, 448)
    """Height and width of images and frames in pixels, drawn apart from each other."""
    frames: tuple[int, int] = (0, 0)
    """Frames of one video."""


@dataclass(frozen=True)
class Mix:
    """A declared mix of samples and how they are packed."""

    name: str
    about: str
    seq_length: int
    """Tokens of a micro-batch."""
    max_patches: int
    """Vision patches of a micro-batch."""
    micro_batches: int
    """Per data-parallel rank and step."""
    kinds: tuple[SampleKind, ...]
    samples: int = 20_000
    """Different samples before they come again."""
    answer_share: float = 0.3
    """Part of the text tokens that loss is taken on."""
    seed: int = 0

    def __post_init__(self) -> None:
        total = sum(kind.share for kind in self.kinds)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of mix '{self.name}' add up to {total:g}, not to 1; correct the kinds")
        for kind in self.kinds:
            for name in ("images", "side", "frames", "text_tokens"):
                values = getattr(kind, name)
                if list(values) != sorted(values) or values[0] < (1 if name in ("side", "text_tokens") else 0):
                    raise ValueError(
                        f"mix '{self.name}' has {name} {list(values)}; write values from least to most, not below "
                        f"{1 if name in ('side', 'text_tokens') else 0}"
                    )
        if min(self.micro_batches, self.samples) < 1 or not 0 < self.answer_share <= 1:
            raise ValueError(
                f"mix '{self.name}' has micro_batches {self.micro_batches}, samples {self.samples} and answer_share "
                f"{self.answer_share:g}; the first two must be at least 1, the last above 0 and at most 1"
            )


# Instruction data as RoboBrain's stages mix it: mostly one image, some with several, some text alone.
_IMAGES = (
    SampleKind(share=0.55, images=(1, 1), side=(448, 1280), text_tokens=(20, 200, 3000)),
    SampleKind(share=0.20, images=(2, 4), side=(448, 896), text_tokens=(20, 200, 3000)),
    SampleKind(share=0.05, images=(5, 8), side=(448, 512), text_tokens=(20, 200, 2000)),
    SampleKind(share=0.20, text_tokens=(20, 500, 4000)),
)

MIXES = {
    mix.name: mix
    for mix in (
        Mix("images_8k", "images of 448 to 1280 px with text, packed to 8k tokens", 8192, 32768, 4, _IMAGES),
        Mix("images_16k", "images of 448 to 1280 px with text, packed to 16k tokens", 16384, 65536, 4, _IMAGES),
        Mix(
            "video_16k",
            "ViT-heavy: videos of 8 to 64 frames, packed to 16k tokens",
            16384,
            65536,
            4,
            (
                SampleKind(share=0.8, frames=(8, 64), side=(280, 448), text_tokens=(20, 150, 1000)),
                SampleKind(share=0.2, images=(1, 1), side=(448, 1280), text_tokens=(20, 200, 2000)),
            ),
        ),
        Mix(
            "text_8k",
            "text alone, packed to 8k tokens",
            8192,
            4096,
            4,
            (SampleKind(share=1.0, text_tokens=(20, 600, 6000)),),
        ),
        Mix(
            "tiny",
            "small images with short text, for a CPU",
            512,
            2048,
            4,
            (
                SampleKind(share=0.5, images=(1, 1), side=(112, 280), text_tokens=(10, 40, 120)),
                SampleKind(share=0.2, images=(2, 3), side=(112, 168), text_tokens=(10, 40, 120)),
                SampleKind(share=0.1, frames=(4, 8), side=(84, 140), text_tokens=(10, 40, 120)),
                SampleKind(share=0.2, text_tokens=(10, 60, 200)),
            ),
            samples=400,
        ),
    )
}


def load_mix(name: str) -> Mix:
    """A shipped mix by name, or one of your own by the path of its yaml or json file.

    Raises:
        ValueError: there is no such mix, or the file does not describe one.
    """
    if name in MIXES:
        return MIXES[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".json"):
        if not path.is_file():
            raise ValueError(f"there is no mix file {path}")
        try:
            tree = load_yaml(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        # A result holds the mix it was measured on.
        tree = tree["mix"] if isinstance(tree, dict) and "mix" in tree else tree
        return mix_from_tree(value_of(tree, Mix), str(path))
    close = difflib.get_close_matches(name, MIXES, n=1)
    hint = f"; did you mean {close[0]}?" if close else ";"
    raise ValueError(f"there is no mix '{name}'{hint} there are {', '.join(MIXES)}, and any file NAME.yaml")


def mix_from_tree(tree: Any, origin: str) -> Mix:
    """A mix from the content of a file; every field must be known and of its type."""
    values = _fields(tree, Mix, origin)
    if not isinstance(values["kinds"], list) or not values["kinds"]:
        raise ValueError(f"{origin}: kinds must be a list of at least one kind of sample")
    kinds = [_fields(kind, SampleKind, f"{origin}, kind {number}") for number, kind in enumerate(values["kinds"])]
    return Mix(**values | {"kinds": tuple(SampleKind(**kind) for kind in kinds)})


def _fields(tree: Any, cls: type, origin: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ValueError(f"{origin}: a mix is written as `key: value`, found {type(tree).__name__}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in tree:
        if name not in known:
            raise ValueError(f"{origin}: there is no '{name}' in a mix; it may hold {', '.join(known)}")
    missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in tree]
    if missing:
        raise ValueError(f"{origin} misses {', '.join(missing)}")
    return {name: _typed(value, hints[name], f"{origin}: {name}") for name, value in tree.items()}


def _typed(value: Any, hint: Any, where: str) -> Any:
    if typing.get_origin(hint) is tuple:
        entries = typing.get_args(hint)
        if entries[-1] is Ellipsis:
            return value
        if not isinstance(value, list) or len(value) != len(entries) or not all(_is(v, int) for v in value):
            raise ValueError(f"{where} must be {len(entries)} whole numbers, got {value!r}")
        return tuple(value)
    if not _is(value, hint):
        raise ValueError(f"{where} must be a {hint.__name__}, got {value!r}")
    return value


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
