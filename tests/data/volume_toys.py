"""Small NIfTI files, and the folders of volumes that are made of them."""

import json

import nibabel
import numpy as np

MM = np.diag([0.75, 0.75, 2.0, 1.0])


def save(path, values, affine=MM):
    """Write numbers as NIfTI; gives the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


def write_pair(root, image, label, seed=0, classes=3, channels=0, side=12):
    """A bright cube in noise, and its label; each seed elsewhere."""
    random = np.random.default_rng(seed)
    labels = np.zeros((side, side + 2, side - 2), np.uint8)
    x = int(random.integers(1, 4))
    labels[x : x + 6, 3:9, 2:8] = 1 + seed % (classes - 1)
    values = random.normal(0, 20, labels.shape) + 150 * (labels > 0)
    if channels:
        values = np.stack([values] * channels, -1)
    save(root / image, values.astype(np.int16))
    save(root / label, labels)


def msd(root, cases=5, channels=0, **changes):
    """A folder in the form of the Medical Segmentation Decathlon."""
    rows = [
        {"image": f"./imagesTr/case_{i}.nii.gz", "label": f"./labelsTr/case_{i}.nii.gz"}
        for i in range(cases)
    ]
    for i, row in enumerate(rows):
        write_pair(root, row["image"], row["label"], i, channels=channels)
    modality = {str(i): "MRI" for i in range(channels)} or {"0": "CT"}
    listed = {
        "name": "toy",
        "modality": modality,
        "labels": {"0": "background", "1": "spleen", "2": "tumour"},
        "training": rows,
        "test": ["./imagesTs/case_9.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(listed | changes))
    return root


def btcv(root, numbers=(1, 2, 3, 21, 35), listed=False):
    """A folder in the form of BTCV, with the list of UNETR's code or without."""
    rows = [
        {
            "image": f"imagesTr/img{i:04}.nii.gz",
            "label": f"labelsTr/label{i:04}.nii.gz",
        }
        for i in numbers
    ]
    for i, row in zip(numbers, rows, strict=True):
        write_pair(root, row["image"], row["label"], i, classes=14)
    if listed:
        short = ["background", "spleen", "rkid", "lkid", "gall", "eso", "liver", "sto"]
        short += ["aorta", "IVC", "veins", "pancreas", "rad", "lad"]
        stored = {
            "description": "btcv yucheng",
            "labels": {str(i): name for i, name in enumerate(short)},
            "modality": {"0": "CT"},
            "training": rows[:-2],
            "validation": rows[-2:],
        }
        (root / "dataset_0.json").write_text(json.dumps(stored))
    return root
