"""Conversions of state dicts: each does what it says, changes nothing it was given, and
refuses what it cannot do by name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import attn_notes as an
from attn_notes.zoo.formats import (
    NATIVE,
    CheckpointFormat,
    concat,
    find_format,
    list_keys,
    rename,
    resize_positions,
    shared_names,
    split,
    strip_prefix,
    strip_wrappers,
    transpose,
)

QKV = {
    r"layers.\1.in_proj.\2": [
        rf"h\.(\d+)\.{part}\.(weight|bias)" for part in ("query", "key", "value")
    ]
}
APART = {
    r"layers\.(\d+)\.in_proj\.(weight|bias)": [
        rf"h.\1.{part}.\2" for part in ("query", "key", "value")
    ]
}


def layers(n=2):
    torch.manual_seed(0)
    state = {"emb": torch.randn(5, 3)}
    for i in range(n):
        for part in ("value", "query", "key"):  # not in the order of the rule
            state[f"h.{i}.{part}.weight"] = torch.randn(3, 3)
            state[f"h.{i}.{part}.bias"] = torch.randn(3)
    return state


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_rules_are_applied_in_order():
    state = {"a.x": torch.ones(1), "b.x": torch.zeros(1)}
    renamed = rename(state, [("^a", "c"), ("^c", "d"), (r"\.x$", ".y")])
    assert equal(renamed, {"d.y": torch.ones(1), "b.y": torch.zeros(1)})
    assert list(state) == ["a.x", "b.x"]
    with pytest.raises(an.CheckpointError, match="two keys of the file become 'c'"):
        rename(state, [("^.*$", "c")])


def test_a_prefix_goes_where_it_stands():
    state = {"bert.a": torch.ones(1), "head.bert.b": torch.ones(1)}
    assert list(strip_prefix(state, "bert.")) == ["a", "head.bert.b"]
    assert list(strip_prefix(state, "b.rt.")) == list(state)  # no regular expression


def test_one_rule_joins_the_parts_of_every_layer():
    state = layers()
    joined = concat(state, QKV)
    assert set(joined) == {"emb"} | {
        f"layers.{i}.in_proj.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    }
    weight = joined["layers.1.in_proj.weight"]
    for place, part in enumerate(("query", "key", "value")):
        rows = slice(3 * place, 3 * place + 3)
        assert torch.equal(weight[rows], state[f"h.1.{part}.weight"])
    assert joined["layers.0.in_proj.bias"].shape == (9,) and len(state) == 13
    assert equal(split(joined, APART), state)


def test_another_dimension():
    state = {"a": torch.randn(2, 3), "b": torch.randn(2, 4)}
    assert torch.equal(
        concat(state, {"c": ["a", "b"]}, dim=1)["c"],
        torch.cat([state["a"], state["b"]], 1),
    )
    cut = split({"c": torch.arange(6.0).view(2, 3)}, {"c": ["x", "y", "z"]}, dim=1)
    assert cut["y"].tolist() == [[1], [4]]


def test_parts_that_are_missing_or_unequal_are_named():
    state = layers()
    del state["h.1.key.bias"]
    with pytest.raises(an.CheckpointError, match="3 parts.*h.1.value.bias") as caught:
        concat(state, QKV)
    assert "h.0" not in str(caught.value)
    with pytest.raises(an.CheckpointError, match=r"q: expected 3 equal.*\(4, 2\)"):
        split({"q": torch.ones(4, 2)}, {"q": ["a", "b", "c"]})
    with pytest.raises(an.CheckpointError, match="q: expected 2 equal parts along"):
        split({"q": torch.ones(4)}, {"q": ["a", "b"]}, dim=1)
    assert concat({"x": torch.ones(1)}, QKV).keys() == {"x"}  # nothing to do


@pytest.mark.parametrize(
    "work",
    [
        lambda one, two: split({"a": two}, {"a": ["x", "x"]}),
        lambda one, two: split({"a": two, "x": one}, {"a": ["x", "y"]}),
        lambda one, two: concat({"a": one, "b": one, "n": two}, {"n": ["a", "b"]}),
    ],
)
def test_no_tensor_is_lost_behind_another_of_its_name(work):
    with pytest.raises(an.CheckpointError, match="two tensors of the file become"):
        work(torch.ones(1), torch.ones(2))


@pytest.mark.no_shapes
@pytest.mark.parametrize(("shape", "prefix"), [((4, 2), 4), ((4, 2), -1), ((4,), 0)])
def test_a_table_without_positions(shape, prefix):
    with pytest.raises(an.CheckpointError, match="positions: expected a table"):
        resize_positions(torch.ones(shape), 3, prefix)


def test_keys_are_listed_in_one_line():
    assert "\n" not in list_keys(["a\nb"]) and len(list_keys(["k" * 10**6])) < 200


def test_matrices_are_transposed_by_pattern():
    state = {"h.0.c_fc.weight": torch.randn(2, 3), "h.0.c_fc.bias": torch.randn(3)}
    turned = transpose(state, ["*.c_fc.weight"])
    assert torch.equal(turned["h.0.c_fc.weight"], state["h.0.c_fc.weight"].T)
    assert turned["h.0.c_fc.weight"].is_contiguous()
    assert turned["h.0.c_fc.bias"] is state["h.0.c_fc.bias"]
    with pytest.raises(an.CheckpointError, match="c_fc.bias: expected a matrix"):
        transpose(state, ["*.c_fc.*"])


@given(st.integers(2, 9), st.integers(1, 12))
def test_positions_in_a_row_keep_their_ends_and_straight_lines(old, new):
    table = torch.stack([torch.linspace(0, 1, old), torch.linspace(5, -5, old)], 1)
    found = resize_positions(table, new)
    assert found.shape == (new, 2)
    if new > 1:
        expected = torch.linspace(0, 1, new), torch.linspace(5, -5, new)
        assert torch.allclose(found, torch.stack(expected, 1), atol=1e-5)
    assert resize_positions(table, old) is table


def test_positions_on_a_grid_are_those_of_timm():
    timm = pytest.importorskip("timm.layers")
    table = torch.randn(1 + 14 * 14, 6)
    found = resize_positions(table, (7, 20), num_prefix_tokens=1)
    expected = timm.resample_abs_pos_embed(table[None], [7, 20], num_prefix_tokens=1)
    assert torch.allclose(found, expected[0], atol=1e-5)
    assert torch.equal(found[0], table[0])
    assert resize_positions(table, (14, 14), 1) is table
    half = resize_positions(table.half(), (7, 7), 1)
    assert half.dtype == torch.float16 and half.shape == (50, 6)
    with pytest.raises(an.CheckpointError, match="square grid of them; got 197"):
        resize_positions(table, (7, 7))


def test_what_training_scripts_wrap_goes():
    bare = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    keys = list(bare.state_dict())
    whole = torch.compile(bare).state_dict()
    assert list(strip_wrappers(whole)) == keys and list(whole) != keys
    inner = nn.Sequential(torch.compile(bare[0]), bare[1])
    for wrapped in (
        inner.state_dict(),
        {f"module.{k}": v for k, v in inner.state_dict().items()},
        {f"module.module.{k}": v for k, v in bare.state_dict().items()},
        torch.optim.swa_utils.AveragedModel(torch.compile(bare)).state_dict(),
    ):
        assert list(strip_wrappers(wrapped)) == keys
    own = {"module.a": torch.ones(1), "other.b": torch.ones(1)}
    assert equal(strip_wrappers(own), own)  # a part of the model that has this name
    assert strip_wrappers({}) == {}


def test_ignored_keys_go_before_the_conversion_sees_them():
    seen = []

    def convert(state, model):
        seen.append((list(state), model))
        return rename(state, [("^", "x.")])

    fmt = CheckpointFormat("f", lambda keys: True, convert, ignore=("*.index",))
    model = nn.Identity()
    state = {"a.index": torch.ones(1), "b": torch.ones(1)}
    assert list(fmt.apply(state, model)) == ["x.b"]
    assert seen == [(["b"], model)] and list(state) == ["a.index", "b"]
    plain = CheckpointFormat("p", lambda keys: True, ignore=("b",))
    assert list(plain.apply(state, model)) == ["a.index"]


@pytest.mark.parametrize(
    "convert",
    [
        lambda state, model: {"a": state["none"]},
        lambda state, model: {"a": torch.cat([state["a"], state["b"]])},
        lambda state, model: {"a": model.config.size},
        lambda state, model: None,
        lambda state, model: {"a": 1.0},
        lambda state, model: int("x"),
        lambda state, model: rename(state, [("(", "x")]),
        lambda state, model: next(iter([])),
    ],
    ids="key shape config none numbers value pattern stop".split(),
)
def test_a_conversion_that_fails_is_an_error_of_the_checkpoint(convert):
    fmt = CheckpointFormat("theirs", lambda keys: True, convert)
    state = {"a": torch.ones(1, 2), "b": torch.ones(1, 3)}
    with pytest.raises(an.CheckpointError, match="theirs format.*could not be convert"):
        fmt.apply(state, nn.Identity())


def test_the_first_format_that_recognizes_the_keys_counts():
    formats = [
        CheckpointFormat(name, lambda keys, part=part: part in keys)
        for name, part in (("one", "a"), ("two", "b"), ("three", "b"))
    ]
    state = {"b": torch.ones(1)}
    assert find_format(state, formats).name == "two"
    assert find_format({"c": torch.ones(1)}, formats) is NATIVE
    assert NATIVE.apply(state, nn.Identity()) == state


def test_shared_names_are_grouped():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    assert shared_names(model) == [["a.weight", "b.weight"], ["a.bias"], ["b.bias"]]
