"""Positions: the paper's table, offsets, what happens at its end, and the embedding."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attn_notes as an
from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.foundations.initialization import ComputedBuffers
from attn_notes.foundations.positions import (
    LearnedPositions,
    SinusoidalPositions,
    TokenPositionEmbedding,
    sinusoidal_table,
)


@given(st.integers(1, 50), st.integers(1, 16).map(lambda half: 2 * half))
def test_table_is_the_formula(n, d):
    table = sinusoidal_table(n, d)
    assert table.shape == (n, d) and table.dtype == torch.float32
    for p, c in {(0, 0), (n - 1, d - 1), (n // 2, d // 2), (n - 1, 0)}:
        angle = p / 10000 ** (2 * (c // 2) / d)
        assert (
            abs(table[p, c].item() - (math.cos(angle) if c % 2 else math.sin(angle)))
            < 1e-6
        )


def test_distance_alone_decides_the_product():
    products = sinusoidal_table(200, 64).double()
    products = products @ products.T
    for k in (0, 1, 17, 199):
        diagonal = products.diagonal(k)
        assert (diagonal - diagonal[0]).abs().max() < 1e-4


@given(
    st.integers(1, 12).map(lambda half: 2 * half),
    st.integers(1, 20),
    st.integers(0, 20),
    st.integers(0, 40),
)
def test_a_step_is_one_rotation(d, n, offset, k):
    """The rows k positions on are R_k times the rows, with one R_k for all positions;
    and they begin at the angle zero."""
    positions = SinusoidalPositions(d, 100)
    angle = k * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    c, s = angle.cos(), angle.sin()
    turn = torch.block_diag(
        *torch.stack([torch.stack([c, s], -1), torch.stack([-s, c], -1)], -2)
    )
    assert torch.allclose(
        positions(n, offset=offset).double() @ turn.T,
        positions(n, offset=offset + k).double(),
        atol=1e-5,
    )
    assert torch.equal(positions(1), torch.tensor([[0.0, 1.0] * (d // 2)]))


@pytest.mark.parametrize("kind", [SinusoidalPositions, LearnedPositions])
def test_offsets_join(kind):
    positions = kind(8, 20)
    assert torch.equal(
        torch.cat([positions(5), positions(1, offset=5), positions(14, offset=6)]),
        positions.weight,
    )


def test_what_is_stored():
    assert list(SinusoidalPositions(8, 20).state_dict()) == [] and list(
        LearnedPositions(8, 20).state_dict()
    ) == ["weight"]
    assert sum(
        p.numel() for p in LearnedPositions(8, 20).parameters()
    ) == 160 and not list(SinusoidalPositions(8, 20).parameters())


def test_buffers_follow_the_module():
    positions = SinusoidalPositions(8, 20)
    assert (
        positions.double()(3).dtype == torch.float64
        and positions.to("meta")(3).device.type == "meta"
    )
    with torch.device("meta"):
        assert SinusoidalPositions(8, 20).weight.device.type == "meta"


@pytest.mark.no_shapes
@pytest.mark.parametrize("kind", [SinusoidalPositions, LearnedPositions])
@pytest.mark.parametrize("n, offset", [(21, 0), (1, 20), (0, 0), (3, -1)])
def test_positions_outside_the_table(kind, n, offset):
    message = (
        f"^positions: expected positions within 0 to 19; got {n} from {offset} on$"
    )
    with pytest.raises(InputError, match=message):
        kind(8, 20)(n, offset)


# the embedding


@pytest.mark.parametrize("scale", [1.0, 8**0.5])
@pytest.mark.parametrize("kind", [SinusoidalPositions, LearnedPositions])
def test_embedding_is_the_sum(scale, kind):
    torch.manual_seed(0)
    embedding = TokenPositionEmbedding(11, 8, kind(8, 20), scale=scale)
    ids = torch.randint(11, (3, 5))
    table, rows = embedding.tokens.weight, embedding.positions.weight
    assert torch.equal(embedding(ids), table[ids] * scale + rows[:5])
    assert torch.equal(embedding(ids, 7), table[ids] * scale + rows[7:12])
    joined = [embedding(ids[:, :2]), embedding(ids[:, 2:], offset=2)]
    assert torch.equal(torch.cat(joined, dim=1), embedding(ids))


def test_embedding_shares_its_table_with_the_logits():
    embedding = TokenPositionEmbedding(11, 8, LearnedPositions(8, 20))
    x = torch.randn(2, 3, 8)
    assert torch.allclose(embedding.logits(x), x @ embedding.tokens.weight.T)
    names = [name for name, _ in embedding.named_parameters()]
    assert names == ["tokens.weight", "positions.weight"]


def test_embedding_drops_the_sum():
    embedding = TokenPositionEmbedding(11, 64, LearnedPositions(64, 50), dropout=0.5)
    ids = torch.zeros(4, 50, dtype=torch.long)
    whole, dropped = embedding.eval()(ids), embedding.train()(ids)
    kept = dropped != 0
    assert (
        torch.allclose(dropped, whole * 2 * kept) and 0.45 < kept.float().mean() < 0.55
    )


def test_embedding_ignores_padding_ids_in_the_gradient():
    embedding = TokenPositionEmbedding(5, 4, SinusoidalPositions(4, 9), padding_idx=3)
    assert (embedding.tokens.weight[3] == 0).all()
    embedding(torch.tensor([[1, 3]])).sum().backward()
    assert embedding.tokens.weight.grad.sum(1).tolist() == [0, 4, 0, 0, 0]


def test_embedding_makes_positions_after_tokens():
    torch.manual_seed(0)
    made = TokenPositionEmbedding(5, 4, lambda: LearnedPositions(4, 9))
    torch.manual_seed(0)
    tokens = torch.nn.Embedding(5, 4)
    assert torch.equal(made.tokens.weight, tokens.weight)
    assert torch.equal(made.positions.weight, LearnedPositions(4, 9).weight)


@pytest.mark.no_shapes
def test_embedding_beyond_its_positions():
    embedding = TokenPositionEmbedding(5, 4, SinusoidalPositions(4, 3))
    with pytest.raises(InputError, match="within 0 to 2; got 2 from 2 on"):
        embedding(torch.ones(1, 2, dtype=torch.long), offset=2)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "call",
    [
        lambda: sinusoidal_table(4, 7),
        lambda: SinusoidalPositions(7, 4),
        lambda: SinusoidalPositions(8, 0),
        lambda: LearnedPositions(0, 4),
        lambda: LearnedPositions(8, -1),
        lambda: TokenPositionEmbedding(0, 4, SinusoidalPositions(4, 3)),
        lambda: TokenPositionEmbedding(5, -4, SinusoidalPositions(4, 3)),
        lambda: TokenPositionEmbedding(5, 4, SinusoidalPositions(4, 3), dropout=1.0),
    ],
)
def test_bad_configuration(call):
    with pytest.raises(ConfigError):
        call()


@pytest.mark.parametrize("positions", ["sinusoidal", "sinusoidal_halves"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half().float(),
        lambda model: model.bfloat16().double().float(),
        lambda model: model.to("meta").to_empty(device="cpu"),
        lambda model: model.to_empty(device="cpu"),
    ],
    ids=["half", "bfloat16", "meta", "empty"],
)
def test_computed_buffers_are_right_after(change, positions):
    "The whole model answers as before once its weights are loaded."
    tiny = {**an.model_info("transformer_tiny").tiny, "positions": positions}
    model = an.create_model("transformer_tiny", **tiny).eval()
    inputs = an.example_inputs("transformer_tiny", **tiny)
    state = {key: x.clone() for key, x in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**inputs)
        changed = change(model)
        changed.load_state_dict(state)
        assert torch.equal(changed(**inputs), expected)


def test_every_buffer_that_is_not_stored_is_computed():
    for name in an.list_models():
        model = an.create_model(name, device="meta", **an.model_info(name).tiny)
        for module in model.modules():
            unstored = module._non_persistent_buffers_set
            assert not unstored or isinstance(module, ComputedBuffers), name


@pytest.mark.no_shapes
@pytest.mark.parametrize("scale", [float("nan"), "1", None])
def test_a_scale_is_a_number(scale):
    with pytest.raises(ConfigError, match="scale: expected a finite number"):
        TokenPositionEmbedding(5, 8, LearnedPositions(8, 4), scale=scale)
