"""Video files as players show them: turned, by their time stamps, as far as they decode."""

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_rb.data.frames import FrameRule, clip_of, sample_video, shown_second_per_grid, shown_seconds
from megatron_rb.data.media import MediaInfo, inspect_media, load_frames, load_image
from megatron_rb.data.media_options import NO_OPTIONS, MediaOptions
from megatron_rb.data.problems import BadSample
from megatron_rb.data.rows import MediaRef
from megatron_rb.data.video_file import _Reader

av = pytest.importorskip("av")

VIDEOS = Path(__file__).parent / "videos"
QWEN3 = FrameRule(whole_patches=False, fps=2.0, min_frames=4, max_frames=64, temporal_patch_size=2)
QWEN2 = FrameRule(whole_patches=True, fps=2.0, min_frames=4, max_frames=64, temporal_patch_size=2)
FORTY = MediaInfo(64, 96, frames=40, fps=10.0)
PAUSE = MediaInfo(64, 96, frames=6, fps=10.0, stamps=(0.0, 0.1, 0.2, 5.0, 5.1, 5.2))


def video(name: str) -> MediaRef:
    return MediaRef("video", str(VIDEOS / name))


def times(info: MediaInfo, options: MediaOptions = NO_OPTIONS, rule: FrameRule = QWEN3) -> list[str]:
    return [f"{second:.1f}" for second in shown_seconds(info, sample_video(info, options, rule), 2)]


def test_a_video_of_a_turned_phone_stands_upright():
    """Its display matrix turns it by 90 degrees: ffmpeg shows 64 x 96 pixels, red above, blue below."""
    info = inspect_media(video("rotated.mp4"), 2.0)
    assert (info.width, info.height) == (64, 96)
    picture = np.asarray(load_frames(video("rotated.mp4"), info, [3])[0])
    assert picture[5, 32] == pytest.approx([255, 0, 0], abs=8)
    assert picture[-5, 32] == pytest.approx([0, 0, 255], abs=8)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("vfr.webm", "0.3 2.8 8.2"),
        ("vfr.mp4", "0.1 0.5 0.9 1.5 3.2 5.0 6.3 8.2 9.5"),
    ],
)
def test_times_of_a_varying_rate_are_the_time_stamps_of_the_decoder(name: str, wanted: str):
    info = inspect_media(video(name), 2.0)
    with av.open(str(VIDEOS / name)) as container:
        assert list(info.stamps) == [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
    assert " ".join(times(info)) == wanted


def test_a_clip_cut_without_encoding_counts_what_decodes():
    """Its header says 30 frames; six lie before the cut and are there for decoding alone."""
    with av.open(str(VIDEOS / "cut.mp4")) as container:
        assert container.streams.video[0].frames == 30
        decoded = [frame.to_image() for frame in container.decode(video=0)]
    info = inspect_media(video("cut.mp4"), 2.0)
    assert (info.frames, len(decoded)) == (24, 24)
    frames = load_frames(video("cut.mp4"), info, [0, 11, 23])
    assert all(np.array_equal(frame, decoded[number]) for frame, number in zip(frames, (0, 11, 23), strict=True))


def write_clip(path: Path, frames: int, group: int, moments: list[int] | None = None) -> MediaRef:
    """A clip whose frame n has the shade n; key frames every `group` frames; time stamps in tenths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", group
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8), format="rgb24")
            frame.pts = moments[number] if moments else number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return MediaRef("video", str(path))


class SpiedContainer:
    """A container that counts what it decodes and where it is sent, in tenths of a second."""

    def __init__(self, container) -> None:
        self.container, self.streams = container, container.streams
        self.decoded, self.aims = 0, []

    def decode(self, stream):
        for frame in self.container.decode(stream):
            self.decoded += 1
            yield frame

    def seek(self, aim: int, **options) -> None:
        self.aims.append(round(aim * self.streams.video[0].time_base * 10))
        self.container.seek(aim, **options)


@pytest.mark.parametrize("wanted", [[0, 100, 199], [5, 6, 7], [199], [0, 40, 80, 120, 160], [60, 60, 0]])
@pytest.mark.parametrize("group", [12, 200])
def test_any_frames_of_a_long_clip_are_those_of_plain_decoding(tmp_path, wanted: list[int], group: int):
    ref = write_clip(tmp_path / "clip.mp4", 200, group)
    info = inspect_media(ref, 2.0)
    with av.open(ref.source) as container:
        plain = [frame.to_image() for frame in container.decode(video=0)]
    got = load_frames(ref, info, wanted)
    assert all(np.array_equal(image, plain[number]) for image, number in zip(got, wanted, strict=True))


def test_only_gaps_with_a_key_frame_in_them_are_jumped_over(tmp_path):
    ref = write_clip(tmp_path / "clip.mp4", 200, 12)
    with av.open(ref.source) as container:
        keys = [number for number, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    wanted = [keys[-9], keys[-9] + 5, keys[-2] + 3]
    with av.open(ref.source) as container:
        spy = SpiedContainer(container)
        assert [number for number, _ in _Reader(spy, 10.0, (), jumps=True).frames(wanted)] == wanted
    assert spy.aims == [wanted[-1]]
    assert spy.decoded == wanted[1] + 1 + 4


@pytest.mark.parametrize("key", [20, 40])
def test_frames_just_before_a_key_frame_are_met_by_the_first_jump(key: int):
    """With frames that refer to later ones a key frame is decoded before it is shown."""
    with av.open(str(VIDEOS / "b_frames.mp4")) as container:
        assert [n for n, frame in enumerate(container.decode(video=0)) if frame.key_frame] == [0, 10, 20, 40]
        assert container.streams.video[0].codec_context.has_b_frames
    with av.open(str(VIDEOS / "b_frames.mp4")) as container:
        spy = SpiedContainer(container)
        reader = _Reader(spy, 10.0, (), jumps=True)
        assert [number for number, _ in reader.frames([0, key - 1, key, key + 1])] == [0, key - 1, key, key + 1]
        assert spy.aims


def test_a_varying_rate_is_jumped_over_by_time(tmp_path):
    moments = [number if number < 50 else number * 7 for number in range(100)]
    ref = write_clip(tmp_path / "clip.mp4", 100, 10, moments)
    info = inspect_media(ref, 2.0)
    assert info.stamps[60] == pytest.approx(42.0)
    shades = [np.asarray(image).mean() for image in load_frames(ref, info, [0, 20, 75, 99])]
    assert shades == pytest.approx([0, 20, 75, 99], abs=3)


def test_frames_past_the_end_are_missed_and_not_waited_for(tmp_path):
    ref = write_clip(tmp_path / "clip.mp4", 60, 12)
    with pytest.raises(BadSample, match="clip.mp4 ends before frame 90"):
        load_frames(ref, MediaInfo(48, 64, frames=100, fps=10.0), [3, 30, 90], read_seconds=20)


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(BadSample, match="sound.wav has no video in it"):
        inspect_media(MediaRef("video", str(tmp_path / "sound.wav")), 2.0)


def test_the_content_of_a_row_is_a_video_too():
    content = (VIDEOS / "vfr.webm").read_bytes()
    ref = MediaRef("video", "inline:1", inline=content)
    info = inspect_media(ref, 2.0)
    assert info == inspect_media(video("vfr.webm"), 2.0)
    there, here = (load_frames(which, info, [0, 30]) for which in (video("vfr.webm"), ref))
    assert all(np.array_equal(a, b) for a, b in zip(there, here, strict=True))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_file_that_does_not_answer_is_named(tmp_path, kind: str):
    os.mkfifo(tmp_path / "silent.mp4")
    with pytest.raises(BadSample, match=r"silent.mp4 did not answer 2 times within 0.1 s \(data.read_seconds\)"):
        inspect_media(MediaRef(kind, str(tmp_path / "silent.mp4")), 2.0, read_seconds=0.1)
    with pytest.raises(BadSample, match="silent.mp4 did not answer"):
        if kind == "image":
            load_image(MediaRef(kind, str(tmp_path / "silent.mp4")), MediaInfo(1, 1), read_seconds=0.1)
        else:
            load_frames(MediaRef(kind, str(tmp_path / "silent.mp4")), FORTY, [0], read_seconds=0.1)


def test_a_file_that_answers_the_second_time_is_read(tmp_path):
    path = tmp_path / "late.fifo"
    os.mkfifo(path)
    from megatron_rb.data.patience import answered

    asked = []

    def read() -> str:
        asked.append(1)
        return path.read_text() if len(asked) == 1 else "content"

    assert answered(read, "late.fifo", 0.1) == "content"
    with open(path, "w"):  # lets the first reader go
        pass


# 4 s of 10 frames a second; right values by the formulas of Qwen's tool and of transformers' processors.
@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (MediaOptions(start=2.0, end=3.0), [20, 23, 27, 30]),
        (MediaOptions(start=2.0), [20, 26, 33, 39]),
        (MediaOptions(end=1.0), [0, 3, 7, 10]),
        (MediaOptions(nframes=4), [0, 13, 26, 39]),
        (MediaOptions(nframes=5), [0, 13, 26, 39]),
        (MediaOptions(nframes=40), list(range(40))),
        (MediaOptions(start=1.0, end=2.0, nframes=6), [10, 12, 14, 16, 18, 20]),
        (MediaOptions(fps=1.0), [0, 13, 26, 39]),
        (MediaOptions(fps=2.5), [0, 4, 9, 13, 17, 22, 26, 30, 35, 39]),
        (MediaOptions(max_frames=4), [0, 13, 26, 39]),
        (MediaOptions(min_frames=10), [0, 4, 9, 13, 17, 22, 26, 30, 35, 39]),
    ],
)
def test_a_row_says_which_frames_are_shown(options: MediaOptions, numbers: list[int]):
    assert sample_video(FORTY, options, QWEN3) == numbers


def test_times_of_a_clip_are_those_of_the_whole_video():
    assert times(FORTY, MediaOptions(start=2.0, end=3.0)) == ["2.1", "2.9"]


def test_qwen2_5_reckons_with_the_clip():
    options = MediaOptions(start=2.0, end=3.9)
    numbers = sample_video(FORTY, options, QWEN2)
    assert numbers == [20, 25, 30, 35]
    assert shown_second_per_grid(FORTY, numbers, clip_of(FORTY, options), 2) == pytest.approx(1.0)


def test_a_clip_of_a_varying_rate_is_cut_by_time_stamps():
    clip = clip_of(PAUSE, MediaOptions(start=0.1, end=5.05))
    assert (clip.first, clip.last) == (1, 3)
    assert shown_second_per_grid(PAUSE, [0, 1, 2, 3, 4, 5], clip_of(PAUSE, NO_OPTIONS), 2) == pytest.approx(2 * 5.2 / 5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (MediaOptions(fps=1.0, nframes=4), "asks for fps 1 and nframes 4; give one"),
        (MediaOptions(nframes=42), "nframes 42 must be from 2 to the 40 frames"),
        (MediaOptions(start=3.0, end=2.0), "between video_start 3.0 and video_end 2.0 there is no clip"),
        (MediaOptions(start=9.0), "between video_start 9.0 and video_end None there is no clip"),
        (MediaOptions(min_frames=8, max_frames=4), "min_frames 8 is above max_frames 4"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(options: MediaOptions, words: str):
    with pytest.raises(BadSample, match=words):
        sample_video(FORTY, options, QWEN3)


@pytest.mark.parametrize("name", ["start", "end", "nframes", "min_frames", "max_frames"])
def test_wishes_for_a_file_are_refused_for_given_frames(name: str):
    with pytest.raises(BadSample, match="for a video file|cut a video file"):
        sample_video(MediaInfo(8, 8, 4, 2.0, given_frames=True), MediaOptions(**{name: 2}), QWEN3)


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        (MediaOptions(sample_fps=4.0), 4.0),
        (MediaOptions(sample_fps=4.0, raw_fps=30.0, fps=9.0), 4.0),
        (MediaOptions(fps=3.0), 3.0),
        (MediaOptions(raw_fps=30.0), 30.0),
        (NO_OPTIONS, 2.0),
    ],
)
def test_rate_of_given_frames_is_what_the_row_says(draw_image, options: MediaOptions, rate: float):
    frames = tuple(draw_image(f"{number}.png", 8, 8) for number in range(4))
    assert inspect_media(MediaRef("video", frames, options=options), 2.0).fps == rate
