"""Pictures of more than 8 bits per channel, which Pillow would clip to white instead of scaling."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIXTEEN_BITS = 65535
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
SIXTEEN_BIT_FORMATS = ("PNG", "PPM", "JPEG2000")
"""Formats that have 16 bits where Pillow opens them as integers of 32."""
BITS_PER_SAMPLE = 258
"""TIFF tag."""


ORIENTATION = 0x0112
"""EXIF tag; values from 5 on turn the image by 90 degrees."""


class DeepColours(ValueError):
    """Numbers without a stated white, which cannot be scaled to 8 bits."""


def eight_bit(image: Image.Image) -> Image.Image:
    """The image itself, or, where its grey values have 16 bits or are fractions, these scaled to 8 bits.

    transformers and Qwen's tools convert such pictures by clipping, which shows a 16-bit ramp as white and fractions as
    black; models have been trained on 8-bit pictures alone.

    Raises:
        DeepColours: 32-bit integers, fractions outside of 0 to 1, or numbers that are not finite.
    """
    if image.mode in SIXTEEN_BIT_MODES or image.mode == "I" and _has_sixteen_bits(image):
        return _scaled(image, np.asarray(image, dtype=np.float64) / SIXTEEN_BITS)
    if image.mode == "I":
        raise DeepColours("holds integers of 32 bits, of which nobody knows the white; store 8 or 16 bits")
    if image.mode == "F":
        return _scaled(image, _fractions(np.asarray(image, dtype=np.float64)))
    return image


def _has_sixteen_bits(image: Image.Image) -> bool:
    if image.format in SIXTEEN_BIT_FORMATS:
        return True
    tags = getattr(image, "tag_v2", {})
    return tuple(tags.get(BITS_PER_SAMPLE, ())) == (16,)


def _fractions(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # NaN too
        raise DeepColours(f"holds fractions from {low:g} to {high:g}; grey values must lie between 0 and 1")
    return values


def _scaled(image: Image.Image, shares: np.ndarray) -> Image.Image:
    """A grey image of shares of white, which keeps what else the file says of itself."""
    result = Image.fromarray((shares * 255).round().astype(np.uint8), mode="L")
    if ORIENTATION in image.getexif():
        result.getexif()[ORIENTATION] = image.getexif()[ORIENTATION]
    return result
