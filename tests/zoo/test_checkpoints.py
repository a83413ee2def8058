"""Weights on disk and on the hub: round trips, formats, every difference named, nothing
half written, no code run."""

import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
import warnings

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import attn_notes as an
from attn_notes.zoo import checkpoints, hub
from attn_notes.zoo.checkpoints import fit_state
from attn_notes.zoo.files import atomic_folder, read_state_dict
from attn_notes.zoo.formats import CheckpointFormat, matches
from attn_notes.zoo.hub import save_weights
from attn_notes.zoo.registry import register_models

KINDS = (".safetensors", ".bin", ".pt", ".pth", ".npz")


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def write(state, path):
    if path.suffix == ".safetensors":
        save_file({key: value.clone() for key, value in state.items()}, path)
    elif path.suffix == ".npz":
        numpy.savez(path, **{key: value.numpy() for key, value in state.items()})
    else:
        torch.save(dict(state), path)
    return path


@pytest.fixture
def saved(toy, tmp_path):
    model = an.create_model("toy", vocab_size=13)
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


# what loads


def test_round_trip_keeps_weights_sizes_and_ties(saved):
    model, folder = saved
    again = an.create_model("toy", pretrained=folder)
    assert same(model, again) and not again.training
    assert again.config == model.config and again.config.widths == (4, 5)
    assert again.output.weight is again.embedding.weight
    assert same(type(model).from_pretrained(folder), model)
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert 'create_model("toy"' in (folder / "README.md").read_text()


def test_a_second_save_replaces_the_first_and_leaves_other_files(saved):
    model, folder = saved
    (folder / "task.json").write_text("{}")
    torch.nn.init.zeros_(model.head.weight)
    model.save_pretrained(folder)
    assert (
        same(an.create_model("toy", pretrained=str(folder)), model)
        and (folder / "task.json").read_text() == "{}"
    )
    assert [p.name for p in folder.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize("kind", KINDS)
def test_single_files_of_every_kind_load(saved, kind, tmp_path):
    model, _ = saved
    path = write(model.state_dict(), tmp_path / f"weights{kind}")
    assert same(an.create_model("toy", pretrained=path, vocab_size=13), model)


@pytest.mark.parametrize(
    "wrapper", ["state_dict", "model", "model_state_dict", "model_ema"]
)
def test_weights_inside_a_training_checkpoint_load(saved, wrapper, tmp_path):
    model, _ = saved
    torch.save({wrapper: model.state_dict(), "epoch": 3}, tmp_path / "run.pth")
    assert same(
        an.create_model("toy", pretrained=tmp_path / "run.pth", vocab_size=13), model
    )


def test_half_precision_files_fill_float_models_and_dtype_wins(saved, tmp_path):
    model, _ = saved
    model.half().save_pretrained(tmp_path / "half")
    again = an.create_model("toy", pretrained=tmp_path / "half")
    assert again.head.weight.dtype == torch.float32 and torch.equal(
        again.head.weight, model.head.weight.float()
    )
    assert (
        an.create_model(
            "toy", pretrained=tmp_path / "half", dtype=torch.float64
        ).scale.dtype
        == torch.float64
    )


def test_the_folder_wins_over_the_name_and_overrides_win_over_both(saved):
    _, folder = saved
    assert an.create_model("toy", pretrained=folder).config.vocab_size == 13
    with pytest.warns(
        an.CheckpointWarning, match="re-initialized.*head.weight, head.bias"
    ):
        model = an.create_model("toy", pretrained=folder, num_classes=9)
    assert model.head.out_features == 9
    assert model.not_loaded == ("head.weight", "head.bias")
    assert an.create_model("toy", pretrained=folder).not_loaded == ()
    with pytest.raises(
        an.CheckpointError, match="misshapen: embedding.weight .13, 6. for .14, 6."
    ):
        an.create_model("toy", pretrained=folder, vocab_size=14)


def test_fields_that_others_keep_in_config_json_are_left_aside(saved):
    model, folder = saved
    config = json.loads((folder / "config.json").read_text()) | {
        "torch_dtype": "float16",
        "transformers_version": "5.0",
    }
    config.pop("architecture")
    (folder / "config.json").write_text(json.dumps(config))
    assert same(an.create_model("toy", pretrained=folder), model)


@pytest.fixture
def theirs(toy):
    """A model, and its weights as the format `elsewhere` has them."""
    model = an.create_model("toy")
    own = model.state_dict()
    return model, {
        "emb.w": own["embedding.weight"],
        "fc.weight": own["head.weight"],
        "fc.bias": own["head.bias"],
        "scale": own["scale"],
    }


def test_another_format_is_recognized_from_its_keys(theirs, tmp_path):
    model, state = theirs
    state["emb.position_ids"] = torch.arange(7)  # ignored
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(
            an.create_model("toy", pretrained=write(state, tmp_path / "theirs.pt")),
            model,
        )
    state["pooler.weight"] = torch.ones(2, 2)
    with pytest.warns(
        an.CheckpointWarning, match="skipped, not in this model: pooler.weight"
    ):
        assert same(
            an.create_model("toy", pretrained=write(state, tmp_path / "more.npz")),
            model,
        )
    state["other.weight"] = torch.ones(2, 2)
    path = write(state, tmp_path / "most.pt")
    refuses("elsewhere format.*1 unexpected: other.weight", "toy", pretrained=path)


def foreign_folder(folder, config, shards, index=None):
    """A folder as a library of others writes it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name, state in shards.items():
        write(state, folder / name)
    if index:
        where = {key: name for name, state in shards.items() for key in state}
        whole = {"metadata": {"total_size": 1}, "weight_map": where}
        (folder / index).write_text(json.dumps(whole))
    return folder


def test_the_fields_of_a_foreign_configuration_are_translated(toy, tmp_path):
    model = an.create_model("toy", hidden_size=8, num_classes=2)
    own = model.state_dict()
    state = {
        "emb.w": own["embedding.weight"],
        "fc.weight": own["head.weight"],
        "fc.bias": own["head.bias"],
        "scale": own["scale"],
    }
    config = {"n_embd": 8, "id2label": {"0": "no", "1": "yes"}, "n_layer": 12}
    weights = {"pytorch_model.bin": state}
    folder = foreign_folder(tmp_path / "theirs", config, weights)
    again = an.create_model("toy", pretrained=folder)
    assert same(again, model) and again.config == model.config
    with pytest.warns(an.CheckpointWarning, match="re-initialized"):
        an.create_model("toy", pretrained=folder, num_classes=4)
    (folder / "config.json").write_text("{}")
    refuses("lacks a field of the elsewhere format: 'n_embd'", "toy", pretrained=folder)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_sharded_checkpoints_load(theirs, tmp_path, kind):
    model, state = theirs
    stem, ending = kind.split(".")
    keys = list(state)
    shards = {
        f"{stem}-00001-of-00002.{ending}": {k: state[k] for k in keys[:2]},
        f"{stem}-00002-of-00002.{ending}": {k: state[k] for k in keys[2:]},
    }
    folder = foreign_folder(
        tmp_path / "shards", {"n_embd": 6}, shards, index=f"{kind}.index.json"
    )
    assert same(an.create_model("toy", pretrained=folder), model)
    index = folder / f"{kind}.index.json"
    assert same(an.create_model("toy", pretrained=index), model)
    whole = json.loads(index.read_text())
    for where, said in (
        ({"emb.w": f"{stem}-00002-of-00002.{ending}"}, "lacks emb.w"),
        ({"emb.w": f"none.{ending}"}, f"no checkpoint file at .*none.{ending}"),
        ({"emb.w": f"../{kind}"}, "expected shards beside it"),
        ({"emb.w": "config.json"}, "expected shards beside it"),
        (["emb.w"], "cut short or no index"),
    ):
        index.write_text(json.dumps({**whole, "weight_map": where}))
        refuses(said, "toy", pretrained=folder)
    index.write_text("{")
    refuses("cut short or no index", "toy", pretrained=index)


def test_one_file_goes_before_its_shards_and_safetensors_before_pickles(saved):
    model, folder = saved
    for name in ("model.safetensors.index.json", "pytorch_model.bin"):
        (folder / name).write_text("{")
    assert same(an.create_model("toy", pretrained=folder), model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_weights_load(theirs, tmp_path, prefix):
    model, state = theirs
    wrapped = {prefix + key: value for key, value in state.items()}
    path = write(wrapped, tmp_path / "wrapped.pth")
    assert same(an.create_model("toy", pretrained=path), model)
    fit_state(model, {prefix + k: v for k, v in model.state_dict().items()})


def test_the_average_of_a_training_checkpoint_is_preferred(saved, tmp_path):
    model, _ = saved
    last = {key: value + 1 for key, value in model.state_dict().items()}
    content = {
        "model": last,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": 299,
        "args": argparse.Namespace(lr=5e-4, output="runs", mixup=None),
    }
    path = tmp_path / "checkpoint.pth"
    torch.save({**content, "model_ema": model.state_dict()}, path)
    assert same(an.create_model("toy", pretrained=path, vocab_size=13), model)
    torch.save({**content, "model_ema": None}, path)  # kept none
    found = an.create_model("toy", pretrained=path, vocab_size=13)
    assert torch.equal(found.head.bias, last["head.bias"])
    nested = {"state_dict": {"model": model.state_dict()}}
    torch.save(nested, path)
    assert same(an.create_model("toy", pretrained=path, vocab_size=13), model)


def test_keys_that_a_format_never_holds_are_left_as_they_were(toy, recwarn):
    bare = CheckpointFormat(
        "bare",
        recognize=lambda keys: "head.bias" in keys,
        absent=("embedding.*", "output.*"),
    )
    model, given = (
        an.create_model("toy"),
        {
            "head.weight": torch.ones(3, 6),
            "head.bias": torch.ones(3),
            "scale": torch.ones(1),
        },
    )
    before = model.embedding.weight.clone()
    left = fit_state(model, given, (bare,))
    assert left == ("embedding.weight", "output.weight")
    assert [str(w.message) for w in recwarn] == [
        "checkpoint: not in this format, left as they were: "
        "embedding.weight, output.weight"
    ]
    assert (
        torch.equal(model.embedding.weight, before)
        and (model.head.weight == 1).all()
        and model.scale == 1
    )
    with pytest.raises(an.CheckpointError, match="1 missing: scale"):
        fit_state(
            model,
            {key: value for key, value in given.items() if key != "scale"},
            (bare,),
        )
    fit_state(
        model, {**given, "embedding.weight": torch.zeros(11, 6)}, (bare,)
    )  # held after all
    assert not model.output.weight.any() and len(recwarn) == 1
    with pytest.raises(an.CheckpointError, match="missing: embedding.weight"):
        fit_state(model, given)


def test_the_meta_device_compares_without_loading(saved):
    _, folder = saved
    assert an.create_model("toy", pretrained=folder, device="meta").head.weight.is_meta
    with pytest.raises(an.CheckpointError):
        an.create_model("toy", pretrained=folder, device="meta", hidden_size=7)


def test_a_hub_model_loads_from_what_the_hub_gives(saved, monkeypatch):
    import huggingface_hub

    model, folder = saved
    (folder / "code.py").write_text("")
    asked = []

    def snapshot(repo, revision, allow_patterns):
        files = [p.name for p in folder.iterdir() if matches(p.name, allow_patterns)]
        asked.append((repo, revision, sorted(files)))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    files = ["config.json", "model.safetensors"]
    assert same(an.create_model("toy", pretrained="somebody/toy-13"), model)
    assert asked.pop() == ("somebody/toy-13", None, files) and not asked
    an.create_model("toy", pretrained="somebody/toy-13", revision="v2")
    assert asked.pop() == ("somebody/toy-13", "v2", files) and not asked
    assert same(type(model).from_pretrained("somebody/toy", revision="v3"), model)
    assert asked.pop() == ("somebody/toy", "v3", files) and not asked


def test_pickles_are_downloaded_only_where_the_hub_has_nothing_else(
    saved, monkeypatch, tmp_path
):
    import huggingface_hub

    model, folder = saved
    remote, local, asked = {}, tmp_path / "cache", []
    local.mkdir()

    def snapshot(repo, revision, allow_patterns):
        asked.append(allow_patterns)
        for name, content in remote.items():
            if matches(name, allow_patterns):
                (local / name).write_bytes(content)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    remote["config.json"] = (folder / "config.json").read_bytes()
    remote["source.spm"] = b"pieces"
    path = write(model.state_dict(), tmp_path / "weights.bin")
    remote["pytorch_model.bin"] = path.read_bytes()
    assert same(an.create_model("toy", pretrained="somebody/old"), model)
    assert len(asked) == 2 and (local / "source.spm").is_file()
    remote["model.safetensors"] = (folder / "model.safetensors").read_bytes()
    (local / "pytorch_model.bin").unlink()
    assert same(an.create_model("toy", pretrained="somebody/new"), model)
    assert len(asked) == 3 and not (local / "pytorch_model.bin").exists()
    for name in ("config.json", "model.safetensors"):
        (local / name).unlink()
    remote.clear()
    refuses("holds no config.json", "toy", pretrained="somebody/empty")


@pytest.mark.no_shapes
def test_only_the_hub_has_revisions(saved, tmp_path):
    with pytest.raises(an.ConfigError, match="revision: expected with a hub id alone"):
        an.create_model("toy", pretrained=saved[1], revision="main")
    for nothing in (None, True):
        with pytest.raises(an.ConfigError, match="revision: expected with a hub id"):
            an.create_model("toy", nothing, revision="main")
    refuses(
        "no model that the hub gave at revision 'v9'",
        "toy",
        pretrained="nobody/nothing",
        revision="v9",
    )


def test_pushing_uploads_what_saving_writes(saved, monkeypatch):
    from huggingface_hub import HfApi

    seen = {}

    def upload(self, repo_id, folder_path, **more):
        seen[repo_id] = sorted(p.name for p in folder_path.iterdir())

    monkeypatch.setattr(
        HfApi,
        "create_repo",
        lambda self, repo_id, **more: type("Repo", (), {"repo_id": repo_id}),
    )
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    saved[0].push_to_hub("somebody/toy")
    assert seen == {"somebody/toy": ["README.md", "config.json", "model.safetensors"]}


def test_shipped_weights(saved, monkeypatch):
    model, folder = saved
    monkeypatch.setattr(
        checkpoints,
        "weights_folder",
        lambda name: folder if name == "toy" else folder / name,
    )
    assert same(an.create_model("toy", pretrained=True), model)
    with pytest.raises(
        an.CheckpointError, match="ships no weights for toy_wide; it does for toy"
    ):
        an.create_model("toy_wide", pretrained=True)


# what does not


def refuses(match, *args, **kwargs):
    with pytest.raises(an.CheckpointError, match=match) as caught:
        an.create_model(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.0, 0.03, 0.5, 0.98])
def test_truncated_files(saved, kind, part, tmp_path):
    whole = write(saved[0].state_dict(), tmp_path / f"whole{kind}").read_bytes()
    cut = tmp_path / f"cut{kind}"
    cut.write_bytes(whole[: int(part * len(whole))])
    refuses("cut short or not a", "toy", pretrained=cut, vocab_size=13)


class Mischief:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", [".pt", ".bin", ".pth", ".npz"])
def test_pickles_with_code_are_not_run(toy, kind, tmp_path):
    path, owned = tmp_path / f"evil{kind}", tmp_path / "owned"
    if kind == ".npz":
        numpy.savez(path, weight=numpy.array([Mischief(owned)], dtype=object))
    else:
        torch.save({"weight": torch.ones(2), "more": Mischief(owned)}, path)
    refuses("could run code", "toy", pretrained=path)
    assert not owned.exists()


def test_a_whole_pickled_model_is_refused(saved, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    refuses("could run code", "toy", pretrained=tmp_path / "model.pt")


def test_every_missing_unexpected_and_misshapen_key_is_listed(saved, tmp_path):
    state = dict(saved[0].state_dict())
    state.pop("scale")
    state |= {"extra.weight": torch.ones(1), "head.weight": torch.ones(3, 9)}
    path = write(state, tmp_path / "wrong.pt")
    model = an.create_model("toy", vocab_size=13)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(an.CheckpointError) as caught:
        fit_state(model, read_state_dict(path))
    for said in (
        "1 missing: scale",
        "1 unexpected: extra.weight",
        "1 misshapen: head.weight (3, 9) for (3, 6)",
    ):
        assert said in str(caught.value)
    assert all(
        torch.equal(before[key], value) for key, value in model.state_dict().items()
    )


def test_shared_weights_that_disagree_are_refused(saved, tmp_path):
    state = dict(saved[0].state_dict())
    state["output.weight"] = state["output.weight"] + 1
    refuses(
        "one tensor in this model and two in the file",
        "toy",
        pretrained=write(state, tmp_path / "untied.pt"),
        vocab_size=13,
    )


def test_a_format_may_take_another_models_weights(saved, toy):
    """Of those it recognizes; other_toy keeps a fresh head."""
    other_head = CheckpointFormat(
        "another head",
        lambda keys: {"embedding.weight", "head.weight"} <= keys,
        convert=lambda state, model: {
            key: value for key, value in state.items() if "head" not in key
        },
        absent=("head.*",),
    )
    info = an.model_info("other_toy")
    common = {k: getattr(info, k) for k in ("paper", "year", "chapter", "task")}
    row = {"config": info.config, "parameters": 87, "formats": (other_head,)}
    register_models(info.model, {"other_toy": row}, **common)
    with pytest.warns(an.CheckpointWarning, match="left as they were: head.weight"):
        model = an.create_model("other_toy", pretrained=saved[1])
    assert torch.equal(model.embedding.weight, saved[0].embedding.weight)
    assert model.not_loaded == ("head.weight", "head.bias")


def test_another_models_checkpoint(saved, toy, tmp_path):
    refuses("holds a toy, not a other_toy", "other_toy", pretrained=saved[1])
    lstm = write(torch.nn.LSTM(3, 4).state_dict(), tmp_path / "lstm.safetensors")
    refuses("5 missing: .*4 unexpected: bias_hh_l0", "toy", pretrained=lstm)
    with pytest.raises(
        an.CheckpointError,
        match="expected a folder saved from a OtherToy; got 'toy'",
    ):
        an.model_info("other_toy").model.from_pretrained(saved[1])


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "content", ["{", "[]", '{"hidden_size": 0}', '{"hidden_size": "six"}']
)
def test_a_bad_config_json(saved, content):
    (saved[1] / "config.json").write_text(content)
    refuses("config.json", "toy", pretrained=saved[1])


def test_a_folder_without_its_files(saved):
    _, folder = saved
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    refuses("holds no model.safetensors or pytorch_model.bin", "toy", pretrained=folder)
    (folder / "config.json").unlink()
    refuses("holds no config.json", "toy", pretrained=folder)


@pytest.mark.no_shapes
def test_what_is_not_there(toy, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "number.pt")
    torch.save({}, tmp_path / "empty.pt")
    refuses("no checkpoint file or folder at", "toy", pretrained=tmp_path / "none")
    refuses("no checkpoint file or folder at", "toy", pretrained="none.safetensors")
    refuses("no model that the hub gave", "toy", pretrained="nobody/nothing")
    refuses("expected a file ending in", "toy", pretrained=tmp_path / "notes.txt")
    for name in ("list.pt", "number.pt", "empty.pt"):
        refuses("expected named tensors", "toy", pretrained=tmp_path / name)
    refuses("ships no weights for toy", "toy", pretrained=True)
    with pytest.raises(an.ConfigError, match="pretrained: expected True"):
        an.create_model("toy", pretrained=7)
    with pytest.raises(an.CheckpointError, match="meta device"):
        save_weights(an.create_model("toy", device="meta"), tmp_path / "x.safetensors")


# nothing half written


def test_an_exception_while_writing_leaves_the_folder_as_it_was(saved, monkeypatch):
    model, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(
        hub, "save_weights", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and len(
        list(folder.parent.iterdir())
    ) == 1


@given(st.binary(max_size=300))
def test_no_bytes_read_as_a_checkpoint_crash(junk):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            path = Path(folder) / f"junk{kind}"
            path.write_bytes(junk)
            with pytest.raises(an.CheckpointError):
                read_state_dict(path)


@pytest.mark.slow
def test_a_kill_while_writing_leaves_the_folder_as_it_was(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    program = textwrap.dedent(f"""
        import time
        from attn_notes.zoo.files import atomic_folder
        with atomic_folder({str(tmp_path / "out")!r}) as part:
            (part / "a").write_text("new")
            print("writing", flush=True)
            time.sleep(60)""")
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [p for p in (tmp_path / "out").iterdir() if p.is_file()]
    assert [(p.name, p.read_text()) for p in left] == [("a", "old")]
    with atomic_folder(tmp_path / "out") as part:
        (part / "a").write_text("new")
    assert (tmp_path / "out" / "a").read_text() == "new"


class Named(torch.nn.Module, hub.PretrainedMixin):
    """A module of the model has the name under which others list its keys."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_classes)


def test_a_module_named_classifier_needs_only_its_registration(toy, tmp_path):
    register_models(
        Named,
        {"named": {"config": toy.config_class(), "parameters": 21}},
        paper="nobody",
        year=2026,
        chapter="none",
        task="image_classification",
        classifier=("classifier.*",),
    )
    model = an.create_model("named", num_classes=4)
    assert model.classifier.out_features == 4
    model.save_pretrained(tmp_path / "named")
    with pytest.warns(an.CheckpointWarning, match="re-initialized.*classifier.weight"):
        an.create_model("named", tmp_path / "named", num_classes=2)


# what can not be copied


def _quantized(x):
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


ODD_TENSORS = {
    "int8": lambda x: x.to(torch.int8),
    "bool": lambda x: x > 0,
    "complex64": lambda x: x.to(torch.complex64),
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.to_sparse_csr(),
    "quantized": _quantized,
    "meta": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged),
    "float4_e2m1fn_x2": lambda x: torch.zeros(x.shape, dtype=torch.uint8).view(
        torch.float4_e2m1fn_x2
    ),
}


@pytest.mark.no_shapes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_weights_that_are_no_plain_numbers_are_refused_and_nothing_changes(kind, toy):
    model, other = an.create_model("toy"), an.create_model("toy").state_dict()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = {**other, "head.weight": ODD_TENSORS[kind](other["head.weight"])}
    with pytest.raises(an.CheckpointError, match="head.weight") as caught:
        fit_state(model, other, source="the file")
    assert kind in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.no_shapes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["int8", "sparse_coo", "quantized", "meta"])
def test_so_are_those_of_a_file(kind, toy, tmp_path):
    state = an.create_model("toy").state_dict()
    state["output.weight"] = ODD_TENSORS[kind](state["output.weight"])
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(an.CheckpointError, match=r"odd.pt.*output.weight"):
        an.create_model("toy", pretrained=tmp_path / "odd.pt")


@pytest.mark.no_shapes
def test_a_model_that_can_not_be_written_stays_as_it_was(toy):
    with torch.inference_mode():
        frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    model, other = an.create_model("toy"), an.create_model("toy").state_dict()
    model.head.bias = frozen
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(an.CheckpointError, match="head.bias"):
        fit_state(model, other)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.no_shapes
@pytest.mark.parametrize("nothing", ["", False, None])
def test_an_empty_pretrained_is_nothing(nothing, toy, saved, monkeypatch):
    monkeypatch.chdir(saved[1])  # a folder with a model in it
    if nothing == "":
        for call in (
            lambda: an.create_model("toy", ""),
            lambda: toy.from_pretrained(""),
        ):
            with pytest.raises(an.ConfigError, match="expected .*; got ''"):
                call()
    else:
        assert an.create_model("toy", nothing).training
    assert an.create_model("toy", ".").config.vocab_size == 13


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "given", [[1], None, {3: torch.ones(1)}, {"a\nb" * 99: torch.ones(1).to_sparse()}]
)
def test_what_is_no_state_is_refused_in_one_line(given, toy):
    with pytest.raises(an.CheckpointError, match="expected (tensors|plain)") as caught:
        fit_state(an.create_model("toy"), given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    ("kind", "own"), [(torch.float32, torch.float16), (torch.float64, torch.float32)]
)
def test_no_finite_weight_becomes_infinite(kind, own, toy):
    model = an.create_model("toy", dtype=own)
    state = {key: value.to(kind) for key, value in model.state_dict().items()}
    key = list(state)[-1]
    state[key] = torch.full_like(state[key], 2.0 * torch.finfo(own).max)
    before = copy.deepcopy(model)
    with pytest.raises(an.CheckpointError, match="beyond the numbers of the model's"):
        fit_state(model, state)
    assert same(model, before)
    state[key] = torch.full_like(state[key], torch.inf)  # as it stands in the file
    fit_state(model, state)
