"""Names, configurations and fresh models."""

import pytest
import torch
from torch import nn

import attn_notes as an
from attn_notes.zoo.registry import count_parameters, register_model, weights_folder


def test_names_are_sorted_and_match_patterns(toy):
    assert an.list_models() == ["other_toy", "toy", "toy_wide"]
    assert (
        an.list_models("toy*") == ["toy", "toy_wide"] and an.list_models("Toy*") == []
    )


def test_info_tells_what_was_registered(toy):
    info = an.model_info("toy")
    assert (info.model, info.parameters, info.config.widths) == (toy, 87, (4, 5))
    for said in (
        "nobody",
        "87",
        "accuracy",
        "elsewhere",
        ".hidden_size",
        "none shipped",
    ):
        assert said in repr(info)


def test_parameters_count_shared_weights_once(toy):
    for name in an.list_models():
        assert (
            count_parameters(an.create_model(name, device="meta"))
            == an.model_info(name).parameters
        )


def test_fresh_models_train_and_take_overrides_device_and_dtype(toy):
    model = an.create_model("toy", dtype=torch.bfloat16, hidden_size=8, num_classes=5)
    assert (
        model.training and model.config.hidden_size == 8 and model.architecture == "toy"
    )
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    assert model(*an.example_inputs("toy", batch_size=4))[1].shape == (4, 5)
    assert all(
        value.is_meta
        for value in an.create_model("toy", device="meta").state_dict().values()
    )
    assert torch.get_default_device() == torch.device("cpu")


def test_a_size_that_no_machine_holds_can_be_counted(toy):
    assert (
        count_parameters(
            an.create_model("toy", device="meta", vocab_size=10**9, hidden_size=10**4)
        )
        > 10**13
    )


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: an.create_model("toi"), "did you mean 'toy'"),
        (lambda: an.model_info("zzzzzzzz"), "there are: other_toy, toy"),
        (lambda: an.create_model("toy", hidden_sise=3), "did you mean 'hidden_size'"),
        (lambda: an.create_model("toy", hidden_size=0), "hidden_size must be"),
        (
            lambda: an.create_model("toy", device="cuda:77"),
            "'cuda:77' is not to be had",
        ),
        (
            lambda: an.create_model("toy", device="nonsense"),
            "'nonsense' is not to be had",
        ),
        (lambda: an.create_model("toy", dtype=torch.int64), "floating torch.dtype"),
        (lambda: an.create_model("toy", dtype="bfloat16"), "floating torch.dtype"),
        (
            lambda: an.example_inputs("toy", batch_size=0),
            "batch_size: expected at least 1",
        ),
        (lambda: an.example_inputs("toy", hidden=1), "unknown field"),
        (lambda: an.example_inputs("toy", device="nonsense"), "is not to be had"),
    ],
)
def test_wrong_questions_are_answered_in_one_line(toy, call, said):
    with pytest.raises(an.ConfigError, match=".") as caught:
        call()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_belongs_to_one_chapter(toy):
    stranger = type("Stranger", (nn.Module,), {"__module__": "another.chapter"})
    config = an.model_info("toy").config
    with pytest.raises(an.ConfigError, match="taken by"):
        register_model("toy", config, paper="", chapter="", task="", parameters=0)(
            stranger
        )


def test_a_class_in_the_notebook_goes_before_the_exported_one(toy):
    edited = type("Toy", (toy,), {"__module__": "__main__"})
    register = register_model(
        "toy", an.model_info("toy").config, paper="", chapter="", task="", parameters=0
    )
    register(edited)
    register(toy)
    assert an.model_info("toy").model is edited


def test_weights_are_package_data():
    assert (
        weights_folder("toy").parent.name == "weights"
        and weights_folder("toy").parents[1].name == "attn_notes"
    )
