"""Values of a wrong type or out of range, in every field of every registered
configuration and of the recipe, and in every argument at the edge: one line each,
from Python and from JSON alike."""

import json
import math
from dataclasses import asdict, fields, replace
from typing import get_args

import numpy as np
import pytest
import torch

import attn_notes as an
from attn_notes.training.recipes import Recipe
from attn_notes.zoo.checkpoints import stored_config
from attn_notes.zoo.registry import override

BOOK = an.list_models()
SMALL = "transformer_tiny"
ODD = {
    bool: ["false", 1, 0.0, None, [True]],
    int: [True, "2", 1.5, math.nan, -1, 2**70, [3], None, {}],
    float: [True, "0.1", math.nan, math.inf, -1, 1e400, [0.1], None, 10**400],
    str: [None, 3, "nonsense", ["relu"], ""],
    tuple: [3, "333", (), (0,), (True,), (1.5, 3), None, {3}, {"a": 1}, (2**70,)],
}
MAY_BE_EMPTY = {"pool_scales"}  # UperNet without its pyramid pooling


def odd_values(config):
    """Every field with every odd value of its kind; its default is none."""
    for field in fields(config):
        value = getattr(config, field.name)
        for odd in ODD.get(type(value), []):
            if odd == () and (field.default == () or field.name in MAY_BE_EMPTY):
                continue
            if odd is not None or type(None) not in get_args(field.type):
                yield field.name, odd


@pytest.mark.no_shapes
@pytest.mark.parametrize("name", BOOK)
def test_every_field_of_a_configuration_refuses_odd_values(name):
    config = an.model_info(name).config
    passed = []
    for field, odd in odd_values(config):
        try:
            replace(config, **{field: odd})
            passed.append((field, odd))
        except an.ConfigError as error:
            said = str(error)
            assert "\n" not in said and len(said) < 300 and field in said, said
    assert not passed


@pytest.mark.no_shapes
def test_every_field_of_a_recipe_refuses_odd_values():
    recipe, passed = Recipe(), []
    optional = {"max_tokens", "checkpoint_every", "evaluate_every"}
    for field, odd in odd_values(recipe):
        try:
            replace(recipe, **{field: odd})
            passed += [(field, odd)] if odd is not None or field not in optional else []
        except an.ConfigError as error:
            assert field in str(error) and "\n" not in str(error)
    assert not passed


@pytest.mark.no_shapes
@pytest.mark.parametrize("name", BOOK)
def test_json_is_held_to_the_same(name, tmp_path):
    info = an.model_info(name)
    stored = json.loads(json.dumps(asdict(info.config)))
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert stored_config(info, tmp_path) == info.config
    for field, odd in odd_values(info.config):
        if not isinstance(odd, (set, tuple)) and odd != 10**400:
            (tmp_path / "config.json").write_text(json.dumps({**stored, field: odd}))
            with pytest.raises(an.CheckpointError, match=field):
                stored_config(info, tmp_path)


@pytest.mark.no_shapes
@pytest.mark.parametrize("name", BOOK)
def test_numbers_of_other_types_become_pythons(name):
    config = an.model_info(name).config
    given = {
        field.name: np.int32(value) if type(value) is int else list(value)
        for field in fields(config)
        if type(value := getattr(config, field.name)) in (int, tuple)
    }
    assert repr(override(config, given)) == repr(config)
    assert replace(Recipe(), batch_size=torch.tensor(32)) == Recipe()


@pytest.mark.no_shapes
@pytest.mark.parametrize("field", ["pad_token_id", "bos_token_id", "eos_token_id"])
def test_special_ids_are_in_the_vocabulary(field):
    own = [n for n in BOOK if field in vars(an.model_info(n).config)]
    assert own
    for name in own:
        with pytest.raises(an.ConfigError, match=f"{field}: expected .* got 99999999"):
            override(an.model_info(name).config, {field: 99_999_999})


SIZES = dict(vocab_size=20, hidden_size=8, num_attention_heads=2, intermediate_size=8)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = an.create_model(SMALL, num_hidden_layers=1, **SIZES).eval()
    return model, torch.tensor([[4, 5, 6]])


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": [3]},
        {"max_new_tokens": "3"},
        {"max_new_tokens": 2.0},
        {"max_new_tokens": True},
        {"max_new_tokens": 0},
        {"num_beams": 10**30},
        {"num_beams": 2**31 - 1},
        {"num_beams": "4"},
        {"num_beams": None},
        {"num_beams": True},
        {"length_penalty": math.nan},
        {"length_penalty": "1"},
        {"length_penalty": None},
        {"length_penalty": True},
        {"length_penalty": -1},
        {"num_beams": 4, "length_penalty": math.inf},
    ],
    ids=str,
)
def test_generate_refuses(small, options):
    model, ids = small
    with pytest.raises(an.InputError) as caught:
        model.generate(ids, **options)
    said, name = str(caught.value), [*options][-1]
    assert (
        said.startswith(f"{name}: expected ") and "; got " in said and len(said) < 200
    )


@pytest.mark.no_shapes
def test_generate_takes_numpy_numbers(small):
    model, ids = small
    found = model.generate(ids, max_new_tokens=np.int64(3), num_beams=np.int8(2))
    assert torch.equal(found, model.generate(ids, max_new_tokens=3, num_beams=2))


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "call",
    [
        lambda: an.create_model(["transformer_tiny"]),
        lambda: an.create_model(None),
        lambda: an.create_model(""),
        lambda: an.model_info({}),
        lambda: an.create_model(SMALL, pretrained=""),
        lambda: an.create_model(SMALL, pretrained=1),
        lambda: an.create_model(SMALL, pretrained=["x"]),
        lambda: an.create_model(SMALL, pretrained="a/b", revision=3),
        lambda: an.create_model(SMALL, dtype="float16"),
        lambda: an.create_model(SMALL, device=3.5),
        lambda: an.create_model(SMALL, hidden_size=2**40),
        lambda: an.create_model(SMALL, hidden_size=2**30, vocab_size=2**30),
        lambda: an.create_model(SMALL, vocab_size=2**31 - 1, hidden_size=2**14),
        lambda: an.create_model(SMALL, hidden_size=2**30, device="meta"),
        lambda: an.example_inputs(SMALL, batch_size="2"),
        lambda: an.example_inputs(SMALL, batch_size=2.0),
        lambda: an.example_inputs(SMALL, batch_size=True),
        lambda: an.example_inputs(SMALL, batch_size=None),
        lambda: an.example_inputs(SMALL, batch_size=10**30),
        lambda: an.example_inputs(SMALL, batch_size=2**31 - 1),
        lambda: an.example_inputs(3),
    ],
)
def test_what_makes_models_and_inputs_refuses(call):
    with pytest.raises(an.ConfigError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and len(said) < 300
    assert "; got " in said or "; there are" in said or "; did you mean" in said


def test_examples_of_the_smallest_vocabularies():
    for size in (3, 4):
        inputs = an.example_inputs(SMALL, **{**SIZES, "vocab_size": size})
        assert inputs["input_ids"].max() < size


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "schedule, options",
    [
        ("step_decay", {"milestones": "abc"}),
        ("step_decay", {"milestones": [1, None]}),
        ("step_decay", {"milestones": [1, 2], "decay": math.nan}),
        ("cosine", {"floor": "0"}),
        ("cosine", {"floor": True}),
        ("inverse_square_root", {"d_model": 1.5}),
        ("seq2seq_halving", {"steps_per_epoch": "3"}),
        ("seq2seq_halving", {"steps_per_epoch": 3, "fixed_epochs": math.inf}),
    ],
)
def test_options_of_a_schedule_are_held_to_the_same(schedule, options):
    with pytest.raises(an.ConfigError, match=f"^{[*options][-1]}: expected .*; got"):
        Recipe(schedule=schedule, schedule_options=options, warmup_steps=0)
