"""What is written into a folder is there as a whole, whatever kills the writer."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import attn_notes as an
from attn_notes.foundations.checks import CheckpointError, ConfigError
from attn_notes.zoo import files
from attn_notes.zoo.files import (
    atomic_folder,
    locked,
    read_state_dict,
    settle,
    sweep,
    to_path,
    writing,
)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def child(work, *arguments) -> int:
    """Do it in a fork; the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def die_at(monkeypatch, owner, name, call):
    """The call of this number kills the process before it does anything."""
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def dying(*arguments, **options):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, dying)


# replaced as a whole


@pytest.mark.parametrize("call", range(1, 9))
@pytest.mark.parametrize("step", ["rename", "replace", "rmdir", "chmod"])
def test_a_model_that_is_killed_while_it_is_replaced_is_the_old_or_the_new(
    toy, tmp_path, monkeypatch, step, call
):
    folder = tmp_path / "model"
    old, new = an.create_model("toy"), an.create_model("toy", hidden_size=4)
    old.save_pretrained(folder)
    with monkeypatch.context() as patch:
        die_at(patch, Path, step, call)
        killed = child(new.save_pretrained, folder)
    found = an.create_model("toy", folder)
    whole = {4: new, 6: old}[found.config.hidden_size]
    for name, value in whole.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    if killed:
        new.save_pretrained(folder)  # what the killed one left is in nobody's way
    assert names(folder) == ["README.md", "config.json", "model.safetensors"]


def test_what_was_decided_is_finished_by_whoever_comes(tmp_path):
    folder = tmp_path / "out"
    for name, text in {"a": "old", "b": "old", "c": "other"}.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / files.COMMITTED).mkdir()
    (folder / files.COMMITTED / "b").write_text("new")  # a was moved already
    settle(folder)
    assert names(folder) == ["a", "b", "c"] and (folder / "b").read_text() == "new"
    settle(folder)


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / files.COMMITTED).symlink_to(tmp_path / "secret")
    settle(tmp_path / "out")
    assert names(tmp_path / "secret") == ["key"]
    (tmp_path / "out" / ".part-x").symlink_to(tmp_path / "secret")
    sweep(tmp_path / "out", ".part-*")
    assert names(tmp_path / "secret") == ["key"]


def test_a_folder_whose_parent_is_not_to_be_written(tmp_path, monkeypatch):
    """As a volume that is mounted there."""
    (tmp_path / "volume").mkdir()
    make = files.mkdtemp

    def mkdtemp(prefix, dir):
        if Path(dir) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return make(prefix=prefix, dir=dir)

    monkeypatch.setattr(files, "mkdtemp", mkdtemp)
    with atomic_folder(tmp_path / "volume") as part:
        (part / "a").write_text("1")
    assert names(tmp_path / "volume") == ["a"]
    with pytest.raises(CheckpointError, match="new can not be written: Permission"):
        with atomic_folder(tmp_path / "new"):
            raise AssertionError


@pytest.mark.parametrize("old", [True, False])
def test_leftovers_of_the_killed_go_and_those_of_the_living_stay(tmp_path, old):
    folder = tmp_path / "out"
    if old:
        folder.mkdir()
    beside = folder if old else tmp_path

    def killed():
        with atomic_folder(folder) as part:
            (part / "half").write_text("1")
            os.kill(os.getpid(), signal.SIGKILL)

    assert child(killed) == signal.SIGKILL and len(names(beside)) == 1
    with atomic_folder(folder) as alive:
        (alive / "a").write_text("1")
        assert len(names(beside)) == 1
        with atomic_folder(folder if old else tmp_path / "other"):
            assert alive.is_dir()
    assert names(folder) == ["a"]


def test_a_lock_excludes_and_ends_with_its_process(tmp_path):
    with locked(tmp_path) as first:
        with locked(tmp_path) as second:
            assert (first, second) == (True, False)
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(tell, b"1")
            signal.pause()
        os.read(told, 1)
    try:  # the fork does not hold it
        with locked(tmp_path) as again:
            assert again
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# what the system refuses


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_one_line_that_names_the_place(tmp_path, number):
    with pytest.raises(CheckpointError, match=os.strerror(number)) as caught:
        with atomic_folder(tmp_path / "out") as part:
            raise OSError(number, "no", str(part / "a"))
    assert str(tmp_path / "out") in str(caught.value) and "\n" not in str(caught.value)
    assert names(tmp_path) == []
    with pytest.raises(OSError, match="elsewhere"), writing(tmp_path):
        raise OSError("elsewhere")  # what is no refusal is left alone


def limited(program, *arguments):
    """A program in a process that may write files of 100 kB."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5)),
    )


def test_a_file_that_becomes_too_large_leaves_the_old_model(toy, tmp_path):
    an.create_model("toy").save_pretrained(tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    done = limited(
        """
import sys, torch
from attn_notes.zoo.files import atomic_folder
from attn_notes.zoo.hub import save_weights
try:
    with atomic_folder(sys.argv[1]) as part:
        save_weights(torch.nn.Linear(300, 300), part / "model.safetensors")
except ValueError as error:
    print(type(error).__name__, error)""",
        tmp_path / "model",
    )
    assert "CheckpointError" in done.stdout and "File too large" in done.stdout
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}


# where


def test_the_home_folder_is_the_same_in_reading_and_writing(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    an.create_model("toy").save_pretrained("~/deep/model")
    assert an.create_model("toy", "~/deep/model").config.hidden_size == 6
    assert read_state_dict("~/deep/model/model.safetensors")
    assert names(tmp_path) == ["deep"] and to_path("~/a") == tmp_path / "a"


@pytest.mark.no_shapes
@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "a\0b", "", 3, None, b"x"])
def test_what_is_no_path(path):
    with pytest.raises(ConfigError, match="path: expected a file or folder; got"):
        to_path(path)


@pytest.mark.parametrize("path", ["x" * 5000, "x" * 300, "\ud800"])
def test_a_path_that_the_system_does_not_take(path):
    with pytest.raises(ConfigError, match="path: expected a file or folder") as info:
        to_path(path)
    assert len(str(info.value)) < 400


def test_a_folder_in_the_place_of_a_file_changes_nothing(tmp_path):
    (tmp_path / "a.json").write_text("old")
    (tmp_path / "b.bin").mkdir()
    with pytest.raises(CheckpointError, match="b.bin: expected a file"):
        with atomic_folder(tmp_path) as part:
            (part / "a.json").write_text("new")
            (part / "b.bin").write_text("new")
    assert names(tmp_path) == ["a.json", "b.bin"]
    assert (tmp_path / "a.json").read_text() == "old"


@pytest.mark.parametrize("old", [False, True])
def test_several_who_write_one_folder_at_once(old, tmp_path):
    folder, failed = tmp_path / "model", []
    if old:
        folder.mkdir()

    def write(i):
        try:
            for _ in range(10):
                with atomic_folder(folder) as part:
                    (part / "a").write_text(f"{i}")
                    (part / "b").write_text(f"{i}")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and names(folder) == ["a", "b"]
    assert (folder / "a").read_text() == (folder / "b").read_text()


def test_a_place_that_is_none_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="can not be written"):
        with atomic_folder(Path("/proc/model")):
            pass


def test_a_dictionary_in_itself_is_no_checkpoint(tmp_path):
    content = {"a": torch.ones(1)}
    content["model"] = {"state_dict": content}
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="expected named tensors"):
        read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize("shard", ["a\0.safetensors", "a" * 400 + ".pt", "\ud800.pt"])
def test_the_name_of_a_shard_that_is_none(shard, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="expected shards beside it"):
        read_state_dict(index)
