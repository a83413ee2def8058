"""From a name to a fresh model and its inputs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attn_notes as an
from attn_notes.zoo.factory import count_parameters


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
    assert model(**an.example_inputs("toy", batch_size=4))[1].shape == (4, 5)
    assert all(
        value.is_meta
        for value in an.create_model("toy", device="meta").state_dict().values()
    )
    assert torch.get_default_device() == torch.device("cpu")


def test_inputs_are_keywords_of_the_size_asked_for(toy):
    inputs = an.example_inputs("toy", 3, device="meta", vocab_size=5)
    assert list(inputs) == ["input_ids"] and inputs["input_ids"].shape == (3, 7)
    assert inputs["input_ids"].is_meta
    assert an.example_inputs("toy", 50, vocab_size=2)["input_ids"].max() == 1


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
        (lambda: an.create_model("toy", hidden_sise=3), "did you mean 'hidden_size'"),
        (lambda: an.create_model("toy", hidden_size=0), "hidden_size: expected"),
        (
            lambda: an.create_model("toy", device="cuda:77"),
            "device: expected one that is to be had here; got 'cuda:77'",
        ),
        (lambda: an.create_model("toy", device="nonsense"), "got 'nonsense'"),
        (lambda: an.create_model("toy", dtype=torch.int64), "floating torch.dtype"),
        (lambda: an.create_model("toy", dtype=torch.float8_e5m2), "16 bits or more"),
        (lambda: an.create_model("toy", dtype="bfloat16"), "a torch.dtype, or None"),
        (
            lambda: an.example_inputs("toy", batch_size=0),
            "batch_size: expected a whole number from 1",
        ),
        (lambda: an.example_inputs("toy", hidden=1), "unknown field"),
        (lambda: an.example_inputs("toy", device="nonsense"), "got 'nonsense'"),
    ],
)
def test_wrong_questions_are_answered_in_one_line(toy, call, said):
    with pytest.raises(an.ConfigError, match=".") as caught:
        call()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_class_that_gives_no_inputs_says_so(toy, monkeypatch):
    monkeypatch.delattr(toy, "example_inputs")
    with pytest.raises(an.ConfigError, match="toy: its class has no example_inputs"):
        an.example_inputs("toy")


@pytest.mark.no_shapes
def test_buffers_that_no_memory_holds():
    with pytest.raises(an.ConfigError, match="sizes that the memory holds"):
        an.create_model("transformer_tiny", max_position_embeddings=10**9)


class Draws(TorchDispatchMode):
    """The operations that draw, and on which device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.seen.append(args[0].device.type)
        return func(*args, **(kwargs or {}))


def test_nothing_is_drawn_on_the_meta_device_and_a_model_is_drawn_once(toy):
    with Draws() as draws:
        an.create_model("toy", device="meta")
    assert draws.seen == []
    with Draws() as draws:
        an.create_model("toy")
    with Draws() as plain:
        info = an.model_info("toy")
        info.model(info.config)
    assert draws.seen == plain.seen and {*plain.seen} == {"cpu"}
