"""Each part of the package imports only from the parts below it, and a model's module
nothing that trains, reads data or measures."""

import ast
from pathlib import Path

import pytest
from book import ROOT

PARTS = [
    "foundations",
    "zoo",
    "training",
    "data",
    "sequence",
    "language",
    "vision",
    "detection",
    "segmentation",
    "efficient",
    "commands",
    "cli",
]
CHAPTERS = PARTS[PARTS.index("sequence") : PARTS.index("commands")]
ALLOWED_IN_A_MODEL = (
    "foundations",
    "zoo.registry",
    "zoo.formats",
    "zoo.hub",
    "training.losses",
    "training.recipes",
)
# A chapter may build on the chapters that its paper builds on, and on no other.
ANCESTORS = {
    "sequence.encoder_decoder": (),
    "sequence.cells": (),
    "sequence.seq2seq": ("sequence.cells", "sequence.encoder_decoder"),
    "sequence.convs2s": ("sequence.encoder_decoder",),
    "sequence.transformer": ("sequence.encoder_decoder",),
    "language.bert": (),
    "language.gpt": (),
    "vision.bit_resnet": (),
    "vision.vit": ("vision.bit_resnet",),
    "vision.windows": (),
    "vision.swin_formats": (),
    "vision.swin": ("vision.windows", "vision.swin_formats"),
    "vision.swin_backbone": ("vision.swin", "vision.windows"),
    "vision.swin_mlp": ("vision.swin", "vision.swin_formats", "vision.windows"),
    "vision.botnet_formats": (),
    "vision.botnet": ("vision.botnet_formats",),
    "vision.pvt_formats": (),
    "vision.pvt": ("vision.pvt_formats",),
    "vision.deit": ("vision.vit",),
    "vision.lvvit_formats": ("vision.vit",),
    "vision.lvvit": ("vision.lvvit_formats", "vision.vit"),
    "vision.igpt": ("language.gpt",),
    "vision.cvt_formats": (),
    "vision.cvt": ("vision.cvt_formats",),
    "vision.ipt_formats": (),
    "vision.ipt": ("vision.ipt_formats",),
    "vision.timesformer_formats": (),
    "vision.timesformer": ("vision.timesformer_formats", "vision.vit"),
    "detection.set_prediction": (),
    "detection.detr_backbone": (),
    "detection.detr_masks": (),
    "detection.detr_formats": (),
    "detection.detr": (
        "detection.detr_backbone",
        "detection.detr_formats",
        "detection.detr_masks",
        "detection.set_prediction",
    ),
    "detection.deformable_attention": (),
    "detection.focal_classes": ("detection.set_prediction",),
    "detection.deformable_detr_formats": ("detection.detr_formats",),
    "detection.deformable_detr": (
        "detection.deformable_attention",
        "detection.deformable_detr_formats",
        "detection.detr",
        "detection.detr_backbone",
        "detection.focal_classes",
        "detection.set_prediction",
    ),
    "detection.swin_rcnn_formats": ("vision.swin_formats",),
    "detection.swin_rcnn_parts": ("vision.swin",),
    "detection.swin_rcnn": (
        "detection.swin_rcnn_formats",
        "detection.swin_rcnn_parts",
        "vision.swin_backbone",
    ),
    "detection.row_column_attention": (),
    "detection.anchor_detr_formats": (),
    "detection.anchor_detr": (
        "detection.anchor_detr_formats",
        "detection.deformable_detr",
        "detection.detr",
        "detection.detr_backbone",
        "detection.focal_classes",
        "detection.row_column_attention",
        "detection.set_prediction",
    ),
    "segmentation.unetr_formats": (),
    "segmentation.unetr": ("segmentation.unetr_formats",),
    "efficient.quantization": (),
    "efficient.compact_design": ("vision.vit",),
    "efficient.approximation": (),
    "efficient.efficient_attention": ("efficient.approximation",),
    "efficient.hashing": ("efficient.approximation",),
    "efficient.pruning": (),
    "efficient.distillation": (),
    "segmentation.upernet_formats": ("vision.swin_formats",),
    "segmentation.pixel_classes": (),
    "segmentation.convolutions": (),
    "segmentation.upernet": (
        "segmentation.convolutions",
        "segmentation.pixel_classes",
        "segmentation.upernet_formats",
        "vision.swin",
        "vision.swin_backbone",
    ),
    "segmentation.setr_formats": ("vision.vit", "vision.deit"),
    "segmentation.setr_decoders": ("segmentation.convolutions",),
    "segmentation.setr": (
        "segmentation.pixel_classes",
        "segmentation.setr_decoders",
        "segmentation.setr_formats",
        "vision.vit",
    ),
    "segmentation.transunet_resnet": (),
    "segmentation.transunet_formats": ("vision.vit",),
    "segmentation.transunet": (
        "segmentation.convolutions",
        "segmentation.pixel_classes",
        "segmentation.transunet_formats",
        "segmentation.transunet_resnet",
        "vision.vit",
    ),
    "segmentation.transfuse_streams": ("vision.deit",),
    "segmentation.transfuse_parts": (),
    "segmentation.transfuse_formats": (
        "segmentation.transfuse_streams",
        "vision.deit",
    ),
    "segmentation.transfuse": (
        "segmentation.pixel_classes",
        "segmentation.transfuse_formats",
        "segmentation.transfuse_parts",
        "segmentation.transfuse_streams",
        "vision.deit",
        "vision.vit",
    ),
}


def imports(path: Path, package: Path) -> list[str]:
    """The modules of the package that a module imports, anywhere in it, as in
    foundations.masks."""
    parts = path.relative_to(package).with_suffix("").parts
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = (
                ["attn_notes", *parts[: len(parts) - node.level]] if node.level else []
            )
            module = ".".join([*above, *filter(None, [node.module])])
            found += [module] + [f"{module}.{alias.name}" for alias in node.names]
    return [
        name.removeprefix("attn_notes.")
        for name in found
        if name.startswith("attn_notes.")
    ]


def faults(package: Path) -> list[str]:
    """Every import that points the wrong way, a line each."""
    wrong = []
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package).with_suffix("").parts)
        part = module.split(".")[0]
        if part not in PARTS or path.name == "__init__.py":
            continue
        model = part in CHAPTERS and not module.endswith("_evidence")
        for name in imports(path, package):
            other = name.split(".")[0]
            if other not in PARTS:
                continue
            higher = PARTS.index(other) > PARTS.index(part)
            known = (*ALLOWED_IN_A_MODEL, *ANCESTORS.get(module, ()), module)
            strange = model and not name.startswith(known)
            evidence = name.split(".")[-1].endswith("_evidence") and not (
                module.endswith("_evidence")
            )
            if higher or strange or evidence:
                wrong.append(f"attn_notes.{module} imports {name}")
    return wrong


def test_every_import_points_down():
    assert not faults(ROOT / "attn_notes")


@pytest.mark.parametrize(
    "module, line",
    [
        ("foundations/masks", "from ..zoo.registry import model_info"),
        ("training/loop", "from attn_notes.data.tasks import create_task"),
        ("training/loop", "def f():\n    from ..data import tasks"),
        ("sequence/transformer", "from ..training.loop import train"),
        ("sequence/transformer", "from .seq2seq import Seq2SeqConfig"),
        ("sequence/transformer", "from .transformer_evidence import RACE"),
        ("sequence/convs2s", "import attn_notes.zoo.benchmark"),
    ],
)
def test_a_planted_import_is_noticed(tmp_path, module, line):
    path = tmp_path / f"{module}.py"
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert faults(tmp_path)


@pytest.mark.parametrize(
    "module, line",
    [
        ("sequence/transformer", "from .encoder_decoder import EncoderDecoder"),
        ("sequence/transformer_evidence", "from ..training.loop import train"),
        ("data/tasks", "from ..training.losses import token_cross_entropy"),
    ],
)
def test_an_import_that_points_down_is_none(tmp_path, module, line):
    path = tmp_path / f"{module}.py"
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert not faults(tmp_path)
