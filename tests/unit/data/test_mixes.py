"""Mixes from files, samples drawn from them, and how they are packed."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from megatron_rb.bench.train.packing_simulation import first_fit, next_fit, simulate
from megatron_rb.data.mixes import MIXES, load_mix, mix_from_tree
from megatron_rb.data.mock_samples import MockSamples, words
from megatron_rb.data.packing import Budget
from megatron_rb.metrics.balance import balance_of
from megatron_rb.models.inputs import build_micro_batch
from megatron_rb.shapes.published import published_shape
from tests.unit.bench.train.samples import MIX

SHAPES = {name: published_shape(name) for name in ("RoboBrain2.0-3B", "RoboBrain2.5-8B")}


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def test_a_mix_survives_json(tmp_path):
    for name, mix in MIXES.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(asdict(mix)))
        assert load_mix(str(path)) == mix
        path.write_text(json.dumps({"mix": asdict(mix), "summary": {}}))
        assert load_mix(str(path)) == mix


def test_name_of_a_mix_stays_as_written(tmp_path):
    written = json.dumps(asdict(MIX)).replace(f'"name": "{MIX.name}"', '"name": 1.10')
    (tmp_path / "mine.yaml").write_text(written)
    assert load_mix(str(tmp_path / "mine.yaml")).name == "1.10"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, "name must be a str, got 3"),
        ({"colour": "red"}, "there is no 'colour' in a mix"),
        ({"kinds": []}, "at least one kind"),
        ({"kinds": [{"share": 0.5, "text_tokens": [1, 2, 3]}]}, "add up to 0.5, not to 1"),
        ({"kinds": [{"share": 1.0, "text_tokens": [3, 2, 1]}]}, r"text_tokens \[3, 2, 1\]; write values from least"),
        ({"kinds": [{"share": 1.0, "text_tokens": [1, 2, 3], "images": [1]}]}, "images must be 2 whole numbers"),
        ({"answer_share": 1.5}, "answer_share 1.5"),
    ],
)
def test_a_wrong_mix_is_one_sentence(changes, message):
    tree = json.loads(json.dumps(asdict(MIX)))
    with pytest.raises(ValueError, match=message):
        mix_from_tree(tree | changes, "mine.yaml")


def test_an_unknown_mix_names_the_nearest():
    with pytest.raises(ValueError, match="there is no mix 'images_8'; did you mean images_8k"):
        load_mix("images_8")


def test_samples_are_as_long_as_their_sizes_say_and_build(shape):
    samples = MockSamples(replace(MIXES["tiny"], samples=40), shape)
    drawn = [samples.get(number, with_pixels=True) for number in range(len(samples))]
    found = [(len(sample.input_ids), sample.num_patches) for sample in drawn]
    assert found == [tuple(row) for row in samples.sizes.tolist()]
    kinds = {grid.kind for sample in drawn for grid in sample.grids}
    assert kinds == {"image", "video"}
    batch = build_micro_batch(drawn, shape, tp_rank=0, tp_size=1, sequence_parallel=False)
    assert batch.text.num_real_tokens == samples.sizes[:, 0].sum()
    assert batch.num_labels > 0


def test_sample_n_is_the_same_everywhere(shape):
    one, two = (MockSamples(replace(MIXES["tiny"], samples=40), shape) for _ in range(2))
    for number in (0, 17):
        a, b = one.get(number, with_pixels=True), two.get(number, with_pixels=True)
        assert (a.input_ids == b.input_ids).all() and (a.labels == b.labels).all()
        assert all((x == y).all() for x, y in zip(a.pixels, b.pixels, strict=True))


def test_plain_words_are_never_special(shape):
    drawn = words(shape, np.random.default_rng(0), 400_000)
    special = {shape.image_token_id, shape.video_token_id, shape.vision_start_token_id, shape.vision_end_token_id}
    assert not np.isin(drawn, list(special)).any()
    assert 0 <= drawn.min() and shape.text.vocab_size - 20 < drawn.max() < shape.text.vocab_size


def test_samples_over_the_budget_are_counted(shape):
    with pytest.raises(ValueError, match=r"of the 60 samples of mix 'test' are over 16 tokens or .* raise seq_length"):
        MockSamples(replace(MIX, seq_length=16), shape)


def test_balance_by_hand():
    step = np.array([[[8, 2], [6, 4]], [[10, 6], [8, 0]]])  # two ranks of two micro-batches
    found = balance_of([step], seq_length=10)
    assert found.fill == found.least_fill == pytest.approx(0.8)
    assert found.micro_batch_tokens == pytest.approx(10 / 8) and found.micro_batch_patches == pytest.approx(6 / 3)
    assert found.rank_tokens == pytest.approx(18 / 16) and found.rank_patches == pytest.approx(1.0)


def test_balance_of_text_alone_is_even_in_patches():
    assert balance_of([np.array([[[4, 0]], [[2, 0]]])], 4).micro_batch_patches == 1.0


def test_next_fit_and_first_fit_by_hand():
    sizes = np.array([[6, 0], [5, 0], [4, 0], [4, 0], [5, 0], [9, 0]])
    budget = Budget(10, 10)
    taken, loads = next_fit(sizes, budget, 2)  # 6 | 5 4 | 4 would open a third
    assert (taken, loads[:, 0].tolist()) == (3, [6, 9])
    taken, loads = first_fit(sizes, budget, 2)  # 6 4 | 5 4 | the next 5 finds no room
    assert (taken, loads[:, 0].tolist()) == (4, [10, 9])


@pytest.mark.parametrize("mix", ["images_16k", "video_16k"])
def test_shipped_mixes_reach_the_aim_at_64_ranks(mix):
    one_each = replace(MIXES[mix], micro_batches=1)
    rows = {row.name: row.balance for row in simulate(one_each, SHAPES["RoboBrain2.0-3B"], ranks=64, steps=2)}
    ours = rows["filled micro-batches"]
    assert ours.fill >= 0.98 and ours.worst_micro_batch_patches <= 1.08
    assert ours.fill > rows["next-fit"].fill
    assert ours.micro_batch_patches < rows["first-fit"].micro_batch_patches
