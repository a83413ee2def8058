import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.training.losses import (
    class_cross_entropy,
    dice_cross_entropy,
    hard_distillation,
    smoothing_of_others,
    soft_distillation,
    token_cross_entropy,
)


@given(
    b=st.integers(1, 4),
    m=st.integers(1, 6),
    v=st.integers(2, 9),
    eps=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 99),
)
def test_equals_its_definition(b, m, v, eps, seed):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(b, m, v, generator=random, dtype=torch.float64)
    labels = torch.randint(v, (b, m), generator=random)
    loss, count = token_cross_entropy(logits, labels, 0, eps)
    q = (1 - eps) * F.one_hot(labels, v) + eps / v
    each = -(q * logits.log_softmax(-1)).sum(-1)
    assert count == (labels != 0).sum()
    assert torch.allclose(loss, each[labels != 0].sum())


@given(
    b=st.integers(1, 4),
    m=st.integers(1, 6),
    v=st.integers(2, 9),
    eps=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 99),
)
def test_smoothing_over_the_others_equals_its_definition(b, m, v, eps, seed):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(b, m, v, generator=random, dtype=torch.float64)
    labels = torch.randint(v, (b, m), generator=random)
    loss, _ = token_cross_entropy(
        logits, labels, ignore_index=0, label_smoothing=smoothing_of_others(eps, v)
    )
    q = torch.full_like(logits, eps / (v - 1)).scatter(-1, labels[..., None], 1 - eps)
    each = -(q * logits.log_softmax(-1)).sum(-1)
    assert torch.allclose(loss, each[labels != 0].sum())


@pytest.mark.no_shapes
@pytest.mark.parametrize("eps, v", [(-0.1, 5), (0.9, 5), (0.1, 1), (float("nan"), 5)])
def test_shares_that_can_not_be(eps, v):
    with pytest.raises(ConfigError, match="label_smoothing"):
        smoothing_of_others(eps, v)


def test_sums_and_counts_of_parts_add_up():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5, 8), torch.randint(8, (6, 5))
    parts = [
        token_cross_entropy(z, y, label_smoothing=0.1)
        for z, y in zip(logits.split(2), labels.split(2), strict=True)
    ]
    whole = token_cross_entropy(logits, labels, label_smoothing=0.1)
    assert (
        torch.allclose(sum(p[0] for p in parts), whole[0])
        and sum(p[1] for p in parts) == whole[1]
    )


def test_padding_has_no_gradient_and_a_batch_of_padding_no_loss():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[1, 2, 9], [3, 9, 9]])
    token_cross_entropy(logits, labels, ignore_index=9)[0].backward()
    assert (logits.grad.abs().sum(-1) > 0).equal(labels != 9)
    loss, count = token_cross_entropy(logits, torch.full((2, 3), 9), ignore_index=9)
    assert loss == 0 and count == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_sum_is_float32(dtype):
    logits = torch.randn(2, 3, 5, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = token_cross_entropy(logits, torch.ones(2, 3, dtype=torch.long))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.5])
def test_forbidden_tokens_are_as_if_they_were_not_there(eps):
    "Loss and gradient; a label that is forbidden has an infinite loss."
    torch.manual_seed(0)
    kept, labels = torch.tensor([0, 2, 3, 5]), torch.tensor([[0, 1, 3], [2, 9, 9]])
    small = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    logits = torch.full((2, 3, 6), -torch.inf, dtype=torch.float64)
    logits = logits.index_copy(-1, kept, small)
    wide = kept[labels.clamp(max=3)].where(labels != 9, 9)
    expected, _ = token_cross_entropy(small, labels, 9, eps)
    found, count = token_cross_entropy(logits, wide, 9, eps)
    assert torch.allclose(found, expected) and count == 4
    a, b = (
        torch.autograd.grad(x, small, retain_graph=True)[0] for x in (found, expected)
    )
    assert torch.allclose(a, b)
    assert token_cross_entropy(logits, torch.ones_like(wide), 9, eps)[0] == torch.inf


@pytest.mark.no_shapes
@pytest.mark.parametrize("shape", [(3, 2), (1, 3), (6,), (2, 3, 5)])
def test_labels_are_of_the_logits_shape(shape):
    with pytest.raises(InputError, match=r"labels: expected shape \(2, 3\)"):
        token_cross_entropy(torch.randn(2, 3, 5), torch.zeros(shape).long())


@pytest.mark.no_shapes
@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "0.1", None, True])
def test_a_share_that_is_none(share):
    logits, labels = torch.randn(2, 5), torch.tensor([1, 2])
    with pytest.raises(ConfigError, match="label_smoothing: expected a number from 0"):
        token_cross_entropy(logits, labels, label_smoothing=share)
    with pytest.raises(ConfigError, match="label_smoothing: expected a number from 0"):
        smoothing_of_others(share, 5)
    with pytest.raises(ConfigError, match="vocab_size: expected a whole number"):
        smoothing_of_others(0.1, 2.5)


# ---- classes, and teachers


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_classes_as_numbers_and_as_shares(eps):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5).double(), torch.arange(6) % 5
    numbered = class_cross_entropy(logits, labels, eps)
    assert torch.equal(numbered, token_cross_entropy(logits, labels, -100, eps)[0])
    whole = F.one_hot(labels, 5).float()
    assert torch.allclose(class_cross_entropy(logits, whole, eps), numbered)
    mixed = class_cross_entropy(logits, 0.3 * whole + 0.7 * whole.flip(0), eps)
    parts = [class_cross_entropy(logits, x, eps) for x in (labels, labels.flip(0))]
    assert torch.allclose(mixed, 0.3 * parts[0] + 0.7 * parts[1])


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_soft_distillation_by_hand(tau):
    torch.manual_seed(0)
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    p, q = (teacher / tau).softmax(-1), (logits / tau).softmax(-1)
    expected = tau**2 * (p * (p / q).log()).sum()
    found = soft_distillation(logits, teacher, tau)
    assert torch.allclose(found, expected)
    found.backward()
    assert teacher.grad is None and torch.allclose(logits.grad, tau * (q - p))


def test_hard_distillation_is_the_teachers_choice():
    logits, teacher = torch.randn(4, 5), torch.eye(5)[[3, 0, 4, 4]]
    expected = class_cross_entropy(logits, torch.tensor([3, 0, 4, 4]))
    assert torch.equal(hard_distillation(logits, 9 * teacher), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_classes_are_float32(dtype):
    logits = torch.randn(300, 5, dtype=dtype)
    for loss in (
        class_cross_entropy(logits, torch.arange(300) % 5),
        soft_distillation(logits, logits.flip(0)),
        hard_distillation(logits, logits.flip(0)),
        *dice_cross_entropy(logits[..., None], torch.arange(300)[:, None] % 5),
    ):
        assert loss.dtype == torch.float32


@pytest.mark.no_shapes
def test_classes_and_teachers_of_another_shape():
    logits = torch.randn(4, 5)
    for labels in (torch.zeros(5).long(), torch.zeros(4), torch.zeros(4, 6)):
        with pytest.raises(InputError, match=r"labels: expected shape \(4"):
            class_cross_entropy(logits, labels)
    for loss in (soft_distillation, hard_distillation):
        with pytest.raises(InputError, match=r"teacher_logits: expected shape \(4, 5"):
            loss(logits, torch.zeros(4, 6))
    with pytest.raises(
        ConfigError, match="temperature: expected a finite number above 0"
    ):
        soft_distillation(logits, logits, 0.0)


def monai_loss():
    losses = pytest.importorskip("monai.losses")
    return losses.DiceCELoss(
        softmax=True, squared_pred=True, smooth_nr=0.0, smooth_dr=1e-6
    )


@pytest.mark.parametrize("sides", [(4, 5, 6), (7, 3)], ids=["volume", "image"])
def test_dice_and_cross_entropy_equal_monais(sides):
    """Of its truth as shares in double precision: from numbers it makes float32."""
    torch.manual_seed(0)
    logits = torch.randn(3, 5, *sides, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (3, *sides))  # the last class is absent
    dice, cross_entropy = dice_cross_entropy(logits, labels)
    found = dice / 3 + cross_entropy / labels.numel()
    truth = F.one_hot(labels, 5).movedim(-1, 1).double()
    expected = monai_loss()(logits, truth)
    assert abs(found - expected) < 1e-12
    (gradient,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(torch.autograd.grad(found, logits)[0], gradient, atol=1e-14)


def test_the_limits_of_dice():
    labels = torch.randint(
        0, 3, (2, 4, 4, 4), generator=torch.Generator().manual_seed(0)
    )
    sure = 50.0 * F.one_hot(labels, 3).movedim(-1, 1).double()
    dice, cross_entropy = dice_cross_entropy(sure, labels)
    assert dice < 1e-6 and cross_entropy < 1e-12  # perfect
    wrong, _ = dice_cross_entropy(sure.roll(1, 1), labels)
    assert abs(wrong - 2) < 1e-12  # nothing in common, in each of two
    absent = torch.cat([sure, torch.full_like(sure[:, :1], -50.0)], 1)
    assert abs(dice_cross_entropy(absent, labels)[0] - 2 / 4) < 1e-6
    parts = [dice_cross_entropy(sure[i : i + 1], labels[i : i + 1]) for i in range(2)]
    assert torch.allclose(sum(part[0] for part in parts), dice)


@pytest.mark.no_shapes
@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 4), (1, 4, 4)], ids=str)
def test_labels_of_other_voxels(shape):
    with pytest.raises(InputError, match=r"^labels: expected shape \(2, 4, 4\)"):
        dice_cross_entropy(torch.zeros(2, 3, 4, 4), torch.zeros(shape).long())
