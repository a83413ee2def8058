"""Three small tasks of different kinds, for the tests of the loop: a classifier of
images, a detector whose targets are a list of dicts, a causal language model."""

import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from attn_notes.training.losses import token_cross_entropy


class Examples:
    """What the three have in common: examples made from a seed, shuffled batches."""

    kind = "toy"
    sizes = {"train": 22, "valid": 7}

    def setup(self, recipe):
        self.batch_size, self.seed = recipe.batch_size, recipe.seed

    def dataset(self, split):
        random = torch.Generator().manual_seed(list(self.sizes).index(split))
        return [self.example(random) for _ in range(self.sizes[split])]

    def batches(self, epoch):
        random = torch.Generator().manual_seed(1000 * self.seed + epoch)
        return torch.randperm(self.sizes["train"], generator=random).split(
            self.batch_size
        )

    def shares(self, split, rank, world_size):
        """The held-out examples of one process, three at a time."""
        mine = self.dataset(split)[rank::world_size]
        return [self.collate(mine[i : i + 3]) for i in range(0, len(mine), 3)]

    def evaluate(self, model, split="valid", rank=0, world_size=1, gather=list):
        parts = []
        for batch in self.shares(split, rank, world_size):
            counts = self.counts(batch)
            for name, (loss, _) in self.loss(model, batch).items():
                parts.append((name, loss.item(), float(counts[name])))
        parts = gather(parts)
        return {
            name: sum(p[1] for p in parts if p[0] == name)
            / max(1, sum(p[2] for p in parts if p[0] == name))
            for name in dict.fromkeys(p[0] for p in parts)
        }

    def overrides(self, config):
        return {}

    def predict(self, model, inputs, **options):
        with torch.no_grad():
            return [model(x[None]).argmax(-1)[0].tolist() for x in inputs]

    def save(self, folder):
        Path(folder, "toy.json").write_text(json.dumps({"kind": self.kind}))

    @classmethod
    def load(cls, folder, data_dir=None):
        assert json.loads(Path(folder, "toy.json").read_text()) == {"kind": cls.kind}
        return cls()


class Images(Examples):
    """Which half of a picture is the brighter one?"""

    kind = "image_classification"

    def example(self, random):
        image = torch.rand(1, 4, 6, generator=random)
        label = int(image[0, 0, 0] > 0.5)
        image[..., 3 * label : 3 * label + 3] += 0.5
        return image, label

    def collate(self, examples):
        images, labels = zip(*examples, strict=True)
        return {"images": torch.stack(images), "labels": torch.tensor(labels)}

    def counts(self, batch):
        return {"class": len(batch["labels"])}

    def loss(self, model, batch):
        logits = model(batch["images"])
        return {"class": (F.cross_entropy(logits, batch["labels"], reduction="sum"), 1)}


class Classifier(nn.Module):
    class config:
        num_classes = 2

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.ReLU())
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.1)
        self.head = nn.Linear(8, 2)

    def forward(self, images):
        return self.head(self.drop(self.norm(self.body(images))))


class Boxes(Examples):
    """Images of different sizes with zero to three boxes each: how many boxes of each
    class there are (a mean over images), and where they are (over boxes)."""

    kind = "detection"

    def example(self, random):
        height, width, n = torch.randint(3, 7, (3,), generator=random).tolist()
        n = n - 3
        image = torch.rand(3, height, width, generator=random)
        labels = torch.randint(2, (n,), generator=random)
        boxes = torch.rand(n, 4, generator=random)
        return image, {"boxes": boxes, "labels": labels, "image_id": torch.tensor(n)}

    def collate(self, examples):
        images, targets = zip(*examples, strict=True)
        return {"images": list(images), "targets": list(targets)}

    def counts(self, batch):
        boxes = sum(len(target["labels"]) for target in batch["targets"])
        return {"number": len(batch["images"]), "place": boxes}

    def loss(self, model, batch):
        dtype = next(model.parameters()).dtype
        numbers, places = model([image.to(dtype) for image in batch["images"]])
        number, place = numbers.sum() * 0, places.sum() * 0
        for i, target in enumerate(batch["targets"]):
            true = F.one_hot(target["labels"], 2).sum(0)
            number = number + F.mse_loss(numbers[i], true.to(dtype), reduction="sum")
            place = place + (places[i] - target["boxes"]).abs().sum()
        return {"number": (number, 1.0), "place": (place, 5.0)}


class Detector(nn.Module):
    class config:
        num_classes = 2

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        self.number, self.place = nn.Linear(8, 2), nn.Linear(8, 4)

    def forward(self, images):
        x = torch.stack([self.body(image.mean((1, 2))) for image in images])
        return self.number(x), self.place(x)


class Counting(Examples):
    """Causal language modelling of rows that count up in steps."""

    kind = "causal_language_modeling"

    def example(self, random):
        first, step, n = torch.randint(1, 6, (3,), generator=random).tolist()
        return torch.arange(first, first + step * (n + 2), step) % 11 + 1

    def collate(self, examples):
        n = max(map(len, examples))
        ids = torch.stack([F.pad(row, (0, n - len(row))) for row in examples])
        labels = torch.where(ids == 0, -100, ids)
        return {"input_ids": ids, "attention_mask": ids != 0, "labels": labels}

    def counts(self, batch):
        return {"next_token": (batch["labels"][:, 1:] != -100).sum()}

    def loss(self, model, batch):
        logits = model(batch["input_ids"])[:, :-1]
        loss, _ = token_cross_entropy(logits, batch["labels"][:, 1:])
        return {"next_token": (loss, 1.0)}


class LanguageModel(nn.Module):
    class config:
        vocab_size = 12

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(12, 8)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(8, 12)

    def forward(self, input_ids):
        return self.head(self.drop(self.rnn(self.tokens(input_ids))[0]))


TOYS = {
    "images": (Images, Classifier),
    "boxes": (Boxes, Detector),
    "counting": (Counting, LanguageModel),
}


def toy(name):
    """The task of this name, and a model for it."""
    task, model = TOYS[name]
    torch.manual_seed(0)
    return task(), model()
