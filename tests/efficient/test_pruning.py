"""Pruned heads equal to gates at zero, importance to a definition by autograd, one
example at a time; factorized layers to the singular values that they leave out; and the
files of models made smaller."""

import copy

import pytest
import torch
from torch import nn

import attn_notes as an
from attn_notes.efficient.pruning import (
    LowRankLinear,
    PrunedAttention,
    attention_layers,
    by_layer,
    factorize,
    factorize_layers,
    gated_heads,
    head_importance,
    keep_heads,
    load_compressed,
    prune_heads,
    rank_heads,
    truncation_errors,
)
from attn_notes.foundations.attention import MultiHeadAttention, record_attention
from attn_notes.foundations.cache import KeyValueCache
from attn_notes.foundations.checks import CheckpointError, ConfigError, InputError
from attn_notes.zoo.factory import count_parameters


def shake(model, seed=0):
    "Noise on every weight: no bias is zero, no norm neutral."
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def model_of(name, **sizes):
    torch.manual_seed(0)
    return shake(an.create_model(name, **sizes))


def inputs_of(name, rows=3, **sizes):
    torch.manual_seed(1)
    given = an.example_inputs(name, batch_size=rows, **sizes)
    return {k: x.double() if x.is_floating_point() else x for k, x in given.items()}


def tensors(output):
    "Every tensor of an output."
    if isinstance(output, torch.Tensor):
        return [output]
    return [x for x in vars(output).values() if isinstance(x, torch.Tensor)]


def removed(model):
    "The heads to take out: in turn none, one, two, all of an attention."
    return {
        path: list(range(layer.num_attention_heads))[: (0, 1, 2, None)[i % 4]]
        for i, (path, layer) in enumerate(attention_layers(model).items())
    }


NAMES = ("vit_book", "gpt_book", "transformer_tiny", "bert_book_pretraining")


# ---- pruning


@pytest.mark.parametrize("name", NAMES)
def test_pruned_equals_the_model_with_its_gates_at_zero(name):
    model, given = model_of(name), inputs_of(name)
    heads = removed(model)
    gates = {
        path: torch.ones(layer.num_attention_heads).double()
        for path, layer in attention_layers(model).items()
    }
    for path, numbers in heads.items():
        gates[path][numbers] = 0
    with torch.no_grad():
        whole = tensors(model(**given))
        with gated_heads(model, gates):
            expected = tensors(model(**given))
        again = tensors(model(**given))
        pruned = prune_heads(copy.deepcopy(model), heads)
        found = tensors(pruned(**given))
    for a, b, c, d in zip(found, expected, again, whole, strict=True):
        assert (a - b).abs().max() < 1e-12
        assert torch.equal(c, d) and (b - d).abs().max() > 1e-3
    gone = sum(
        len(numbers) * 4 * layer.hidden_size**2 // layer.num_attention_heads
        for numbers, layer in zip(
            heads.values(), attention_layers(model).values(), strict=True
        )
    )
    biases = sum(
        3 * len(heads[path]) * layer.hidden_size // layer.num_attention_heads
        for path, layer in attention_layers(model).items()
        if layer.in_proj_bias is not None
    )
    assert count_parameters(model) - count_parameters(pruned) == gone + biases


def test_the_gradient_of_what_stays_is_that_of_the_gated_model():
    whole, given = model_of("vit_book"), inputs_of("vit_book")
    path = "encoder.layers.1.attention"
    pruned = prune_heads(copy.deepcopy(whole), {path: [0, 2]})
    with gated_heads(whole, {path: torch.tensor([0.0, 1, 0, 1]).double()}):
        whole(**given).square().sum().backward()
    pruned(**given).square().sum().backward()
    old, new = whole.get_submodule(path), pruned.get_submodule(path)
    rows = old.in_proj_weight.grad.unflatten(0, (3, 4, 16))[:, [1, 3]].flatten(0, 2)
    torch.testing.assert_close(new.in_proj_weight.grad, rows, rtol=1e-10, atol=1e-12)
    columns = old.out_proj.weight.grad.unflatten(1, (4, 16))[:, [1, 3]].flatten(1)
    torch.testing.assert_close(new.out_proj.weight.grad, columns, rtol=1e-10, atol=0)
    first = (model.patch_embedding.projection.weight.grad for model in (whole, pruned))
    torch.testing.assert_close(*first, rtol=1e-10, atol=1e-12)


def test_pruning_twice_is_pruning_once():
    given = inputs_of("vit_book")
    path = "encoder.layers.0.attention"
    once = prune_heads(model_of("vit_book"), {path: [0, 3]})
    twice = prune_heads(model_of("vit_book"), {path: [0]})
    prune_heads(twice, {path: [2]})  # the fourth is the third now
    assert torch.equal(once(**given), twice(**given))
    assert twice.get_submodule(path).num_attention_heads == 2


def test_masks_causality_caches_and_bias_of_a_pruned_attention():
    torch.manual_seed(0)
    whole = shake(MultiHeadAttention(12, 3))
    small, gates = keep_heads(whole, [2, 0]), torch.tensor([1.0, 0, 1]).double()
    x, key = torch.randn(2, 5, 12).double(), torch.randn(2, 4, 12).double()
    holder = nn.ModuleDict({"one": whole})
    mask = torch.tensor([[True, True, False, True], [False] * 4])
    bias = torch.randn(1, 1, 5, 4).double()
    for arguments in (
        {"key": key, "mask": mask, "bias": bias},
        {"is_causal": True},
        {"key": key, "value": key + 1},
    ):
        with gated_heads(holder, {"one": gates}):
            expected = whole(x, **arguments)
        assert (small(x, **arguments) - expected).abs().max() < 1e-12
    cache, steps = KeyValueCache(), []
    for i in range(5):
        step, cache = small(x[:, i : i + 1], is_causal=True, cache=cache)
        steps.append(step)
    assert (torch.cat(steps, 1) - small(x, is_causal=True)).abs().max() < 1e-12
    memory = small.project_memory(key, mask)
    direct = small(x, key, mask=mask)
    assert (small(x, cache=memory) - direct).abs().max() < 1e-12


def test_an_attention_without_heads_gives_its_bias():
    whole = shake(MultiHeadAttention(8, 2))
    empty, x = keep_heads(whole, []), torch.randn(2, 3, 8).double()
    assert torch.equal(empty(x), whole.out_proj.bias.expand(2, 3, 8))
    bare = keep_heads(MultiHeadAttention(8, 2, bias=False), [])
    assert not bare(x.float()).any()


def test_generation_and_recorded_maps_of_a_pruned_model():
    model = prune_heads(model_of("gpt_book"), {"decoder.layers.1.attention": [1], **{}})
    ids = torch.randint(2000, (2, 6))
    with record_attention(model) as maps:
        logits = model(ids)
    shapes = [tuple(A.shape) for A in maps.values()]
    assert shapes == [(2, 4, 6, 6), (2, 3, 6, 6), (2, 4, 6, 6)]
    given = {"max_new_tokens": 1, "temperature": 0.0, "eos_token_id": 1999}
    new = model.generate(ids, **given)
    assert torch.equal(new[:, 6], logits[:, -1].argmax(-1))


def test_precision_mode_and_device_of_what_is_pruned_stay():
    model = model_of("vit_book").bfloat16().train()
    layer = prune_heads(model, {"encoder.layers.0.attention": [1]}).get_submodule(
        "encoder.layers.0.attention"
    )
    assert layer.training and layer.out_proj.weight.dtype == torch.bfloat16
    meta = an.create_model("vit_base_patch16_224", device="meta")
    prune_heads(meta, {"encoder.layers.3.attention": range(6)})
    assert meta.encoder.layers[3].attention.in_proj_weight.is_meta


def test_a_module_that_stands_twice_is_replaced_twice():
    layer = MultiHeadAttention(8, 2)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    prune_heads(model, {"a": [0]})
    assert model["a"] is model["b"][0] and model["a"].num_attention_heads == 1


# ---- importance


@pytest.mark.parametrize("name", ["vit_book", "transformer_tiny"])
def test_importance_is_the_mean_of_each_examples_own_slope(name):
    model, given = model_of(name), inputs_of(name, rows=4)

    def loss(model, batch):
        return model(**batch).square().flatten(1).sum(1).sqrt().sum()

    found = head_importance(model, loss, [given])
    expected = {path: torch.zeros_like(x) for path, x in found.items()}
    for row in range(4):
        one = {key: x[row : row + 1] for key, x in given.items()}
        gates = {path: torch.ones_like(x).requires_grad_() for path, x in found.items()}
        with gated_heads(model, gates):
            loss(model, one).backward()
        for path, gate in gates.items():
            expected[path] += gate.grad.abs() / 4
    for path, scores in found.items():
        torch.testing.assert_close(scores, expected[path], rtol=1e-10, atol=1e-12)
    model.zero_grad()
    parts = [{key: x[i:j] for key, x in given.items()} for i, j in ((0, 1), (1, 4))]
    split = head_importance(model.train(), loss, parts)
    if name == "vit_book":  # the other has dropout, off here as well
        assert model.training
    for path, scores in found.items():
        torch.testing.assert_close(split[path], scores, rtol=1e-10, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_slope_is_the_sum_of_output_times_gradient():
    "Michel et al., eq. (3): Att_h^T dL/dAtt_h, here summed over the tokens."
    layer = shake(MultiHeadAttention(12, 3))
    model, seen = nn.ModuleDict({"one": layer}), []
    layer.out_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    x = torch.randn(1, 5, 12).double().requires_grad_()
    value = layer(x).square().sum()
    (slope,) = torch.autograd.grad(value, seen[0])
    expected = (seen[0] * slope).unflatten(-1, (3, 4)).sum((0, 1, 3)).abs()
    found = head_importance(
        model, lambda m, batch: m["one"](batch["x"]).square().sum(), [{"x": x}]
    )
    torch.testing.assert_close(found["one"], expected, rtol=1e-10, atol=0)


def test_ranking_compares_shares_of_a_layer():
    scores = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.01, 0.0])}
    assert rank_heads(scores) == [("b", 1), ("a", 0), ("a", 1), ("b", 0)]
    plain = rank_heads(scores, normalize=False)
    assert plain == [("b", 1), ("b", 0), ("a", 0), ("a", 1)]
    assert by_layer(plain[:3]) == {"b": [1, 0], "a": [0]}
    nothing = rank_heads({"a": torch.zeros(2)})
    assert sorted(nothing) == [("a", 0), ("a", 1)]


# ---- low rank


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
def test_the_error_of_a_factorization_is_the_tail_of_the_singular_values(shape):
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0]).double()
    errors, weight = truncation_errors(linear.weight), linear.weight.detach()
    assert errors.shape == (min(shape),)
    for rank in range(1, min(shape) + 1):
        two = factorize(linear, rank)
        product = two.up.weight @ two.down.weight
        error = (product - weight).norm() / weight.norm()
        assert abs(error - errors[rank - 1]) < 1e-7  # the last ones are zero
        assert abs(error**2 - errors[rank - 1] ** 2) < 1e-12
        assert count_parameters(two) == rank * sum(shape) + shape[0]
    x = torch.randn(2, 3, shape[1]).double()
    assert (two(x) - linear(x)).abs().max() < 1e-12
    rough = torch.randn(shape[0], 3).double() @ torch.randn(3, shape[1]).double()
    assert (rough - weight).norm() / weight.norm() > errors[2]


def test_only_the_layers_of_the_pattern_are_factorized():
    model = model_of("vit_book")
    before = count_parameters(model)
    factorize_layers(model, 16)
    kinds = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert len(kinds) == 8
    assert before - count_parameters(model) == 8 * (64 * 256 - 16 * (64 + 256))
    factorize_layers(model, 8, "*.attention.out_proj")
    assert isinstance(model.encoder.layers[0].attention.out_proj, LowRankLinear)
    assert model(**inputs_of("vit_book")).shape == (3, 10)


def test_the_full_rank_is_the_same_model():
    model, given = model_of("gpt_book"), inputs_of("gpt_book")
    expected = model(**given)
    found = factorize_layers(model, 128)(**given)
    assert (found - expected).abs().max() < 1e-10


# ---- files


def smaller(name):
    model = model_of(name).float()
    prune_heads(model, removed(model))
    return factorize_layers(model, 5)


@pytest.mark.parametrize("name", ["vit_book", "transformer_tiny"])
def test_a_state_dict_is_enough_to_come_back(name, tmp_path):
    from safetensors.torch import load_file

    model, given = smaller(name), an.example_inputs(name)
    model.save_pretrained(tmp_path / "small")
    state = load_file(tmp_path / "small" / "model.safetensors")
    again = load_compressed(an.create_model(name), state)
    assert not again.training
    a, b = tensors(again(**given)), tensors(model.eval()(**given))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    with pytest.raises(CheckpointError, match="in_proj_weight"):
        an.create_model(name, tmp_path / "small")


def test_a_state_that_does_not_fit_changes_nothing():
    state = smaller("vit_book").state_dict()
    whole = an.create_model("vit_book")
    for wrong in (
        {k: x for k, x in state.items() if k != "head.bias"},
        state | {"more": torch.zeros(1)},
        state | {"head.weight": torch.zeros(11, 64)},
        state | {"encoder.layers.1.attention.in_proj_weight": torch.zeros(143, 64)},
    ):
        with pytest.raises(CheckpointError, match="[13] keys missing"):
            load_compressed(whole, wrong)
        kinds = {type(layer) for layer in attention_layers(whole).values()}
        assert kinds == {MultiHeadAttention}


def test_a_whole_state_loads_as_it_is():
    model = model_of("vit_book").float()
    again = load_compressed(an.create_model("vit_book"), model.state_dict())
    given = an.example_inputs("vit_book")
    assert torch.equal(again(**given), model(**given))


# ---- what users meet


@pytest.mark.no_shapes
def test_bad_input_is_refused_before_any_work():
    model, path = model_of("vit_book"), "encoder.layers.0.attention"
    for heads, message in (
        ({"encoder.layers.9.attention": [0]}, "unknown attention"),
        ({path: [4]}, "among 0 to 3"),
        ({path: [-1]}, "among 0 to 3"),
        ({path: [1, 1]}, "each once"),
        ({"encoder.layers.1.attention": [0], path: [7]}, "among 0 to 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            prune_heads(model, heads)
    kinds = {type(layer) for layer in attention_layers(model).values()}
    assert kinds == {MultiHeadAttention}
    with (
        pytest.raises(ConfigError, match="gates of 4 heads; got"),
        gated_heads(model, {path: torch.ones(3)}),
    ):
        pass
    with pytest.raises(ConfigError, match="MultiHeadAttention in it; got a Linear"):
        attention_layers(nn.Linear(2, 2))
    with pytest.raises(InputError, match="at least one example"):
        head_importance(model, lambda m, b: m(**b).sum(), [])
    with pytest.raises(ConfigError, match="rank: expected at most 3; got 4"):
        factorize(nn.Linear(3, 5), 4)
    with pytest.raises(ConfigError, match="rank"):
        factorize(nn.Linear(3, 5), 0)
    with pytest.raises(ConfigError, match="pattern"):
        factorize_layers(model, 2, "nowhere.*")
    with pytest.raises(ConfigError, match="expected 0 to 2, of 4 each in 8; got 3"):
        PrunedAttention(8, 3, 4)
    with pytest.raises(ConfigError, match="expected 0 to 2"):
        PrunedAttention(8, -1, 4)


def test_albert_counts_of_a_factorized_embedding():
    "Lan et al. 2020, section 3.1: V x H against V x E + E x H, with V = 30,000."
    v, h, e = 30_000, 768, 128
    with torch.device("meta"):
        two = LowRankLinear(v, h, e, bias=False)
    assert count_parameters(two) == v * e + e * h == 3_938_304 < v * h
