"""The page of a rehearsal in a real browser: bars in proportion, the device's memory marked, nothing cut off."""

import html
import json
import re
import shutil
import subprocess

import pytest

from megatron_rb.rehearsal.match import Defect
from megatron_rb.rehearsal.page import write_page
from megatron_rb.rehearsal.records import KINDS
from megatron_rb.rehearsal.summary import RehearsalSummary, StageSummary

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
GIB = 2**30
MEASURE = """<script>window.onload = () => {
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.right, r.width, r.height]; };
const parts = b => [...b.querySelectorAll("span")].map(box);
const bars = [...document.querySelectorAll(".bar")].map(b => ({bar: box(b), parts: parts(b),
  limit: box(b.querySelector('.limit'))}));
document.body.setAttribute('data-found', JSON.stringify({bars: bars, wide: document.documentElement.scrollWidth,
  window: window.innerWidth, text: document.body.innerText}));
}</script>"""


def stage(pp_rank: int, peaks: list[float], memory: float) -> StageSummary:
    """A stage that holds so many GiB of every kind."""
    line = "models/vision/blocks.py:95 forward < models/stage.py:203 _maybe_recompute_with_a_name_that_is_long"
    values = {name: 0 for name in StageSummary.__dataclass_fields__}
    values |= {
        "pp_rank": pp_rank,
        "blocks": "P v*32 M E t*10",
        "peak_bytes": int(sum(peaks) * GIB),
        "peak_phase": "step 1",
        "kinds": {kind: int(size * GIB) for kind, size in zip(KINDS, peaks, strict=True)},
        "lines": [("activations", line, GIB)],
        "memory_bytes": int(memory * GIB),
        "waits": [("value read", line, 1)],
        "bytes_by_link": {"inside a node": GIB},
        "moved": None,
    }
    return StageSummary(**{name: values[name] for name in StageSummary.__dataclass_fields__})


@pytest.fixture(scope="module")
def summary() -> RehearsalSummary:
    """Two stages, of which the second does not fit, and a defect with signs that HTML gives a meaning."""
    known = {
        "name": "a <b>run</b>",
        "world_size": 4,
        "degrees": {"tp": 2, "pp": 2},
        "layout": "P v*32 M E t*10 | t*18 L",
        "device": "NVIDIA H100 SXM",
        "samples": "the mix images_16k",
        "micro_batches": 2,
        "largest_batch": (16384, 65536),
        "ranks": [0, 2],
        "stages": [stage(0, [4, 8, 12, 20, 2], 72), stage(1, [4, 8, 12, 60, 6], 72)],
        "defects": [Defect("deadlock", "rank 0 < rank 1")],
        "launches": 3,
        "seconds": 1.0,
    }
    missing = {
        name: None if name == "checkpoint" else ""
        for name in RehearsalSummary.__dataclass_fields__
        if name not in known
    }
    return RehearsalSummary(**known, **missing)


@pytest.fixture(scope="module", params=[1280, 420], ids=["desktop", "telephone"])
def seen(request, summary, tmp_path_factory):
    """What a browser of this width makes of the page."""
    browser = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    file = tmp_path_factory.mktemp("page") / "page.html"
    write_page(summary, file)
    file.write_text(file.read_text().replace("</body>", MEASURE + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={request.param},900", "--dump-dom"]
    done = subprocess.run([browser, *options, file.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr
    return json.loads(html.unescape(found.group(1)))


@pytest.mark.timeout(180)
def test_bars_are_in_proportion_to_the_memory(seen):
    first, second = (sum(width for _, _, width, _ in bar["parts"]) for bar in seen["bars"])
    assert second / first == pytest.approx(90 / 46, rel=0.02)
    widths = [width for _, _, width, _ in seen["bars"][0]["parts"]]
    assert widths[3] / widths[0] == pytest.approx(5, rel=0.03)
    assert all(height > 10 for bar in seen["bars"] for _, _, _, height in bar["parts"])


def test_the_memory_of_the_device_is_marked_where_it_ends(seen):
    for bar, peak in zip(seen["bars"], (46, 90), strict=True):
        left, end = bar["bar"][0], bar["parts"][-1][1]
        assert (bar["limit"][0] - left) / (end - left) == pytest.approx(72 / peak, rel=0.03)
        assert bar["limit"][0] < bar["bar"][1]


def test_nothing_is_wider_than_the_window(seen):
    assert seen["wide"] <= seen["window"]


def test_words_are_shown_as_they_are_and_what_is_wrong_is_said(seen):
    assert "Rehearsal of a <b>run</b> on 4 processes" in seen["text"]
    assert "pipeline rank 1 does not fit" in seen["text"] and "deadlock: rank 0 < rank 1" in seen["text"]
