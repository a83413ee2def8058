"""Videos at the command line: folders of frames in, classes out."""

import pytest
from PIL import Image

from attn_notes.data.videos import sliding_clips


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two held-out clips as folders of frames, and one that is too short."""
    root = tmp_path_factory.mktemp("clips")
    for number in (306, 307):
        (root / f"{number}").mkdir()
        for i, frame in enumerate(sliding_clips("valid")[0][number, :, 0]):
            Image.fromarray(frame.numpy()).save(root / f"{number}" / f"{i}.png")
    (root / "short").mkdir()
    Image.new("L", (24, 24)).save(root / "short" / "0.png")
    return root


def test_clips_get_their_classes(clips, run, capsys):
    assert run("predict", "timesformer_book", clips / "306", clips / "307") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split()[0] for line in lines] == ["right", "left"]


def test_a_short_clip_costs_its_line(clips, run, capsys):
    assert run("predict", "timesformer_book", clips) == 1
    said = capsys.readouterr()
    assert said.out.count("%") >= 4
    assert said.err.strip().endswith("a clip of at least 8 frames; got 1")
