"""Classes of videos: pairs in a batch, folders as Kinetics has them, predictions, and
what is written beside the weights."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import attn_notes as an
from attn_notes.commands.predict import find_task
from attn_notes.data.images import Preprocessing
from attn_notes.data.tasks import create_task, kind_of_data, load_task
from attn_notes.data.video_classification import VideoClassification
from attn_notes.training.loop import train
from attn_notes.training.recipes import Augmentation, Recipe
from attn_notes.vision.timesformer import BOOK, TimeSformer, TimeSformerConfig

KIND = "video_classification"
SMALL = BOOK | {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2}


def write_clip(folder, count=5, size=(20, 16), start=0):
    folder.mkdir(parents=True)
    for i in range(count):
        image = np.full((size[1], size[0], 3), start + 5 * i, np.uint8)
        image[:, : 1 + i] = 255
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As Kinetics has them: train and val, a folder a class, in that one a clip."""
    root = tmp_path_factory.mktemp("kinetics")
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("jumping", "eating cake")):
            for i in range(count):
                write_clip(root / split / name / f"{i}", start=60 * label + i)
    return root


def model(task=None, **change):
    torch.manual_seed(0)
    config = TimeSformerConfig(**(SMALL | change))
    own = task.overrides(config) if task else {}
    return TimeSformer(replace(config, **own)).eval()


def test_a_clip_and_its_reversal_are_in_one_batch():
    task = create_task(KIND, "sliding", seed=3, limit=41)
    task.setup(Recipe(batch_size=8, seed=3))
    batches = task.batches(0)
    assert [len(batch) for batch in batches] == [8] * 5
    together = np.concatenate(batches)
    assert sorted(together) == list(range(40))
    assert all(b[::2].tolist() == (b[1::2] - 1).tolist() for b in batches)
    assert all((b[::2] % 2 == 0).all() for b in batches)
    assert together.tolist() != np.concatenate(task.batches(1)).tolist()
    batch = task.collate([task.dataset("train")[i] for i in batches[0].tolist()])
    assert batch["videos"].shape == (8, 8, 1, 24, 24)
    assert torch.equal(batch["videos"][0], batch["videos"][1].flip(0))
    assert batch["labels"].tolist() == [1, 0] * 4


def test_blind_to_the_order_it_is_right_in_exactly_half():
    task = create_task(KIND, "sliding")
    for attention in ("space", "joint"):  # the table of time is still zero
        assert task.evaluate(model(task, attention=attention))["accuracy"] == 0.5


def test_it_trains_and_resumes_the_protocol(tmp_path):
    task = create_task(KIND, "sliding", limit=64)
    net = model(task)
    history = train(net, task, Recipe(max_steps=3, batch_size=16), progress=False)
    assert len(history) >= 3 and history[0]["loss"] == pytest.approx(0.69, abs=0.1)
    assert kind_of_data("sliding") == kind_of_data("kinetics") == KIND
    net.save_pretrained(tmp_path), task.save(tmp_path)
    again = load_task(tmp_path)
    assert repr(again) == repr(task) and again.num_frames == 8 and not again.augment
    clip = task.dataset("valid")[7][0]
    assert again.predict(net, [clip]) == task.predict(net, [clip])


@pytest.mark.no_shapes
def test_no_augmentation_of_images():
    task = create_task(KIND, "sliding")
    with pytest.raises(an.ConfigError, match="augmentation: expected None"):
        task.setup(Recipe(augmentation=Augmentation(mixup=0.2)))


def test_a_folder_as_kinetics_has_it(folder):
    task = create_task(KIND, "kinetics", folder)
    assert task.classes == ["eating cake", "jumping"]
    config = TimeSformerConfig(**SMALL | {"in_chans": 3, "num_frames": 4})
    assert task.overrides(config) == {
        "img_size": 24, "in_chans": 3, "num_classes": 2, "num_frames": 4,
    }  # fmt: skip
    rows = task.dataset("train")
    assert len(rows) == 6 and [rows[i][1] for i in range(6)] == [0] * 3 + [1] * 3
    torch.manual_seed(0)
    one, two = (task.collate([rows[0], rows[5]])["videos"] for _ in range(2))
    assert one.shape == (2, 4, 3, 24, 24) and not torch.equal(one, two)
    still = create_task(KIND, "kinetics", folder, augment=False)
    still.overrides(config)
    one, two = (still.collate([rows[0], rows[5]])["videos"] for _ in range(2))
    assert torch.equal(one, two)
    net = model(task, in_chans=3, num_frames=4)
    assert 0 <= task.evaluate(net)["accuracy"] <= 1
    train(net, task, Recipe(max_steps=2, batch_size=4), progress=False)


def test_all_frames_are_cut_out_alike():
    """A clip that stands still does so after it has been varied."""
    task = VideoClassification(["a", "b"], Preprocessing((8, 8), 8), num_frames=3)
    frame = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
    torch.manual_seed(0)
    for _ in range(5):
        first, *others = task.frames([frame] * 3, training=True)
        assert all(torch.equal(first, other) for other in others)


def test_prediction_of_files_and_bytes(folder):
    task = create_task(KIND, "kinetics", folder)
    net = model(task, in_chans=3, num_frames=4)
    path = folder / "val" / "jumping" / "0"
    frames = [np.asarray(Image.open(path / f"{i:03}.png")) for i in range(5)]
    clip = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    by_path, by_bytes = task.predict(net, [path, clip])
    assert by_path == by_bytes and {name for name, _ in by_path} == {*task.classes}
    assert sum(share for _, share in by_path) == pytest.approx(1)
    line = task.line("clip", by_path)
    assert line.startswith("clip: ") and "%" in line


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "inputs, said",
    [
        ([torch.zeros(3, 1, 24, 24, dtype=torch.uint8)], "at least 8 frames; got 3"),
        ([torch.zeros(8, 24, 24, dtype=torch.uint8)], r"bytes \(t c h w\); got"),
        ([torch.zeros(8, 1, 24, 24)], "bytes .* got float32"),
        (["nowhere.mp4"], "nowhere.mp4: expected a folder of frames, or a video"),
        ([7], "inputs: expected a video, .*; got int"),
        ("clip.mp4", "inputs: expected a list of clips; got one"),
    ],
)
def test_what_is_no_clip(inputs, said):
    task = create_task(KIND, "sliding")
    with pytest.raises(an.InputError, match=said) as caught:
        task.predict(model(task), inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.no_shapes
def test_what_does_not_fit(folder, tmp_path):
    task = create_task(KIND, "sliding")
    with pytest.raises(an.ConfigError, match="num_frames: expected 8, .*; got 4"):
        task.predict(model(num_frames=4), [task.dataset("valid")[0][0]])
    with pytest.raises(an.ConfigError, match="in_chans"):
        task.evaluate(model(in_chans=3))
    with pytest.raises(an.ConfigError, match="data_dir"):
        create_task(KIND, "sliding", folder)
    with pytest.raises(an.ConfigError, match="data: expected"):
        VideoClassification.create("imagenet")
    (tmp_path / "train" / "a").mkdir(parents=True)
    write_clip(tmp_path / "train" / "b" / "0")
    with pytest.raises(an.InputError, match="a: expected clips; got none"):
        create_task(KIND, "kinetics", tmp_path)
    wrong = {"valid": (torch.zeros(2, 4, 1, 8, 8, dtype=torch.uint8), [0, 1])}
    with pytest.raises(an.InputError, match="valid: expected clips of bytes, .n, 8"):
        VideoClassification(["a", "b"], task.preprocessing, examples=wrong)


def test_a_folder_of_transformers(tmp_path):
    """Length and names of config.json, frames as preprocessor_config.json says."""
    transformers = pytest.importorskip("transformers")
    stored = transformers.TimesformerConfig(
        image_size=24, patch_size=8, num_frames=4, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=8, num_labels=2,
        id2label={0: "eating", 1: "jumping"},
    )  # fmt: skip
    transformers.TimesformerForVideoClassification(stored).save_pretrained(tmp_path)
    sides = {"height": 24, "width": 24}
    processor = {"size": {"shortest_edge": 24}, "crop_size": sides, "resample": 2}
    processor |= {"do_center_crop": True, "image_mean": [0.45] * 3}
    processor |= {"image_std": [0.225] * 3, "rescale_factor": 1 / 255}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    name = "timesformer_base_patch16_224"
    arguments = Namespace(name=name, pretrained=str(tmp_path))
    task, where = find_task(arguments)
    assert task.classes == ["eating", "jumping"] and task.num_frames == 4
    assert task.preprocessing.mean == (0.45,) * 3 and where == tmp_path
    clip = write_clip(tmp_path / "clip", 6)
    (answer,) = task.predict(an.create_model(name, tmp_path), [clip])
    assert {label for label, _ in answer} == {"eating", "jumping"}


def test_training_takes_the_preprocessing_of_the_model(folder):
    """Of somebody's weights too: their folder says it."""
    info = an.model_info("timesformer_base_patch16_224")
    given = VideoClassification.preprocessing_of(info, None)
    task = create_task(KIND, "kinetics", folder, preprocessing=given, image_size=24)
    assert task.preprocessing.mean == (0.45,) * 3 and task.preprocessing.size == (
        24,
        24,
    )
    task.save(folder)
    assert VideoClassification.preprocessing_of(info, folder) == task.preprocessing
    assert "data_dir" not in json.loads((folder / "task.json").read_text())["data"]


def test_what_a_folder_stands_for(folder):
    task = create_task(KIND, "sliding")
    clips = folder / "val" / "jumping"
    assert task.expand(str(clips)) == [str(clips / "0"), str(clips / "1")]
    assert task.expand(str(clips / "0")) == [str(clips / "0")]
    with pytest.raises(an.InputError, match="expected clips in the folder; got none"):
        task.expand(str(folder))
