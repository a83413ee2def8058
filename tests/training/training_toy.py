"""A small task with padding, shared by the tests of the loop and by the processes that
they start."""

import torch
from torch import nn

from attn_notes.training.losses import token_cross_entropy
from attn_notes.training.recipes import Recipe

VOCABULARY = 12
RECIPE = Recipe(
    learning_rate=1e-2,
    schedule="cosine",
    warmup_steps=2,
    max_steps=12,
    batch_size=8,
    max_grad_norm=1.0,
    ema_decay=0.9,
    label_smoothing=0.1,
    evaluate_every=5,
    checkpoint_every=3,
    seed=3,
)


class Toy:
    """Rows of 1 to 9 ids, padded with 0; the labels are the row sorted. 60 rows: an
    epoch of 8 batches of 8, the last of 4."""

    kind = "toy"

    def __init__(self, rows: int = 60):
        random = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 10, (rows,), generator=random)
        ids = torch.randint(1, VOCABULARY, (rows, 9), generator=random)
        self.ids = ids * (torch.arange(9) < lengths[:, None])
        self.served = 0

    def setup(self, recipe):
        self.recipe = recipe

    def dataset(self, split):
        return self.ids

    def batches(self, epoch):
        random = torch.Generator().manual_seed(1000 * self.recipe.seed + epoch)
        order = torch.randperm(len(self.ids), generator=random)
        return order.split(self.recipe.batch_size)

    def collate(self, examples):
        self.served += 1
        ids = torch.stack(examples)
        high = torch.where(ids == 0, VOCABULARY, ids)  # padding sorts last
        labels = high.sort(-1).values
        return {
            "input_ids": ids,
            "attention_mask": ids != 0,
            "labels": torch.where(labels == VOCABULARY, -100, labels),
        }

    def counts(self, batch):
        tokens = (batch["labels"] != -100).sum()
        rows = len(batch["labels"])
        return {"token": tokens if self.recipe.average_over == "tokens" else rows}

    def loss(self, model, batch):
        loss, _ = token_cross_entropy(
            model(batch["input_ids"]),
            batch["labels"],
            label_smoothing=self.recipe.label_smoothing,
        )
        return {"token": (loss, 1.0)}

    def evaluate(self, model, split="valid", rank=0, world_size=1, gather=list):
        batch = self.collate(list(self.ids[rank::world_size]))
        loss, count = token_cross_entropy(model(batch["input_ids"]), batch["labels"])
        parts = gather([(loss.item(), int(count))])
        return {"loss": sum(loss for loss, _ in parts) / sum(n for _, n in parts)}


def serve(task, recipe, epoch=0):
    """The batches of an epoch, whole."""
    task.setup(recipe)
    for rows in task.batches(epoch):
        yield task.collate([task.dataset("train")[int(i)] for i in rows])


def toy_loss(task, model, batch):
    """The mean loss of one batch."""
    terms, counts = task.loss(model, batch), task.counts(batch)
    return sum(weight * loss / counts[name] for name, (loss, weight) in terms.items())


class ToyModel(nn.Module):
    class config:
        vocab_size = VOCABULARY

    def __init__(self, dropout: float = 0.2, width: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(width, VOCABULARY)

    def forward(self, input_ids):
        return self.head(self.dropout(self.rnn(self.embedding(input_ids))[0]))


def toy_model(dropout: float = 0.2) -> ToyModel:
    torch.manual_seed(1)
    return ToyModel(dropout)
