"""Clips: what slides over a photograph and its reversal, and frames of files."""

import sys
import types

import pytest
import torch
from PIL import Image

import attn_notes as an
from attn_notes.data.image_sets import PHOTOGRAPHS
from attn_notes.data.videos import (
    FRAMES,
    HELD_OUT,
    SIDE,
    SPEEDS,
    clips_in,
    read_frames,
    sliding_clips,
    spread,
)


def write_clip(folder, count, size=(20, 16), start=0):
    """A folder of frames, each of one grey that says its number."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", size, (start + 5 * i,) * 3).save(folder / f"{i:03}.png")
    return folder


@pytest.mark.parametrize("split, count", [("train", 5600), ("valid", 600)])
def test_a_clip_and_its_reversal(split, count):
    clips, labels = sliding_clips(split)
    assert clips.shape == (count, FRAMES, 1, SIDE, SIDE) and clips.dtype == torch.uint8
    assert torch.equal(clips[::2], clips[1::2].flip(1))
    assert labels[::2].eq(1).all() and labels[1::2].eq(0).all()


def test_the_window_moves_to_the_right():
    """Each frame is the one before, moved to the left by the speed of the clip."""
    clips, _ = sliding_clips("valid")
    for clip in clips[::60, :, 0]:
        moved = [torch.equal(clip[:-1, :, s:], clip[1:, :, :-s]) for s in SPEEDS]
        assert moved.count(True) == 1


def test_photographs_are_disjoint_and_clips_the_same_again():
    assert len(HELD_OUT) == 3 and set(HELD_OUT) < set(PHOTOGRAPHS)
    first = sliding_clips("valid")[0]
    sliding_clips.cache_clear()
    assert torch.equal(sliding_clips("valid")[0], first)


@pytest.mark.parametrize("count, frames", [(8, 8), (9, 8), (100, 8), (7, 3)])
def test_frames_are_spread_over_the_whole(count, frames):
    found = spread(count, frames)
    assert found == sorted(set(found)) and len(found) == frames
    assert 0 <= found[0] < count / frames and count - count / frames <= found[-1]
    for i, one in enumerate(spread(count, frames, varied=True)):
        assert int(i * count / frames) <= one <= (i + 1) * count / frames


def test_a_folder_of_frames(tmp_path):
    frames = read_frames(write_clip(tmp_path / "clip", 12), 4)
    assert [frame.getpixel((0, 0))[0] // 5 for frame in frames] == [1, 4, 7, 10]


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "make, said",
    [
        (lambda p: write_clip(p / "a", 3), "at least 4 frames; got 3"),
        (lambda p: p / "none", "a folder of frames, or a video; got no file"),
        (lambda p: write_clip(p / "a", 1) / "000.png", "a video; got another file"),
        (lambda p: "a\0b", "expected a file or folder"),
    ],
)
def test_what_is_no_clip(make, said, tmp_path):
    with pytest.raises(an.InputError, match=said) as caught:
        read_frames(make(tmp_path), 4)
    assert "\n" not in str(caught.value)


def test_frames_of_several_sizes(tmp_path):
    folder = write_clip(tmp_path / "clip", 3)
    Image.new("RGB", (8, 8)).save(folder / "003.png")
    with pytest.raises(an.InputError, match="frames of one size; got several"):
        read_frames(folder, 4)


def test_the_clips_of_a_folder(tmp_path):
    write_clip(tmp_path / "b", 1)
    (tmp_path / "a.MP4").touch(), (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    assert [path.name for path in clips_in(tmp_path)] == ["a.MP4", "b"]


class Container(list):
    """A video as PyAV opens it: numbers as frames, the count of them in its header."""

    def __init__(self, frames, header):
        super().__init__(frames)
        stream = types.SimpleNamespace(frames=header)
        self.streams = types.SimpleNamespace(video=[stream])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def decode(self, video):
        return (types.SimpleNamespace(to_image=lambda i=i: i) for i in self)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "header, frames, found",
    [
        (12, 12, [1, 4, 7, 10]),
        (0, 12, [1, 4, 7, 10]),  # a header that does not say
        (3, 3, "at least 4 frames; got 3"),
        (12, 6, "could not read it: it ends before 12 frames"),
        (None, 0, "expected a video; could not read it"),
    ],
)
def test_a_video_file(header, frames, found, tmp_path, monkeypatch):
    def open_video(path):
        if header is None:
            raise OSError("no\nvideo")
        return Container(range(frames), header)

    path = tmp_path / "clip.mp4"
    path.touch()
    monkeypatch.setitem(sys.modules, "av", types.SimpleNamespace(open=open_video))
    monkeypatch.setattr("attn_notes.data.videos.require_package", lambda *_: None)
    if isinstance(found, list):
        assert read_frames(path, 4) == found
        return
    with pytest.raises(an.InputError, match=found) as caught:
        read_frames(path, 4)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_real_video_file(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(20):
            image = Image.new("RGB", (64, 48), (12 * i,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    frames = read_frames(tmp_path / "clip.mp4", 5)
    found = [round(frame.getpixel((9, 9))[0] / 12) for frame in frames]
    assert found == [2, 6, 10, 14, 18] and frames[0].size == (64, 48)
