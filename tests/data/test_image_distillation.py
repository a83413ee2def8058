"""Distillation of image classifiers: the terms of the loss by hand, teachers from
everywhere, and students with one head or two."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attn_notes.data.image_classification import ImageClassification
from attn_notes.data.image_distillation import ImageDistillation, Teacher
from attn_notes.data.images import Preprocessing
from attn_notes.data.tasks import create_task, kind_of_data, load_task
from attn_notes.foundations.checks import CheckpointError, ConfigError
from attn_notes.training.loop import train
from attn_notes.training.recipes import Augmentation, Recipe
from attn_notes.training.tasks import Task
from attn_notes.zoo.factory import create_model

KINDS = ("none", "soft", "hard")
SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10}
SMALL |= {"embed_dim": 12, "depth": 1, "num_heads": 2}


def student(distilled=True):
    torch.manual_seed(0)
    name = "deit_book_distilled" if distilled else "deit_book"
    return create_model(name, **SMALL, drop_path_rate=0.0)


def cnn():
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 10)
    return nn.Sequential(*layers, nn.Dropout(0.5))


def distillation(kind="hard", teacher=None, **options):
    teacher = cnn() if teacher is None and kind != "none" else teacher
    options = {"teacher": teacher, "distillation": kind, "augment": False, **options}
    return create_task("image_distillation", "digits", **options)


def batch_of(task, n=6):
    rows = task.dataset("train")
    return task.collate([rows[i] for i in range(n)])


def test_it_is_a_task():
    task = distillation()
    assert isinstance(task, Task) and task.kind == "image_distillation"
    assert kind_of_data("mnist", task.kind) == task.kind


@pytest.mark.parametrize("distilled", [True, False], ids=["two heads", "one head"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixed", [False, True], ids=["numbers", "shares"])
def test_the_loss_by_hand(kind, distilled, mixed):
    """Equations 2 and 3; a head alone learns both."""
    task, net = distillation(kind), student(distilled)
    task.setup(Recipe(label_smoothing=0.1))
    batch = batch_of(task)
    y = F.one_hot(batch["labels"], 10).float()
    if mixed:
        batch["labels"] = y = 0.7 * y + 0.3 * y.flip(0)
    heads = net.forward_heads(batch["images"])
    z = heads.logits
    z_teacher = heads.distillation_logits if distilled else z
    smooth = 0.9 * y + 0.01
    cross = lambda logits, target: -(target * logits.log_softmax(-1)).sum()
    found, counts = task.loss(net, batch), task.counts(batch)
    assert found.keys() == counts.keys() and set(counts.values()) == {6}
    total = sum(term * weight for term, weight in found.values())
    if kind == "none":
        expected = (cross(z, smooth) + cross(z_teacher, smooth)) / 2
    else:
        said = task.teacher.model.eval()(batch["images"])
        expected = cross(z_teacher, F.one_hot(said.argmax(-1), 10)) / 2
        expected += cross(z, smooth) / 2
    if kind == "soft":
        p, q = (said / 3).softmax(-1), (z_teacher / 3).softmax(-1)
        expected = 0.9 * cross(z, smooth) + 0.1 * 9 * (p * (p / q).log()).sum()
    assert torch.allclose(total, expected, rtol=1e-5)


def test_the_teacher_stands_still():
    """No dropout, no statistics, no gradient; what it sees is what the student sees."""
    teacher, seen = cnn(), []
    teacher[0].register_forward_pre_hook(lambda m, x: seen.append(x[0].clone()))
    task, before = distillation(teacher=teacher), None
    task.setup(Recipe(augmentation=Augmentation(mixup=0.8)))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    net, batch = student(), batch_of(task)
    losses = [task.loss(net, batch)["distillation"][0] for _ in range(2)]
    assert losses[0] == losses[1] and torch.equal(seen[0], batch["images"])
    losses[0].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert net.distillation_head.weight.grad.abs().max() > 0
    assert net.head.weight.grad is None or net.head.weight.grad.abs().max() == 0


def test_a_teacher_that_was_taught_in_other_colours():
    ours = Preprocessing((4, 4), 4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    theirs = Preprocessing((4, 4), 4, mean=(0.1, 0.2, 0.3), std=(0.9, 0.8, 0.7))
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    found = Teacher(nn.Flatten(), ours, theirs)(ours.normalize(images))
    assert torch.allclose(found, theirs.normalize(images).flatten(1), atol=1e-6)
    values = ours.normalize(images)
    assert torch.equal(Teacher(nn.Flatten(), ours)(values), values.flatten(1))
    with pytest.raises(ConfigError, match="teacher: expected one for 3 channels; got"):
        Teacher(nn.Flatten(), ours, Preprocessing((4, 4), 4, mean=(0,), std=(1,)))


@pytest.fixture
def folder(tmp_path):
    """What a run of this package leaves: a model that tells digits, with its task."""
    net = student(distilled=False)
    plain = Preprocessing((8, 8), 8, mean=(0.2,), std=(0.3,))
    task = create_task("image_classification", "digits", preprocessing=plain)
    net.save_pretrained(tmp_path / "teacher"), task.save(tmp_path / "teacher")
    return net.eval(), tmp_path / "teacher"


def test_a_teacher_from_a_folder(folder):
    net, path = folder
    task = distillation(teacher=path)
    rows = task.dataset("train")
    images = torch.stack([rows[i][0] for i in range(3)])
    expected = net((images / 255 - 0.2) / 0.3)
    found = task.teacher(task.preprocessing.normalize(images))
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_teacher_of_torchvision(tmp_path):
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    theirs, path = squeezenet1_1(num_classes=10).eval(), tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    given = {"teacher": "squeezenet1_1", "teacher_weights": path, "limit": 20}
    task = create_task("image_distillation", "photographs", **given)
    rows = task.dataset("train")
    images = torch.stack([rows[i][0] for i in range(2)])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ))  # fmt: skip
    found = task.teacher(task.preprocessing.normalize(images))
    assert torch.allclose(found, theirs((images / 255 - mean) / std), atol=1e-4)
    torch.save(squeezenet1_1(num_classes=9).state_dict(), path)
    with pytest.raises(CheckpointError, match="misshapen: classifier"):
        create_task("image_distillation", "photographs", **given)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_and_saved_it_needs_no_teacher(kind, tmp_path):
    task, net = distillation(kind, limit=64), student()
    recipe = Recipe(max_steps=6, batch_size=16, learning_rate=1e-2)
    history = train(net, task, recipe, progress=False)
    both = {"class", "distillation"} <= history[0].keys()
    assert both == (kind != "none") and history[-1]["valid_accuracy"] > 0
    task.save(tmp_path)
    loaded = load_task(tmp_path)
    assert type(loaded) is ImageClassification
    image = task.dataset("valid")[0][0]
    assert loaded.predict(net, [image]) == task.predict(net, [image])


def test_a_student_learns_what_its_teacher_says():
    """Of a teacher that calls every digit by the next number."""

    class Liar(nn.Module):
        def forward(self, images):
            return 9 * F.one_hot((labels + 1) % 10, 10).float()

    task, net = distillation(teacher=Liar()), student()
    batch = batch_of(task, 40)
    labels = batch["labels"]
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        sum(term * w for term, w in task.loss(net, batch).values()).backward()
        optimizer.step()
    heads = net.forward_heads(batch["images"])
    assert (heads.logits.argmax(-1) == labels).double().mean() > 0.9
    learned = heads.distillation_logits.argmax(-1)
    assert (learned == (labels + 1) % 10).double().mean() > 0.9


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "options, error, said",
    [
        ({"teacher": None}, ConfigError, "teacher: expected one for soft and hard"),
        ({"kind": "none", "teacher": nn.Flatten()}, ConfigError, "none for none"),
        ({"kind": "warm"}, ConfigError, "distillation: expected"),
        ({"teacher": "absent"}, CheckpointError, "absent"),
        (
            {"teacher": "squeezenet", "teacher_weights": "w.pth"},
            ConfigError,
            "teacher: expected a folder, or the name of a model of torchvision's",
        ),
    ],
    ids=["none", "one too many", "kind", "folder", "name"],
)
def test_bad_teachers(options, error, said):
    kind = options.pop("kind", "hard")
    with pytest.raises(error, match=said):
        create_task("image_distillation", "digits", distillation=kind, **options)


def test_other_classes_and_other_logits(folder):
    net, path = folder
    with pytest.raises(ConfigError, match="teacher: expected the 10 classes.*'astro"):
        create_task("image_distillation", "photographs", teacher=path)
    task = distillation(teacher=nn.Flatten())
    with pytest.raises(ConfigError, match=r"expected logits of shape \(6, 10\)"):
        task.loss(net, batch_of(task))
    assert ImageDistillation.kind == "image_distillation"
