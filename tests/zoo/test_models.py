"""What holds for every registered model, whatever it is: size, devices, precisions,
compilers, files."""

import copy

import pytest
import torch
from torch import nn

import attn_notes as an
from attn_notes.foundations.blocks import Stack
from attn_notes.zoo.devices import (
    STAND_IN,
    check_model,
    example_loss,
    fake_device,
    map_tensors,
    tensors,
    to_stand_in,
)
from attn_notes.zoo.factory import count_parameters
from attn_notes.zoo.formats import matches
from attn_notes.zoo.hub import PretrainedMixin
from attn_notes.zoo.registry import override


def architectures():
    """One name for each model that differs at its small size by more than dropout."""
    first = {}
    for name in an.list_models():
        info = an.model_info(name)
        config = override(info.config, info.tiny)
        if hasattr(config, "dropout"):
            config = override(config, {"dropout": 0.0})
        first.setdefault((info.model, config), name)
    return sorted(first.values())


every_model = pytest.mark.parametrize("name", an.list_models())
every_architecture = pytest.mark.parametrize("name", architectures())


@pytest.fixture
def built(name):
    """The small size in evaluation mode, and inputs for it."""
    torch.manual_seed(0)
    tiny = an.model_info(name).tiny
    model = an.create_model(name, **tiny).eval()
    for key, value in model.state_dict().items():  # a head may begin at zero
        if matches(key, an.model_info(name).classifier):
            value.normal_(std=0.02)
    return model, an.example_inputs(name, batch_size=3, **tiny)


def leaves(outputs):
    return [leaf for leaf in tensors(outputs) if leaf.is_floating_point()]


def close(a, b, tolerance):
    a, b = leaves(a), leaves(b)
    return len(a) == len(b) > 0 and all(
        (x.float() - y.float()).norm() <= tolerance * y.float().norm()
        for x, y in zip(a, b, strict=True)
    )


def step(name, model, inputs):
    """Outputs, and gradients of the loss by parameter name."""
    model.zero_grad()
    outputs = model(**inputs)
    example_loss(an.model_info(name).task, outputs, inputs).backward()
    return outputs, {
        key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None
    }


@every_model
def test_the_parameter_count_is_the_registered_one(name):
    assert (
        count_parameters(an.create_model(name, device="meta"))
        == an.model_info(name).parameters
    )


@every_model
def test_the_registration_is_complete(name):
    info = an.model_info(name)
    assert (
        info.paper
        and info.chapter
        and info.task
        and info.tiny
        and ("tiny" in info.recipes or info.task == "features")
        and 1990 < info.year < 2030
        and (info.keeps or info.replaces or info.adds)
    )
    assert info.model.example_inputs and issubclass(info.model, PretrainedMixin)
    assert info.model.config_class is type(info.config)
    assert (
        count_parameters(an.create_model(name, device="meta", **info.tiny)) < 5_000_000
    )


@every_model
def test_it_runs_on_an_accelerator_at_its_published_size(name):
    found = check_model(name, "fake")
    assert (
        found.parameters == an.model_info(name).parameters
        and found.without_gradient == ()
    )


@every_architecture
def test_a_planted_cpu_tensor_is_caught(name, built):
    model, inputs = built
    with fake_device():
        fakes = map_tensors(
            lambda x: torch.empty(x.shape, dtype=x.dtype, device=STAND_IN), inputs
        )
        to_stand_in(model)
        example_loss(an.model_info(name).task, model(**fakes), fakes)
        module, key = next(
            (m, k)
            for m in reversed(list(model.modules()))
            for k in m._parameters
            if m._parameters[k] is not None
        )
        module._parameters[key] = nn.Parameter(
            torch.empty(module._parameters[key].shape)
        )
        with pytest.raises(RuntimeError, match="cpu"):
            model(**fakes)


@every_architecture
def test_bf16_autocast_gives_the_same_to_its_precision(name, built):
    model, inputs = built
    expected, gradients = step(name, model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, rounded = step(name, model, inputs)
    assert rounded.keys() == gradients.keys()
    if getattr(model.config, "two_stage", False):
        return  # which tokens are chosen is a matter of rounding
    assert close(found, expected, 0.05)
    whole = [
        torch.cat([g.flatten() for g in side.values()]) for side in (rounded, gradients)
    ]
    assert (whole[0] - whole[1]).norm() < 0.1 * whole[1].norm()


@every_architecture
@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)]
)
def test_the_compiled_model_gives_the_same(name, built, backend):
    model, inputs = built
    expected, gradients = step(name, model, inputs)
    torch._dynamo.reset()
    model.compile(backend=backend, fullgraph=True)
    found, compiled = step(name, model, inputs)
    assert close(found, expected, 1e-5)
    assert all(
        (compiled[key] - gradients[key]).norm() <= 1e-4 * gradients[key].norm() + 1e-7
        for key in gradients
    )


@every_architecture
@pytest.mark.no_shapes
def test_the_exported_model_gives_the_same(name, built):
    model, inputs = built
    with torch.no_grad():
        expected = model(**inputs)
        exported = torch.export.export(model, (), inputs).module()
        assert close(exported(**inputs), expected, 1e-5)


@every_architecture
def test_saved_and_read_back_it_is_the_same(name, built, tmp_path):
    model, inputs = built
    model.save_pretrained(tmp_path / name)
    again = an.create_model(name, pretrained=tmp_path / name)
    assert again.config == model.config
    with torch.no_grad():
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                leaves(again(**inputs)), leaves(model(**inputs)), strict=True
            )
        )


@every_architecture
def test_recorded_attention_changes_nothing_and_sums_to_one(name, built):
    model, inputs = built
    with torch.no_grad():
        expected = model(**inputs)
        with an.record_attention(model) as maps:
            assert close(model(**inputs), expected, 1e-5)
    for weights in maps.values():
        total = weights.sum(-1)
        assert weights.ndim == 4 and (((total - 1).abs() < 1e-5) | (total == 0)).all()


@every_architecture
def test_gradient_checkpointing_gives_the_same(name, built):
    model, inputs = built[0].train(), built[1]
    stacks = [module for module in model.modules() if isinstance(module, Stack)]
    if not stacks:
        pytest.skip("no stack of layers in it")
    torch.manual_seed(1)  # of dropout
    expected, gradients = step(name, model, inputs)
    calls = []
    for stack in stacks:
        assert stack.gradient_checkpointing is False
        stack.gradient_checkpointing = True
        stack.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    found, checkpointed = step(name, model, inputs)
    assert close(found, expected, 1e-6) and checkpointed.keys() == gradients.keys()
    assert all(
        (checkpointed[key] - gradients[key]).norm() <= 1e-5 * gradients[key].norm()
        for key in gradients
    )
    assert len(calls) == 2 * len(stacks)  # computed again on the way back


@every_architecture
def test_float64_and_copies(name, built):
    model, inputs = built
    with torch.no_grad():
        assert close(copy.deepcopy(model).double()(**inputs), model(**inputs), 1e-5)


@every_model
def test_shipped_weights_load(name):
    from attn_notes.zoo.registry import weights_folder

    if weights_folder(name).is_dir():
        assert not an.create_model(name, pretrained=True).training
    else:
        with pytest.raises(an.CheckpointError, match="ships no weights"):
            an.create_model(name, pretrained=True)
