"""The checks: what passes, what is refused, and with which words."""

import pytest
import torch
from torch import Tensor

from attn_notes.foundations.checks import (
    CheckpointError,
    ConfigError,
    InputError,
    Output,
    check_choice,
    check_divides,
    check_features,
    check_id_values,
    check_ids,
    check_mask_rows,
    check_mask_shape,
    check_positive,
    check_probability,
    require_package,
    unknown_name_error,
)


class Pair(Output):
    first: Tensor
    second: Tensor | None = None


def test_all_errors_are_value_errors():
    assert all(
        issubclass(error, ValueError)
        for error in (ConfigError, InputError, CheckpointError)
    )


def test_good_input_passes():
    ids = torch.tensor([[1, 2], [3, 0]])
    check_ids(ids)
    check_ids(ids.to(torch.int32))
    check_features(torch.rand(2, 3, 8, dtype=torch.bfloat16), 8, "x")
    check_mask_shape(ids != 0, (2, 2), "mask")
    check_divides(8, 512)
    check_positive(hidden_size=1)
    check_probability(dropout=0)
    check_choice(("relu", "gelu"), activation="gelu")
    check_id_values(ids, 4)
    check_mask_rows(ids != 0)


def test_form_is_checked_without_data():
    "On the meta device there is no data to read."
    check_ids(torch.empty(2, 3, dtype=torch.long, device="meta"))
    check_features(torch.empty(2, 3, 4, device="meta"), 4)
    check_mask_shape(torch.empty(2, 3, dtype=torch.bool, device="meta"), (2, 3))


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([1, 2]),
        torch.ones(2, 3),
        torch.ones(2, 3, dtype=torch.bool),
        torch.ones(2, 3, dtype=torch.complex64),
        torch.empty(0, 3, dtype=torch.long),
        torch.empty(3, 0, dtype=torch.long),
        [[1, 2]],
    ],
)
def test_bad_ids(ids):
    with pytest.raises(InputError, match="^decoder_input_ids: expected .*; got "):
        check_ids(ids, "decoder_input_ids")


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "x",
    [
        torch.rand(2, 8),
        torch.rand(2, 3, 7),
        torch.ones(2, 3, 8, dtype=torch.long),
        torch.empty(0, 3, 8),
        torch.empty(2, 0, 8),
        None,
    ],
)
def test_bad_features(x):
    with pytest.raises(InputError, match="^memory: expected .*; got "):
        check_features(x, 8, "memory")


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 3),
        torch.ones(2, 3, dtype=torch.long),
        torch.ones(2, 4, dtype=torch.bool),
        torch.ones(3, dtype=torch.bool),
        None,
    ],
)
def test_bad_mask(mask):
    with pytest.raises(
        InputError,
        match=r"^attention_mask: expected a boolean mask of shape \(2, 3\), "
        "True where allowed; got ",
    ):
        check_mask_shape(mask, (2, 3), "attention_mask")


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: check_divides(7, 512),
            "num_attention_heads: expected a divisor of hidden_size; got 7 and 512",
        ),
        (
            lambda: check_divides(0, 512),
            "num_attention_heads: expected a whole number of at least 1; got 0",
        ),
        (
            lambda: check_divides(4, 6, "groups", "channels"),
            "groups: expected a divisor of channels; got 4 and 6",
        ),
        (
            lambda: check_positive(hidden_size=-1),
            "hidden_size: expected a whole number of at least 1; got -1",
        ),
        (lambda: check_positive(hidden_size=1.5), "got 1.5"),
        (lambda: check_positive(hidden_size=True), "got True"),
        (lambda: check_positive(hidden_size=None), "got None"),
        (
            lambda: check_probability(dropout=1),
            "dropout: expected a number from 0 to below 1; got 1",
        ),
        (lambda: check_probability(dropout=-0.1), "got -0.1"),
        (lambda: check_probability(dropout=float("nan")), "got nan"),
        (lambda: check_probability(dropout="0.1"), "got '0.1'"),
        (
            lambda: check_choice(("relu", "gelu"), activation="swish"),
            "activation: expected one of relu, gelu; got 'swish'",
        ),
    ],
)
def test_bad_configuration(call, words):
    with pytest.raises(ConfigError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("ids, came", [([[0, 9]], 9), ([[-1, 2]], -1)])
def test_bad_values(ids, came):
    with pytest.raises(
        InputError, match=rf"^input_ids: expected ids from 0 to 8; got {came}$"
    ):
        check_id_values(torch.tensor(ids), 9)


def test_mask_that_hides_a_row():
    with pytest.raises(InputError, match="row 1 hides everything"):
        check_mask_rows(torch.tensor([[True, False], [False, False]]))
    with pytest.raises(InputError, match=r"row \(1, 0\) hides everything"):
        check_mask_rows(torch.tensor([[[True], [True]], [[False], [True]]]))


def test_output_by_attribute_and_key():
    pair = Pair(first=torch.ones(2))
    assert (
        pair["first"] is pair.first
        and list(pair) == ["first"]
        and len(pair) == 1
        and dict(pair)["first"] is pair.first
    )
    assert list(Pair(torch.ones(1), torch.zeros(1))) == ["first", "second"]
    for key in ("second", "third"):
        with pytest.raises(KeyError, match="expected one of first"):
            pair[key]


def test_output_passes_through_compile_and_export():
    class Doubling(torch.nn.Module):
        def forward(self, x):
            return Pair(first=2 * x)

    x = torch.arange(3.0)
    exported = torch.export.export(Doubling(), (x,)).module()(x)
    compiled = torch.compile(Doubling(), backend="eager", fullgraph=True)(x)
    for output in (exported, compiled):
        assert (
            isinstance(output, Pair)
            and torch.equal(output.first, 2 * x)
            and output.second is None
        )


@pytest.mark.parametrize(
    "given, words",
    [
        ("gelo", "unknown activation 'gelo'; did you mean 'gelu'?"),
        ("xyz", "unknown activation 'xyz'; there are: gelu, relu"),
    ],
)
def test_unknown_names(given, words):
    error = unknown_name_error("activation", given, {"relu": 1, "gelu": 2})
    assert isinstance(error, ConfigError) and str(error) == words
    assert str(unknown_name_error("model", "a", [])) == (
        "unknown model 'a'; there are: none"
    )


def test_required_packages():
    assert (require_package("torch", "train") / "nn").is_dir()
    assert (require_package("jaxtyping", "train") / "__init__.py").exists()
    assert require_package("typing_extensions", "train").is_dir()  # a single file
    with pytest.raises(
        ConfigError, match=r"package no_such_package.*'attn_notes\[data\]'$"
    ):
        require_package("no_such_package", "data")


@pytest.mark.no_shapes
@pytest.mark.parametrize("given", ["x" * 10**6, "a\nb", 3, None])
def test_an_unknown_name_is_shown_in_one_short_line(given):
    said = str(unknown_name_error("model", given, ["transformer_base"]))
    assert said.startswith("unknown model ") and len(said) < 200 and "\n" not in said


@pytest.mark.no_shapes
def test_masks_that_are_sparse_or_hold_no_data_are_refused():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(InputError, match="mask: expected a boolean mask of shape"):
        check_mask_shape(mask.to_sparse(), (2, 3))
    with pytest.raises(InputError, match="mask: expected values to read"):
        check_mask_rows(mask.to("meta"))
    with pytest.raises(InputError, match="input_ids: expected values to read"):
        check_id_values(mask.long().to("meta"), 5)


@pytest.mark.no_shapes
def test_an_array_is_shown_in_one_line():
    with pytest.raises(ConfigError, match="size: expected .*; got array") as info:
        check_positive(size=torch.ones(3, 3).numpy())
    assert "\n" not in str(info.value)
