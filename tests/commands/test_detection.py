"""Detectors at the command line: lines of JSON, pictures with boxes, weights of
transformers, and the paper's recipe on a COCO folder."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from attn_notes.data.coco import write_coco
from attn_notes.data.scenes import DIGITS, scenes
from attn_notes.data.tasks import create_task
from attn_notes.zoo.factory import create_model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two scenes, the second twice as large, and a text."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(scenes("valid", 2).images):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture.resize((64 * (i + 1),) * 2).save(folder / f"{i}.png")
    (folder / "list.txt").write_text("a cat")
    return folder


def folder_of(kind, name, folder):
    """An untrained model with its task."""
    torch.manual_seed(0)
    create_model(name).save_pretrained(folder)
    create_task(kind, "scenes", limit=2).save(folder)
    return folder


@pytest.mark.parametrize(
    "kind, name",
    [("detection", "detr_tiny"), ("panoptic_segmentation", "detr_tiny_panoptic")],
)
def test_lines_or_pictures(kind, name, pictures, run, ask, capsys, tmp_path):
    folder = folder_of(kind, name, tmp_path / "model")
    argv = "predict", name, "--pretrained", folder, "--threshold", "0.05"
    lines = ask(*argv, pictures)  # the text is no image of the folder
    found = [json.loads(line) for line in lines]
    assert [one["image"] for one in found] == [
        str(pictures / f"{i}.png") for i in (0, 1)
    ]
    for one, side in zip(found, (64, 128), strict=True):
        for thing in one["objects"]:
            x0, y0, x1, y1 = thing["box"]
            assert 0 <= x0 <= x1 <= side and 0 <= y0 <= y1 <= side
            assert thing["label"] in DIGITS and 0.05 < thing["score"] <= 1
    assert found[0]["objects"] or kind != "detection"
    output = "--output", tmp_path / "found.png"
    assert run(*argv, pictures / "list.txt", pictures, *output) == 1
    said = capsys.readouterr()
    assert said.out == "" and "expected an image; got another file" in said.err
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.size == (256, 512)


@pytest.mark.no_shapes
def test_what_is_refused(pictures, refused, tmp_path):
    folder = folder_of("detection", "detr_tiny", tmp_path / "model")
    argv = "predict", "detr_tiny", "--pretrained", folder, pictures / "0.png"
    assert "--threshold" in refused(*argv, "--threshold", "2")
    assert "--top-k: expected an option" in refused(*argv, "--top-k", "2")
    said = refused(*argv, "--output", tmp_path / "found.txt")
    assert "expected the name of an image" in said
    said = refused("predict", "detr_tiny_panoptic", *argv[2:])
    assert "expected a task of panoptic_segmentation" in said


@pytest.mark.slow
def test_a_folder_of_transformers(pictures, ask, tmp_path):
    """The boxes are those that transformers says."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    names = {0: "N/A", 1: "cat", 2: "dog"}
    torch.manual_seed(0)
    config = transformers.DetrConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        num_queries=4,
        id2label=names,
    )
    model = transformers.DetrForObjectDetection(config).eval()
    model.save_pretrained(tmp_path)
    processor = transformers.DetrImageProcessor(
        size={"shortest_edge": 96, "longest_edge": 120}
    )
    processor.save_pretrained(tmp_path)
    argv = "predict", "detr_resnet50", "--pretrained", tmp_path, "--threshold", "0.1"
    (line,) = ask(*argv, pictures / "1.png")
    ours = json.loads(line)["objects"]
    with torch.no_grad():
        batch = processor(Image.open(pictures / "1.png"), return_tensors="pt")
        (theirs,) = processor.post_process_object_detection(
            model(**batch), 0.1, [(128, 128)]
        )
    order = theirs["scores"].argsort(descending=True)
    assert [one["label"] for one in ours] == [
        names[int(theirs["labels"][i])] for i in order
    ]
    for one, i in zip(ours, order, strict=True):
        assert one["score"] == pytest.approx(theirs["scores"][i].item(), abs=2e-3)
        box = theirs["boxes"][i].clamp(0, 128).tolist()
        assert one["box"] == pytest.approx(box, abs=0.5)


@pytest.mark.slow
def test_the_papers_recipe_under_torchrun(tmp_path):
    """Two steps of two processes on a COCO folder, evaluated, and what was saved."""
    for split in ("train", "valid"):
        made = scenes(split, 3)
        write_coco(tmp_path / "data", split, [made[i] for i in range(3)], DIGITS)
    name = "detr_resnet50"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--standalone", "-m", "attn_notes.cli", "train", name, "--recipe", "paper"),
        *("--max-steps", "2", "--data", "coco", "--image-size", "64"),
        *("--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "run")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1, 2] and "valid_AP" in rows[-1]
    assert {"class", "l1", "giou"} <= {*rows[0]}
    model = create_model(name, tmp_path / "run")
    assert model.config.num_classes == 10
    task = json.loads((tmp_path / "run" / "task.json").read_text())
    assert task["classes"] == [*DIGITS] and task["preprocessing"]["shortest"] == 64
