import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_rb.value.answers import parse_score
from megatron_rb.value.episodes import BadEpisode, KeyFramedEpisode, VideoFrames, read_key_framed
from megatron_rb.value.hops import hop_label
from megatron_rb.value.label import BLANK, LabelRules, ReferencePool, hop_rows, label_episode
from megatron_rb.value.prompts import SLOTS
from megatron_rb.value.sampling import PairRules

ROBOSIM = Path(__file__).parents[3] / "examples/robosim/heldout"
RULES = LabelRules(chunk=1, pairs=PairRules(20), permuted_share=0.0)
EPISODE = KeyFramedEpisode(
    "pour_1",
    "pour",
    ("pour the tea", "fill the cup"),
    (0, 40, 100),
    {name: [f"{name}/{i}.jpg" for i in range(101)] for name in ("cam_high", "cam_left_wrist", "cam_right_wrist")},
)


def rows_of(episode=EPISODE, rules=RULES, seed=0):
    return list(hop_rows(label_episode(episode, rules, seed), rules, seed))


def test_rows_show_eight_pictures_in_the_order_of_their_labels():
    for row in rows_of():
        before, after = row["frames"]
        cameras = ("cam_high", "cam_left_wrist", "cam_right_wrist")
        moments = [f"{camera}/{frame}.jpg" for frame in (before, after) for camera in cameras]
        assert row["image"] == ["cam_high/0.jpg", "cam_high/100.jpg", *moments]
        text = row["conversations"][0]["value"]
        assert text.count("<image>") == 8
        places = [text.index(f"{slot}: <image>") for slot in SLOTS]
        assert places == sorted(places)
        assert row["conversations"][1]["value"] == row["answer"]
        assert parse_score(row["answer"]).hop == pytest.approx(row["hop"], abs=0.00501)
        assert any(instruction in text for instruction in EPISODE.instructions)


def test_labels_follow_from_the_frames():
    rules = replace(RULES, pairs=PairRules(60, zero_share=0.0))
    for row in rows_of(rules=rules):
        # two sub-tasks of equal share: half of the progress over frames 0-40, half over 40-100
        phi = [frame / 80 if frame <= 40 else 0.5 + (frame - 40) / 120 for frame in row["frames"]]
        assert row["progress"] == pytest.approx(phi, abs=0.02)
        assert row["hop"] == pytest.approx(hop_label(*row["progress"]), abs=1e-4)


def test_defaults_are_those_of_the_papers():
    rules = LabelRules()
    assert (rules.chunk_rule, rules.quantisation, rules.pairs.zero_rule) == ("paper", "percent", "paper")
    assert (rules.chunk, rules.pairs.pairs_per_episode, rules.pairs.zero_share) == (20, 1000, 0.05)
    assert 27.2 * (1 + rules.permuted_share) == pytest.approx(35, abs=0.01)  # millions of samples before and after


def test_permuted_rows_keep_camera_and_name_together():
    rows = rows_of(rules=replace(RULES, permuted_share=1.0))
    assert len(rows) == 2 * 20
    words = {"front": "cam_high", "left wrist": "cam_left_wrist", "right wrist": "cam_right_wrist"}
    for plain, permuted in zip(rows[::2], rows[1::2], strict=True):
        assert permuted["id"] == plain["id"] + "_permuted" and permuted["answer"] == plain["answer"]
        assert permuted["image"] != plain["image"] and sorted(permuted["image"]) == sorted(plain["image"])
        text = permuted["conversations"][0]["value"]
        shown = [line.split(": <image>")[0] for line in text.splitlines() if line.endswith(": <image>")]
        for name, path in zip(shown[2:], permuted["image"][2:], strict=True):
            assert path.startswith(words[name.partition(" ")[2]])


def test_dropout_blanks_wrists_together_and_references_alone():
    rows = rows_of(rules=replace(RULES, pairs=PairRules(400), view_dropout=0.5, context_dropout=0.25))
    blank = np.array([[path == BLANK for path in row["image"]] for row in rows])
    assert not blank[:, 2].any() and not blank[:, 5].any()
    assert (blank[:, 3] == blank[:, 6]).all() and (blank[:, 4] == blank[:, 7]).all()
    assert 0.4 < blank[:, 3].mean() < 0.6 and 0.15 < blank[:, :2].mean() < 0.35


def test_references_are_swapped_within_a_task_and_nothing_else_changes():
    pool = ReferencePool()
    for number in range(3):
        pool.add(
            replace(EPISODE, name=f"pour_{number}", images={"cam_high": [f"{number}/{i}.jpg" for i in range(101)]})
        )
    pool.add(replace(EPISODE, name="cut", instructions=("cut the bread",)))
    others = pool.of_task(EPISODE)
    assert others == [(f"{number}/0.jpg", f"{number}/100.jpg") for number in range(3)]
    rules = replace(RULES, pairs=PairRules(400), view_dropout=0.2, context_dropout=0.1, reference_swap=0.75)
    plain = rows_of(rules=replace(rules, reference_swap=0.0))
    swapped = list(hop_rows(label_episode(EPISODE, rules, 0), rules, 0, others))
    for before, after in zip(plain, swapped, strict=True):
        assert {**before, "image": before["image"][2:]} == {**after, "image": after["image"][2:]}
    shown = Counter(tuple(row["image"][:2]) for row in swapped if BLANK not in row["image"][:2])
    kept = shown.pop(("cam_high/0.jpg", "cam_high/100.jpg"))
    assert set(shown) == set(others) and 0.68 < shown.total() / (shown.total() + kept) < 0.82
    assert list(hop_rows(label_episode(EPISODE, rules, 0), rules, 0, others)) == swapped
    blank = [[path == BLANK for path in row["image"]] for row in plain]
    assert blank == [[path == BLANK for path in row["image"]] for row in swapped]


def test_the_pool_forgets():
    pool = ReferencePool(capacity=2)
    for number in range(5):
        pool.add(replace(EPISODE, images={"cam_high": [f"{number}/{i}.jpg" for i in range(101)]}))
    assert [start for start, _ in pool.of_task(EPISODE)] == ["3/0.jpg", "4/0.jpg"]


def test_episodes_with_one_view_repeat_it():
    alone = replace(EPISODE, images={"cam_high": EPISODE.images["cam_high"]})
    assert all(path.startswith("cam_high/") for row in rows_of(alone) for path in row["image"])


def test_order_of_episodes_and_parts_does_not_matter():
    episodes = [episode for episode, _ in read_key_framed(ROBOSIM / "lift.jsonl")]
    forwards = {row["id"]: row for episode in episodes for row in rows_of(episode)}
    backwards = {row["id"]: row for episode in episodes[::-1] for row in rows_of(episode)}
    assert forwards == backwards and len(forwards) > 100
    assert forwards.keys() != {row["id"] for episode in episodes for row in rows_of(episode, seed=1)}


def test_simulated_episodes_have_phase_changes_as_key_frames():
    episodes = [episode for episode, _ in read_key_framed(ROBOSIM / "stack.jsonl")]
    assert len(episodes) == 5 and all(isinstance(episode, KeyFramedEpisode) for episode in episodes)
    assert all(episode.key_frames[0] == 0 and len(episode.key_frames) >= 5 for episode in episodes)
    row = next(hop_rows(label_episode(episodes[0], RULES, 0), RULES, 0))
    assert all((ROBOSIM / path).is_file() for path in row["image"])


def test_bad_episodes_say_why_and_the_rest_goes_on(tmp_path):
    frame = {"task": "lift", "instruction": "lift it", "views": {"side": {"image": "a.jpg"}}}
    lines = [
        *(json.dumps(frame | {"episode": 0, "frame": i, "phase": "a"}) for i in (0, 1, 1)),
        "not json",
        *(json.dumps(frame | {"episode": 1, "frame": i, "phase": "a"}) for i in (1, 0)),
        json.dumps(frame | {"episode": 2, "frame": 0, "phase": "a"}),
        *(json.dumps(frame | {"episode": 3, "frame": i, "phase": "ab"[i]}) for i in (0, 1)),
    ]
    (tmp_path / "e.jsonl").write_text("\n".join(lines) + "\n")
    found = [episode for episode, _ in read_key_framed(tmp_path / "e.jsonl")]
    problems = Counter(episode.problem for episode in found if isinstance(episode, BadEpisode))
    assert problems == {
        "duplicate frames": 1,
        "not an episode frame": 1,
        "unordered frames": 1,
        "fewer than two key frames": 1,
    }
    assert [episode.name for episode in found if isinstance(episode, KeyFramedEpisode)] == ["lift_003"]
    assert found[0].place.endswith("e.jsonl:1")


NAMES = st.sampled_from(["side", "image", "a"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-3, 3) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
FRAME = {"episode": "²", "frame": 0, "phase": "a", "views": {"side": {"image": None}}}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"episode": ANYTHING, "frame": st.integers(0, 2) | ANYTHING, "phase": ANYTHING, "views": ANYTHING},
            optional={"task": ANYTHING, "instruction": ANYTHING},
        )
        | ANYTHING,
        max_size=6,
    )
)
@example([FRAME, FRAME | {"frame": 1, "phase": "b"}])
@example([FRAME | {"episode": 1}, FRAME | {"episode": 1, "frame": 1, "phase": ["b"]}])
def test_any_lines_are_episodes_or_have_a_reason(rows):
    with TemporaryDirectory() as folder:
        file = Path(folder) / "e.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for episode, _ in read_key_framed(file):
            if isinstance(episode, KeyFramedEpisode):
                episode = label_episode(episode, RULES, 0)
            if isinstance(episode, BadEpisode):
                assert episode.problem and episode.reason and episode.place
            else:
                assert list(hop_rows(episode, RULES, 0))


def raw_episode(folder: Path, keys=((0, 30), (30, 70), (70, 99))) -> Path:
    folder.mkdir(parents=True)
    subtasks = [{"anotation": "x", "start_frame_id": a, "end_frame_id": b} for a, b in keys]
    (folder / "annotated_keyframes.json").write_text(json.dumps(subtasks))
    (folder / "task_instruction.json").write_text(json.dumps({"instructions": ["open it", "pull it"]}))
    for camera in ("cam_high", "cam_left_wrist", "cam_right_wrist"):
        (folder / f"{camera}.mp4").write_bytes(b"")
    return folder


def test_raw_folders_name_the_frames_of_their_videos(tmp_path):
    raw_episode(tmp_path / "ep_1")
    ((episode, _),) = read_key_framed(tmp_path)
    assert episode.key_frames == (0, 30, 70, 99) and episode.instructions == ("open it", "pull it")
    assert isinstance(episode.images["cam_high"], VideoFrames)
    rules = replace(RULES, chunk=10)
    row = rows_of(episode, rules)[0]
    before, after = row["frames"]
    assert row["image"][3] == f"frames/ep_1/cam_left_wrist_{before:06d}.jpg"
    assert row["image"][5] == f"frames/ep_1/cam_high_{after:06d}.jpg"
    (tmp_path / "list.jsonl").write_text('{"episode_dir": "ep_1"}\n')
    assert [e.name for e, _ in read_key_framed(tmp_path / "list.jsonl")] == ["ep_1"]


def test_the_instructions_of_a_task_may_lie_above_its_episodes(tmp_path):
    for name in ("episode_001", "episode_002"):
        (raw_episode(tmp_path / "raw" / name) / "task_instruction.json").unlink()
    (tmp_path / "raw" / "task_instruction.json").write_text('["stack the cups", "pile up the cups"]')
    found = [episode for episode, _ in read_key_framed(tmp_path / "raw")]
    assert [episode.instructions for episode in found] == [("stack the cups", "pile up the cups")] * 2


def test_frames_that_lie_there_as_pictures_are_in_the_order_of_their_numbers(tmp_path):
    folder = raw_episode(tmp_path / "ep_1", ((0, 5), (5, 11)))
    for camera in ("cam_high", "cam_left_wrist", "cam_right_wrist"):
        (folder / f"{camera}.mp4").unlink()
    (folder / "cam_high").mkdir()
    for number in range(12):
        (folder / "cam_high" / f"frame{number}.png").touch()
    ((episode, _),) = read_key_framed(tmp_path)
    assert [Path(path).stem for path in episode.images["cam_high"]] == [f"frame{n}" for n in range(12)]


@pytest.mark.parametrize(
    "keys", [((30, 40), (0, 20)), ((5, 5),), (), ((0, 10**30),), ((-3, 9),), ((0, "x"),), ((None, 2),)]
)
def test_raw_folders_with_key_frames_that_do_not_rise_are_refused(tmp_path, keys):
    raw_episode(tmp_path / "ep", keys)
    ((episode, _),) = read_key_framed(tmp_path)
    assert isinstance(episode, BadEpisode) and episode.problem == "unusable annotation"


def test_episode_without_a_complete_view_gives_no_samples():
    paths = list(EPISODE.images["cam_high"])
    paths[50] = ""
    labelled = label_episode(replace(EPISODE, images={"cam_high": paths}), RULES, 0)
    assert isinstance(labelled, BadEpisode) and labelled.problem == "no complete view"


def test_missing_data_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        next(read_key_framed(tmp_path / "x.jsonl"))
    with pytest.raises(ValueError, match="holds no annotated_keyframes.json"):
        next(read_key_framed(tmp_path))


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5_000])
def test_a_line_that_json_does_not_take_is_a_refused_episode(tmp_path, line):
    (tmp_path / "e.jsonl").write_text(line + "\n")
    ((episode, _),) = read_key_framed(tmp_path / "e.jsonl")
    assert isinstance(episode, BadEpisode) and episode.problem == "not an episode frame"


def test_an_episode_number_of_thousands_of_digits_is_a_name(tmp_path):
    frame = {"task": "lift", "episode": "9" * 5_000, "phase": 0, "views": {}}
    lines = [json.dumps(frame | {"frame": number}) + "\n" for number in range(2)]
    (tmp_path / "e.jsonl").write_text("".join(lines))
    ((episode, _),) = read_key_framed(tmp_path / "e.jsonl")
    assert isinstance(episode, KeyFramedEpisode)
