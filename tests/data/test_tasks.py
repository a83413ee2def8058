"""Tasks are found by kind, by data set and by folder, and imported when asked for."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from attn_notes.data import tasks
from attn_notes.data.tasks import (
    KINDS,
    TaskKind,
    check_config,
    create_task,
    kind_of_data,
    load_task,
    read_task,
    register_task,
    task_class,
    write_task,
)
from attn_notes.data.translation import LANGUAGES
from attn_notes.foundations.checks import CheckpointError, ConfigError


@pytest.fixture
def painting(monkeypatch):
    """A kind of task registered in this process."""
    monkeypatch.setattr(tasks, "KINDS", dict(KINDS))
    monkeypatch.setattr(tasks, "_CLASSES", dict(tasks._CLASSES))

    @register_task("painting", data=("louvre", "wmt14-en-de"))
    class Painting:
        def __init__(self, colours):
            self.colours = colours

        @classmethod
        def create(cls, data_name, data_dir=None, seed=0, colours=3):
            return cls((data_name, data_dir, seed, colours))

        def save(self, folder):
            write_task(folder, self.kind, {"colours": self.colours})

        @classmethod
        def load(cls, folder, data_dir=None):
            with read_task(folder, cls.kind) as stored:
                return cls(tuple(stored["colours"]))

    return Painting


def test_a_kind_is_its_class(painting, tmp_path):
    assert task_class("painting") is painting and painting.kind == "painting"
    task = create_task("painting", "louvre", seed=4, colours=5)
    assert task.colours == ("louvre", None, 4, 5)
    assert create_task("painting").colours[0] == "louvre"
    task.save(tmp_path)
    assert load_task(tmp_path).colours == task.colours
    assert json.loads((tmp_path / "task.json").read_text())["kind"] == "painting"


def test_a_data_set_says_its_kind(painting):
    assert kind_of_data("louvre") == kind_of_data("louvre", "translation") == "painting"
    assert {kind_of_data(name) for name in LANGUAGES if name != "wmt14-en-de"} == {
        "translation"
    }
    for kind in ("painting", "translation"):
        assert kind_of_data("wmt14-en-de", kind) == kind
    with pytest.raises(ConfigError, match="wmt14-en-de serves painting and transl"):
        kind_of_data("wmt14-en-de", "sculpture")


@pytest.mark.no_shapes
def test_unknown_names(painting):
    with pytest.raises(ConfigError, match="did you mean 'painting'"):
        task_class("paintings")
    with pytest.raises(ConfigError, match="did you mean .*'cldr-en-fr'"):
        kind_of_data("cldr-en-frr")
    with pytest.raises(ConfigError, match="brush"):
        create_task("painting", "louvre", brush=2)


def test_a_kind_has_one_class(painting):
    tasks.KINDS["sculpture"] = TaskKind("elsewhere")
    with pytest.raises(ConfigError, match="'sculpture' is taken by elsewhere"):
        register_task("sculpture")(type("Sculpture", (), {}))


def test_every_kind_of_the_package_has_its_class():
    for kind in KINDS:
        assert task_class(kind).kind == kind
        assert KINDS[kind].module == task_class(kind).__module__


@pytest.mark.slow
def test_kinds_are_imported_when_they_are_asked_for():
    code = (
        "import sys; from attn_notes.data.tasks import KINDS, task_class;"
        "assert not {kind.module for kind in KINDS.values()} & set(sys.modules);"
        "task_class('translation'); print(KINDS['translation'].module in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout == "True\n", said.stderr


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        "{}",
        '{"kind": "translation"}',
        '{"kind": "painting"}',
        '{"kind": ["translation"]}',
        '{"kind": "translation", "source": {"tokens": ["a", "a"], "language": "en"}}',
        '{"kind": "translation", "source": {"tokens": ["a"], "merges": [["a", "b"]]}}',
    ],
)
def test_a_broken_task_file(tmp_path, content):
    if content is not None:
        (tmp_path / "task.json").write_text(content)
    with pytest.raises(CheckpointError, match="task.json"):
        load_task(tmp_path)


@pytest.fixture
def words(monkeypatch):
    """Two kinds that know a vocabulary by one of two sets of files."""
    monkeypatch.setattr(tasks, "KINDS", dict(KINDS))
    monkeypatch.setattr(tasks, "_CLASSES", dict(tasks._CLASSES))
    for kind in ("naming", "filling"):
        load = classmethod(lambda cls, folder: cls.kind)
        tasks.KINDS[kind] = TaskKind(__name__, (), (("words",), ("a.json", "b.txt")))
        register_task(kind)(type(kind, (), {"load_foreign": load}))


@pytest.mark.parametrize("files", [["words"], ["a.json", "b.txt"]])
def test_the_model_says_the_kind_of_another_librarys_folder(words, tmp_path, files):
    for name in files:
        (tmp_path / name).touch()
    assert load_task(tmp_path, kind="filling") == "filling"
    assert load_task(tmp_path, kind="naming") == "naming"


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "files, kind, said",
    [
        ([], None, "expected task.json; got no such file"),
        ([], "naming", "task.json or words or a.json and b.txt; got no such file"),
        (["a.json"], "naming", "a.json and b.txt; got no such file"),
        (["words"], None, "expected task.json; got the files of naming and filling"),
        (["words"], "translation", "vocab.json; got the files of naming and filling"),
        (["words"], "painting", "task.json; got the files of naming and filling"),
    ],
)
def test_a_folder_without_a_task(words, tmp_path, files, kind, said):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=said):
        load_task(tmp_path, kind=kind)


def test_a_task_file_of_another_kind(painting, tmp_path):
    write_task(tmp_path, "painting", {"colours": [1]})
    with pytest.raises(CheckpointError, match="expected a translation task"):
        task_class("translation").load(tmp_path)


def test_the_folder_of_the_data_is_not_stored(tmp_path):
    stored = {"data": {"name": "louvre", "data_dir": "/here", "seed": 1}, "colours": 3}
    for given in (stored, {"data": None}, {"colours": 3}):
        write_task(tmp_path, "painting", given)
        with read_task(tmp_path, "painting") as found:
            kept = {**given, "kind": "painting"}
            if given is stored:
                kept["data"] = {"name": "louvre", "seed": 1}
            assert found == kept
    assert stored["data"]["data_dir"] == "/here"


@pytest.mark.no_shapes
def test_a_configuration_that_says_something_else():
    model = SimpleNamespace(config=SimpleNamespace(num_classes=3, img_size=None))
    check_config(model, {"num_classes": 3, "img_size": 4, "depth": 5})
    check_config(object(), {"num_classes": 4})  # it says nothing
    with pytest.raises(ConfigError, match="num_classes: expected 4, as .*got 3 in the"):
        check_config(model, {"num_classes": 4})
