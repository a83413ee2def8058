"""Names and records, and the index that lists them without importing a chapter."""

import json
import subprocess
import sys

import pytest
from torch import nn

import attn_notes as an
from attn_notes.zoo import registry
from attn_notes.zoo.registry import (
    ModelInfo,
    chapter_modules,
    override,
    read_index,
    register_models,
    sources,
    weights_folder,
    write_index,
)

COMMON = dict(paper="", year=2026, chapter="", task="", parameters=0)


def fresh(program):
    """What a program prints in a process of its own, with the package's modules that it
    loaded in the last line."""
    tail = "import sys; print(*[n for n in sys.modules if n.startswith('attn_notes.')])"
    found = subprocess.run(
        [sys.executable, "-c", f"import attn_notes as an\n{program}\n{tail}"],
        capture_output=True,
        text=True,
        check=True,
    )
    *said, modules = found.stdout.splitlines()
    return said, [name.removeprefix("attn_notes.") for name in modules.split()]


def test_names_are_sorted_and_match_patterns(toy):
    assert an.list_models() == ["other_toy", "toy", "toy_wide"]
    assert (
        an.list_models("toy*") == ["toy", "toy_wide"] and an.list_models("Toy*") == []
    )


def test_info_tells_what_was_registered(toy):
    info = an.model_info("toy")
    assert (info.model, info.parameters, info.config.widths) == (toy, 87, (4, 5))
    assert toy.config_class is type(info.config) and info.classifier == ("head.*",)
    for said in (
        "nobody",
        "2026",
        "87",
        "accuracy",
        "attn_notes, elsewhere",
        ".hidden_size",
        "none shipped",
    ):
        assert said in repr(info)
    assert "MACs" not in repr(info) and "license" not in repr(info)


def test_sources_name_each_once_and_parts_by_themselves():
    assert sources(an.model_info("convs2s")) == "attn_notes"
    assert sources(an.model_info("detr_resnet50")) == (
        "attn_notes, facebookresearch, transformers"
    )
    assert sources(an.model_info("transunet")) == (
        "attn_notes, TransUNet; a ViT of attn_notes, timm, Flax"
    )


def test_the_row_of_a_size_wins_over_what_is_common(toy):
    register_models(
        toy,
        {
            "row": {"config": toy.config_class(), "year": 1999, "classifier": ("x",)},
            "plain": {"config": toy.config_class()},
        },
        **{**COMMON, "keeps": ("softmax",), "macs": 7, "license": "MIT"},
    )
    row, plain = an.model_info("row"), an.model_info("plain")
    assert (row.year, plain.year) == (1999, 2026)
    assert (row.classifier, plain.classifier) == (("x",), ("head.*",))
    assert "softmax" in repr(row) and "MIT" in repr(row) and "MACs" in repr(row)


def test_every_field_of_a_record_has_a_type():
    assert set(ModelInfo.__annotations__) == {
        *("name", "model", "config", "paper", "year", "chapter", "task", "parameters"),
        *("macs", "input_size", "mean", "std", "crop_pct", "interpolation"),
        *("classifier", "reported", "formats"),
        *("recipes", "tiny", "keeps", "replaces", "adds", "license"),
    }


@pytest.mark.no_shapes
def test_wrong_registrations_are_refused(toy):
    with pytest.raises(an.ConfigError, match="did you mean 'reported'"):
        register_models(
            toy, {"a": {"config": toy.config_class()}}, reports={}, **COMMON
        )
    with pytest.raises(an.ConfigError, match="a: .*missing.*'config'"):
        register_models(toy, {"a": {}}, **COMMON)
    assert "a" not in an.list_models()


ROW = {"config": None, "parameters": 3}


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([("own", ROW)], "sizes: expected a mapping"),
        ({"own": None}, "sizes: expected a mapping"),
        ({5: ROW}, "name: expected a text"),
        ({"": ROW}, "name of a model"),
        ({"../own": ROW}, "name of a model"),
        ({"own\na": ROW}, "name of a model"),
        ({"own": {**ROW, "parameters": "many"}}, "own: parameters: expected a whole"),
        ({"own": {**ROW, "year": None}}, "own: year: expected a whole"),
        ({"own": {**ROW, "config": {"a": 1}}}, "own: config: expected a dataclass"),
        ({"own": {**ROW, "config": ModelInfo}}, "own: config: expected a dataclass"),
        ({"own": ROW, "other": {**ROW, "formats": ("x",)}}, "other: formats: expected"),
    ],
)
def test_a_table_with_one_wrong_row_registers_nothing(sizes, said, toy):
    if isinstance(sizes, dict):
        config, rows = toy.config_class(), sizes.items()
        sizes = {n: r and {**r, "config": r["config"] or config} for n, r in rows}
    before = an.list_models()
    with pytest.raises(an.ConfigError, match=said) as info:
        register_models(toy, sizes, **COMMON)
    assert an.list_models() == before and "\n" not in str(info.value)


@pytest.mark.no_shapes
@pytest.mark.parametrize("what", [None, nn.Linear(1, 1), dict])
def test_what_is_registered_is_a_class_of_modules(what):
    with pytest.raises(an.ConfigError, match="model_class: expected a class of modu"):
        register_models(what, {})


def test_a_name_belongs_to_one_chapter(toy):
    stranger = type("Stranger", (nn.Module,), {"__module__": "another.chapter"})
    config = an.model_info("toy").config
    with pytest.raises(an.ConfigError, match="taken by .*Toy"):
        register_models(stranger, {"toy": {"config": config}}, **COMMON)
    assert an.model_info("toy").model is toy


def test_a_class_in_the_notebook_goes_before_the_exported_one(toy):
    edited = type("Toy", (toy,), {"__module__": "__main__"})
    again = type("Toy", (toy,), {"__module__": "__main__"})
    row = {"toy": {"config": an.model_info("toy").config}}
    register_models(edited, row, **COMMON)
    register_models(toy, row, **COMMON)
    assert an.model_info("toy").model is edited
    register_models(again, row, **COMMON)
    assert an.model_info("toy").model is again


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: an.model_info("toi"), "did you mean 'toy'"),
        (lambda: an.model_info("zzzzzzzz"), "there are: other_toy, toy"),
        (
            lambda: override(an.model_info("toy").config, {"hidden_sise": 3}),
            "did you mean 'hidden_size'",
        ),
        (
            lambda: override(an.model_info("toy").config, {"hidden_size": 0}),
            "hidden_size: expected",
        ),
    ],
)
def test_wrong_questions_are_answered_in_one_line(toy, call, said):
    with pytest.raises(an.ConfigError, match=".") as caught:
        call()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_weights_are_package_data():
    assert (
        weights_folder("toy").parent.name == "weights"
        and weights_folder("toy").parents[1].name == "attn_notes"
    )


# the index


def test_the_index_is_that_of_the_chapters_and_the_same_twice(tmp_path):
    failed = write_index(tmp_path / "one.json")
    assert failed == {}
    assert write_index(tmp_path / "two.json") == {}
    written = (tmp_path / "one.json").read_text()
    assert written == (tmp_path / "two.json").read_text()
    assert written == registry._index_path().read_text()
    assert list(json.loads(written)) == sorted(json.loads(written))
    assert not list(tmp_path.glob(".*"))


def test_the_index_says_what_the_chapters_do():
    for name, entry in read_index().items():
        info = an.model_info(name)
        assert entry == {
            "module": info.model.__module__,
            "parameters": info.parameters,
            "task": info.task,
            "paper": info.paper,
            "year": info.year,
        }
        assert entry["module"] in chapter_modules()


GOOD = """
from dataclasses import dataclass

from torch import nn

from attn_notes.zoo.registry import register_models


@dataclass(frozen=True)
class Config:
    size: int = 1


class Model(nn.Module):
    pass


register_models(
    Model,
    {"good": {"config": Config()}},
    paper="p",
    year=1,
    chapter="c",
    task="t",
    parameters=2,
)
"""
FOUND = ["attn_notes.broken", "attn_notes.good", "attn_notes.idle"]


@pytest.fixture
def chapters(monkeypatch, tmp_path):
    """A package folder of its own: a chapter that is right, one that does not import,
    one that registers nothing of its own, and an index older than all of them."""
    (tmp_path / "attn_notes").mkdir()
    for name, text in {
        "good": GOOD,
        "broken": "import no_such_module\n\nregister_models()\n",
        "idle": "register_models = print\nregister_models()\n",
        "other": "def f():\n    register_models()\n",
    }.items():
        (tmp_path / "attn_notes" / f"{name}.py").write_text(text)
    old = {
        name: {"module": f"attn_notes.{module}", "parameters": 1}
        for name, module in {
            "kept": "broken",
            "gone": "good",
            "lost": "removed",
        }.items()
    }
    monkeypatch.setattr(registry, "files", lambda package: tmp_path / "attn_notes")
    monkeypatch.setattr(an, "__path__", [*an.__path__, str(tmp_path / "attn_notes")])
    monkeypatch.setattr(registry, "_MODELS", {})
    (tmp_path / "attn_notes" / "_models.json").write_text(json.dumps(old))
    read_index.cache_clear()
    yield tmp_path / "attn_notes"
    read_index.cache_clear()
    for name in ("good", "broken", "idle"):
        sys.modules.pop(f"attn_notes.{name}", None)


def test_a_chapter_that_does_not_import_is_named_and_keeps_its_entries(chapters):
    assert chapter_modules() == [
        "attn_notes.broken",
        "attn_notes.good",
        "attn_notes.idle",
    ]
    failed = write_index()
    assert failed == {
        "attn_notes.broken": "ModuleNotFoundError: No module named 'no_such_module'",
        "attn_notes.idle": "registers no class of its own",
    }
    assert read_index() == {
        "good": {
            "module": "attn_notes.good",
            "parameters": 2,
            "task": "t",
            "paper": "p",
            "year": 1,
        },
        "kept": {"module": "attn_notes.broken", "parameters": 1},
    }
    assert an.model_info("good").parameters == 2
    with pytest.raises(ModuleNotFoundError):
        an.model_info("kept")


def test_an_index_older_than_the_chapters_is_said(chapters):
    with pytest.raises(an.ConfigError, match="does not register 'gone'.*export"):
        an.model_info("gone")


# what is imported


def test_listing_imports_no_chapter():
    said, modules = fresh("print(len(an.list_models()))")
    assert int(said[0]) == len(an.list_models()) > 0
    parts = {module.split(".")[0] for module in modules}
    assert parts <= {"foundations", "zoo"}


def test_a_model_imports_its_own_chapter_alone():
    said, modules = fresh("print(type(an.create_model('transformer_tiny')).__name__)")
    assert said == ["Transformer"]
    chapters = [m for m in modules if m.startswith("sequence.")]
    assert set(chapters) == {"sequence.encoder_decoder", "sequence.transformer"}
    for other in ("data", "training.loop", "training.experiments", "zoo.benchmark"):
        assert not any(m == other or m.startswith(f"{other}.") for m in modules)
    assert not any(m.endswith("_evidence") for m in modules)


def test_the_zoo_imports_in_one_direction():
    """files, formats < registry < checkpoints, hub < factory < devices, benchmark; the
    mixin alone looks up, when a model is read back."""
    import ast
    from pathlib import Path

    order = ["files", "formats", "registry", "checkpoints", "hub", "factory"]
    order += ["devices", "benchmark"]
    folder = Path(registry.__file__).parent
    upward = set()
    for path in folder.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                name = node.module.removeprefix("attn_notes.zoo.")
                local = node.level == 1 or node.module.startswith("attn_notes.zoo.")
                if local and order.index(name) >= order.index(path.stem):
                    upward.add((path.stem, name, node in tree.body))
    assert upward == {("hub", "factory", False)}
