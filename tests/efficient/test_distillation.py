"""Knowledge distillation: the task with a teacher equal to what its equation says, for
images, text and the relations of tokens; layers copied from a teacher; controls that
keep what they say they keep; and refusals."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from attn_notes.efficient.distillation import (
    Taught,
    attention_inputs,
    copy_layers,
    observe_calls,
    relation_transfer,
)
from attn_notes.efficient.distillation_evidence import PermutedTeacher, permute_others
from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.language.bert import BertConfig, BertForMaskedLM
from attn_notes.language.gpt import GPT, GPTConfig
from attn_notes.training.loop import train
from attn_notes.training.losses import class_cross_entropy, token_cross_entropy
from attn_notes.training.recipes import Recipe
from attn_notes.vision.vit import ViT, ViTConfig

SIZES = {
    "img_size": 12,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 5,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
}
GPT_SIZES = GPTConfig(
    vocab_size=19,
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=24,
    dropout=0.0,
    max_position_embeddings=8,
    norm_first=True,
)


def shake(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.double()


def vit(**change):
    torch.manual_seed(0)
    return shake(ViT(ViTConfig(**SIZES | change)))


def gpt(**change):
    torch.manual_seed(0)
    return shake(GPT(replace(GPT_SIZES, **change)))


class Images:
    "A task of images with the least that training wants."

    def __init__(self, n=12):
        g = torch.Generator().manual_seed(0)
        self.images = torch.randn(n, 1, 12, 12, generator=g, dtype=torch.float64)
        self.labels = torch.randint(5, (n,), generator=g)

    def setup(self, recipe):
        self.size = recipe.batch_size

    def dataset(self, split):
        return list(zip(self.images, self.labels, strict=True))

    def batches(self, epoch=0):
        return [range(i, i + self.size) for i in range(0, 12, self.size)]

    def collate(self, rows):
        images, labels = zip(*rows, strict=True)
        return {"images": torch.stack(images), "labels": torch.stack(labels)}

    def counts(self, batch):
        return {"class": len(batch["labels"])}

    def loss(self, model, batch):
        logits = model(batch["images"])
        return {"class": (class_cross_entropy(logits, batch["labels"]), 1.0)}

    def evaluate(self, model, split="valid", *_):
        return {"loss": 0.0}


class Texts(Images):
    def loss(self, model, batch):
        logits = model(batch["input_ids"])
        return {"next_token": (token_cross_entropy(logits, batch["labels"])[0], 1.0)}

    def counts(self, batch):
        return {"next_token": int((batch["labels"] != -100).sum())}


def text_batch():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(19, (3, 8), generator=g)
    labels[0, 3:] = -100
    return {"input_ids": torch.randint(19, (3, 8), generator=g), "labels": labels}


def image_batch(n=12):
    task = Images()
    return {"images": task.images[:n], "labels": task.labels[:n]}


def by_hand(z, v, temperature):
    "T^2 KL(p || q), a loop over rows and classes."
    total = torch.zeros((), dtype=z.dtype)
    for a, b in zip(z / temperature, v / temperature, strict=True):
        q, p = a.exp() / a.exp().sum(), b.exp() / b.exp().sum()
        for i in range(len(p)):
            total = total + p[i] * (p[i].log() - q[i].log())
    return temperature**2 * total


# ---- the task


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0])
def test_images_learn_the_equation(temperature, weight):
    student, teacher, batch = vit(embed_dim=8), vit(), image_batch()
    task = Taught(Images(), teacher, temperature, weight)
    terms, counts = task.loss(student, batch), task.counts(batch)
    assert counts == {"class": 12, "teacher": 12} and terms.keys() == counts.keys()
    z, v = student(batch["images"]), teacher(batch["images"])
    wanted = (1 - weight) * functional.cross_entropy(z, batch["labels"])
    wanted = wanted + weight * by_hand(z, v, temperature) / 12
    found = sum(w * x / counts[name] for name, (x, w) in terms.items())
    assert abs(found - wanted) < 1e-12
    ours, theirs = (
        torch.autograd.grad(x, [*student.parameters()]) for x in (found, wanted)
    )
    gaps = [(a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)]
    assert max(gaps) < 1e-11
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_tokens_without_a_label_have_no_teacher():
    student, teacher, batch = gpt(hidden_size=8), gpt(), text_batch()
    task = Taught(Texts(), teacher, 2.0, 0.5)
    terms, counts = task.loss(student, batch), task.counts(batch)
    kept = batch["labels"] != -100
    assert counts == {"next_token": 19, "teacher": 19}
    z, v = (net(batch["input_ids"])[kept] for net in (student, teacher))
    assert abs(terms["teacher"][0] - by_hand(z, v, 2.0)) < 1e-10
    other = dict(batch, input_ids=batch["input_ids"].clone())
    other["input_ids"][0, 5:] = 0  # behind the last label: nothing may change
    assert torch.equal(task.loss(student, other)["teacher"][0], terms["teacher"][0])


def test_the_predicted_tokens_of_a_masked_language_model():
    """A model that gives logits where it is asked alone, (p v)."""
    config = BertConfig(
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        dropout=0.0,
    )
    torch.manual_seed(0)
    student, teacher = (shake(BertForMaskedLM(config)) for _ in range(2))
    teacher = shake(teacher).double()
    batch, kept = text_batch(), text_batch()["labels"] != -100

    class Masked(Texts):
        def loss(self, model, batch):
            logits = model(batch["input_ids"], predicted=kept)
            total, _ = token_cross_entropy(logits, batch["labels"][kept])
            return {"next_token": (total, 1.0)}

    term, _ = Taught(Masked(), teacher, 1.0, 0.5).loss(student, batch)["teacher"]
    z, v = (net(batch["input_ids"], predicted=kept) for net in (student, teacher))
    assert len(z) == 19 and abs(term - by_hand(z, v, 1.0)) < 1e-10


def test_shares_of_classes_count_examples():
    batch = image_batch() | {"labels": torch.full((12, 5), 0.2).double()}
    assert Taught(Images(), vit()).counts(batch)["teacher"] == 12


def test_the_teacher_stays_as_it_is_and_in_evaluation():
    student, teacher = vit(), vit(dropout=0.5).train()
    before = deepcopy(teacher.state_dict())
    task = Taught(Images(), teacher, 4.0, 0.9, relations=1.0)
    recipe = Recipe(max_steps=3, batch_size=4, checkpoint_every=None)
    history = train(student, task, recipe, progress=False)
    assert not teacher.training and len(history) == 3
    assert {"class", "teacher", "relations"} <= history[0].keys()
    assert all(torch.equal(x, before[k]) for k, x in teacher.state_dict().items())
    assert not student._forward_hooks and not teacher._forward_hooks


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    teacher, batch = vit(), image_batch()
    student = deepcopy(teacher)
    task = Taught(Images(), teacher, 4.0, 1.0, relations=1.0)
    terms = task.loss(student, batch)
    loss = sum(w * x for x, w in terms.values())
    grads = torch.autograd.grad(loss, [*student.parameters()], allow_unused=True)
    assert abs(loss) < 1e-12
    assert max(g.abs().max() for g in grads if g is not None) < 1e-12


def test_a_copy_of_the_task_learns_the_same():
    task, batch, student = Taught(Images(), vit()), image_batch(), vit(embed_dim=8)
    a, b = (t.loss(student, batch)["teacher"][0] for t in (task, deepcopy(task)))
    assert torch.equal(a, b)
    assert task.evaluate(student) == {"loss": 0.0}


# ---- the gradient


def test_a_high_temperature_matches_logits():
    """Hinton et al. 2015, eq. 4: T^2 times the gradient goes to the difference of the
    logits over the number of classes, where both have the mean zero."""
    torch.manual_seed(0)
    z, v = (x - x.mean() for x in torch.randn(2, 7).double())
    z.requires_grad_()
    for temperature, most in ((10.0, 0.3), (100.0, 0.03), (1000.0, 0.003)):
        (slope,) = torch.autograd.grad(by_hand(z[None], v[None], temperature), z)
        wanted = (z - v) / 7
        assert (slope - wanted).norm() / wanted.norm() < most


# ---- relations


@pytest.mark.parametrize("causal", [False, True])
def test_relations_are_those_of_a_loop(causal):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 4, 5).double().requires_grad_()
    Q, K = torch.randn(2, 2, 3, 4, 7).double()  # heads of another width
    mask = torch.ones(4, 4, dtype=torch.bool).tril()[None, None] if causal else None
    total = torch.zeros(()).double()
    for b in range(2):
        for h in range(3):
            for i in range(4):
                n = i + 1 if causal else 4
                a = (q[b, h, i] @ k[b, h, :n].T / 5**0.5).log_softmax(-1)
                t = (Q[b, h, i] @ K[b, h, :n].T / 7**0.5).softmax(-1)
                total = total + (t * (t.log() - a)).sum() / 12
    found = relation_transfer((q, k), (Q, K), mask)
    assert abs(found - total) < 1e-12
    x, y = (torch.autograd.grad(z, (q, k)) for z in (found, total))
    assert max((a - b).abs().max() for a, b in zip(x, y, strict=True)) < 1e-12


def test_inputs_of_attention_are_what_it_gets():
    model, images = vit(), image_batch(3)["images"]
    layer = model.encoder.layers[1]
    with attention_inputs(model) as found, observe_calls(layer) as calls:
        model(images)
    assert list(found) == [f"encoder.layers.{i}.attention.attention" for i in (0, 1)]
    wanted = layer.attention.project(layer.norm1(calls[0][0][0]))
    *some, mask = [*found.values()][-1]
    assert mask is None and some[0].shape == (3, 2, 10, 8)
    assert all(torch.equal(x, y) for x, y in zip(some, wanted, strict=True))
    assert all(x.requires_grad for x in some)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_relations_of_a_decoder_are_causal():
    student, teacher, batch = gpt(hidden_size=8), gpt(), text_batch()
    with attention_inputs(student) as found:
        student(batch["input_ids"])
    *_, mask = [*found.values()][-1]
    assert torch.equal(mask[0, 0], torch.ones(8, 8, dtype=torch.bool).tril())
    task = Taught(Texts(), teacher, relations=0.5)
    total, weight = task.loss(student, batch)["relations"]
    assert weight == 0.5 and total.isfinite() and total > 0
    assert task.counts(batch)["relations"] == 3


# ---- layers


@pytest.mark.parametrize(
    "depth, wanted", [(2, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (1, [0])]
)
def test_layers_are_spread(depth, wanted):
    teacher, student = gpt(), gpt(num_hidden_layers=depth)
    assert copy_layers(student, teacher) == wanted
    for mine, i in zip(student.decoder.layers, wanted, strict=True):
        theirs = teacher.decoder.layers[i].state_dict()
        assert all(torch.equal(x, theirs[k]) for k, x in mine.state_dict().items())
    assert torch.equal(student.embedding.tokens.weight, teacher.embedding.tokens.weight)


def test_a_student_of_all_layers_is_its_teacher():
    teacher, ids = gpt(), text_batch()["input_ids"]
    student = GPT(GPT_SIZES).double()
    copy_layers(student, teacher)
    assert torch.equal(student(ids), teacher(ids))
    order = [3, 1]
    student = gpt(num_hidden_layers=2)
    copy_layers(student, teacher, order)
    teacher.decoder.layers = torch.nn.ModuleList(
        teacher.decoder.layers[i] for i in order
    )
    assert torch.equal(student(ids), teacher(ids))


def test_layers_of_images_too():
    teacher, student = vit(depth=4), vit(depth=2)
    assert copy_layers(student, teacher) == [0, 2]
    images = image_batch()["images"]
    teacher.encoder.layers = teacher.encoder.layers[::2]
    assert torch.equal(student(images), teacher(images))


# ---- the control


def test_a_permuted_teacher_keeps_its_certainty():
    torch.manual_seed(0)
    z = torch.randn(40, 3, 7).double()
    found = permute_others(z)
    top = z.argmax(-1)
    assert torch.equal(found.argmax(-1), top)
    assert torch.equal(found.sort(-1).values, z.sort(-1).values)
    assert torch.equal(found.max(-1).values, z.max(-1).values)
    mean = torch.stack([permute_others(z) for _ in range(4000)]).mean(0)
    flat = (z.sum(-1) - z.max(-1).values) / 6
    stray = (mean - flat[..., None]).scatter(-1, top[..., None], 0)
    assert stray.abs().max() < 0.15  # on average the others are all alike
    teacher, images = vit(), image_batch()["images"]
    found, wanted = PermutedTeacher(teacher)(images), teacher(images)
    assert torch.equal(found.max(-1).values, wanted.max(-1).values)
    assert not torch.equal(found, wanted)


def test_two_classes_have_nothing_to_permute():
    z = torch.randn(5, 2).double()
    assert torch.equal(permute_others(z), z)


# ---- refusals


@pytest.mark.no_shapes
def test_refusals_say_what_was_expected():
    teacher = vit()
    for change in ({"temperature": 0.0}, {"weight": 1.5}, {"relations": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            Taught(Images(), teacher, **change)
    with pytest.raises(ConfigError, match="2 numbers from 0 to 3"):
        copy_layers(gpt(num_hidden_layers=2), gpt(), [0, 4])
    with pytest.raises(ConfigError, match="2 numbers from 0 to 3"):
        copy_layers(gpt(num_hidden_layers=2), gpt(), [0])
    student = gpt(num_hidden_layers=2, hidden_size=8)
    before = deepcopy(student.state_dict())
    with pytest.raises(ConfigError, match="embedding.tokens.weight of shape"):
        copy_layers(student, gpt())
    assert all(torch.equal(x, before[k]) for k, x in student.state_dict().items())
    with pytest.raises(ConfigError, match="got none"):
        copy_layers(gpt(), vit())
    with pytest.raises(InputError, match="heads"):
        relation_transfer(
            (torch.zeros(1, 2, 3, 4),) * 2, (torch.zeros(1, 4, 3, 2),) * 2
        )
    with pytest.raises(InputError, match="teacher_logits"):
        Taught(Images(), vit(num_classes=6)).loss(vit(), image_batch())


@pytest.mark.no_shapes
def test_models_that_can_not_be_taught():
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = vit()

        def forward(self, images):
            return {"logits": self.net(images)}

    class OfPairs(Images):
        def loss(self, model, batch):
            logits = model(batch["images"])["logits"]
            return {"class": (class_cross_entropy(logits, batch["labels"]), 1.0)}

    with pytest.raises(ConfigError, match="a tensor of logits; got dict"):
        Taught(OfPairs(), vit()).loss(Pair(), image_batch())
    dense = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 5)).double()
    with pytest.raises(ConfigError, match="attention in both models"):
        Taught(Images(), vit(), relations=1.0).loss(dense, image_batch())
    assert Taught(Images(), vit()).loss(dense, image_batch())["teacher"][0] > 0


def test_calls_are_observed_and_no_longer():
    model, images = vit(), image_batch(2)["images"]
    with observe_calls(model) as calls:
        out = model(images=images)
    assert len(calls) == 1 and calls[0][0] == () and calls[0][1]["images"] is images
    assert torch.equal(calls[0][2], out)
    model(images)
    assert len(calls) == 1
