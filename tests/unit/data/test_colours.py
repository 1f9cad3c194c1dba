"""Pictures of more than 8 bits look like their 8-bit versions."""

import numpy as np
import pytest
from PIL import Image

from megatron_rb.data.media import inspect_media, load_image
from megatron_rb.data.problems import BadSample
from megatron_rb.data.rows import MediaRef

RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))


def shown(path) -> np.ndarray:
    ref = MediaRef("image", str(path))
    return np.asarray(load_image(ref, inspect_media(ref, 1.0)))[..., 0]


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm", "deep.jp2"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, name: str):
    path = tmp_path / name
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    if name.endswith("pgm"):
        path.write_bytes(b"P5 256 4 65535\n" + (RAMP.astype(">u2") * 257).tobytes())
    else:
        deep.save(path, **({"irreversible": False} if name.endswith("jp2") else {}))
    assert np.array_equal(shown(path), RAMP)


def test_fractions_are_scaled_to_eight_bits(tmp_path):
    Image.fromarray(RAMP.astype(np.float32) / 255).save(tmp_path / "fractions.tif")
    assert np.array_equal(shown(tmp_path / "fractions.tif"), RAMP)


def test_eight_bits_stay_as_they_are(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "plain.png")
    assert np.array_equal(shown(tmp_path / "plain.png"), RAMP)


def test_a_turned_deep_picture_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(shown(tmp_path / "turned.png"), np.rot90(RAMP, -1))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((4, 4), 70000, np.int32), "integers of 32 bits"),
        (np.full((4, 4), 300.0, np.float32), "fractions from 300 to 300"),
        (np.full((4, 4), -1.0, np.float32), "fractions from -1 to -1"),
        (np.full((4, 4), np.nan, np.float32), "fractions from nan to nan"),
    ],
)
def test_numbers_without_a_white_are_refused(tmp_path, values: np.ndarray, words: str):
    Image.fromarray(values).save(tmp_path / "strange.tif")
    with pytest.raises(BadSample, match=f"strange.tif holds {words}"):
        shown(tmp_path / "strange.tif")
