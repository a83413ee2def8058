"""What people do with a model beside calling it, for one of every class: pickling,
copies, threads, any batch size, padding on the wrong side."""

import copy
import pickle
import threading
import warnings

import pytest
import torch

import attn_notes as an
from attn_notes.zoo.formats import matches

one_of_each = {an.model_info(name).model: name for name in an.list_models()}
every_model = pytest.mark.parametrize("name", sorted(one_of_each.values()))


@pytest.fixture
def built(name):
    "The small size in evaluation mode, and inputs for it."
    torch.manual_seed(0)
    options = dict(an.model_info(name).tiny)
    inputs = an.example_inputs(name, batch_size=3, **options)
    model = an.create_model(name, **options).eval()
    for key, value in model.state_dict().items():  # a head may begin at zero
        if matches(key, an.model_info(name).classifier):
            value.normal_(std=0.02)
    return model, inputs


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@every_model
def test_pickled_and_copied_it_is_the_same(name, built):
    model, inputs = built
    with torch.no_grad():
        expected = model(**inputs)
        for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            same(again(**inputs), expected)
            assert list(again.state_dict()) == list(model.state_dict())
    for parameter in again.parameters():
        parameter.data.add_(1.0)
    same(model(**inputs), expected)  # a copy of its own


@every_model
@pytest.mark.no_shapes
def test_exported_it_takes_any_batch(name, built):
    model, inputs = built
    rows = {key: {0: torch.export.Dim("b", min=2, max=64)} for key in inputs}
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, dynamic_shapes=rows).module()
        more = {key: torch.cat([x, x]) for key, x in inputs.items()}
        same(exported(**more), model(**more))


@every_model
@pytest.mark.no_shapes
def test_one_thread_trains_while_another_generates(name, built):
    "Each does what it does alone: gradients here, the same tokens there."
    model, inputs = built
    if not hasattr(model, "generate"):
        pytest.skip("does not generate")
    step = "decode" if hasattr(model, "decode") else "step"
    source = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    expected = model.generate(**source, max_new_tokens=6)
    seen, found = threading.Barrier(2), []

    plain = getattr(model, step)

    def decode(tokens, state):
        if threading.current_thread() is not threading.main_thread() and not found:
            found.append(None)
            seen.wait(20)  # the other thread goes now, inside this `generate`
            seen.wait(20)
        return plain(tokens, state)

    def generate():
        found.append(model.generate(**source, max_new_tokens=6))

    setattr(model, step, decode)
    thread = threading.Thread(target=generate)
    thread.start()
    seen.wait(20)
    output = model(**inputs)
    output = output if isinstance(output, torch.Tensor) else output.logits
    output.square().mean().backward()
    seen.wait(20)
    thread.join()
    assert torch.equal(found[1], expected)
    assert all(p.grad is not None for p in model.parameters())


@every_model
@pytest.mark.no_shapes
def test_padding_belongs_on_the_right(name, built):
    model, inputs = built
    if "decoder_input_ids" not in inputs:
        pytest.skip("reads no source")
    source, mask = inputs["input_ids"], inputs["attention_mask"]
    with pytest.raises(an.InputError, match="^attention_mask: .*on the right.* row 2"):
        model.generate(source.flip(1), mask.flip(1), max_new_tokens=3)
    padded = source.masked_fill(~mask, model.config.pad_token_id)
    with pytest.warns(UserWarning, match="^input_ids: padding .* no attention_mask"):
        model.generate(padded, max_new_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(padded, mask, max_new_tokens=3)
        model.generate(padded[:, :4], max_new_tokens=3)


@every_model
@pytest.mark.no_shapes
def test_more_tokens_than_positions(name, built):
    model, inputs = built
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        pytest.skip("any number of tokens")
    if "decoder_input_ids" not in inputs:
        pytest.skip("no encoder-decoder: asked in the tests of its chapter")
    source, target = inputs["input_ids"], inputs["decoder_input_ids"]
    long = torch.full((3, limit + 1), 3)
    words = f"expected at most {limit} tokens, the number of positions; got {limit + 1}"
    for call, argument in (
        (lambda: model(long, target), "input_ids"),
        (lambda: model(source, long), "decoder_input_ids"),
        (lambda: model.generate(long), "input_ids"),
        (lambda: model.generate(source, max_new_tokens=limit + 1), "max_new_tokens"),
    ):
        with pytest.raises(an.InputError, match=f"^{argument}: {words}"):
            call()
    assert len(model.generate(source, max_new_tokens=None)) == 3
