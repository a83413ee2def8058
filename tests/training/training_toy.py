"""A small task with padding, shared by the tests of the loop and by the processes that they start."""

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
    clip_norm=1.0,
    ema_decay=0.9,
    label_smoothing=0.1,
    evaluate_every=5,
    checkpoint_every=3,
    seed=3,
)


class Toy:
    """Rows of 1 to 9 ids, padded with 0; the target is the row sorted. 60 rows: an epoch of 8 batches of 8, the last of 4."""

    def __init__(self, rows: int = 60):
        random = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 10, (rows,), generator=random)
        ids = torch.randint(1, VOCABULARY, (rows, 9), generator=random)
        self.ids = ids * (torch.arange(9) < lengths[:, None])
        self.served = 0

    def train_batches(self, recipe, epoch, rank=0, world=1):
        order = torch.randperm(
            len(self.ids),
            generator=torch.Generator().manual_seed(1000 * recipe.seed + epoch),
        )
        for rows in order.split(recipe.batch_size):
            self.served += 1
            batch = self.batch(
                self.ids[rows[rank::world] if rank < len(rows) else rows[:1]]
            )
            if rank >= len(
                rows
            ):  # no row left for this process: one that counts nothing
                batch["target_out"].zero_()
            yield batch

    def batch(self, ids):
        high = torch.where(ids == 0, VOCABULARY, ids)  # padding sorts last
        target = high.sort(-1).values
        return {
            "source": ids,
            "source_mask": ids != 0,
            "target_out": torch.where(target == VOCABULARY, 0, target),
        }

    def loss(self, model, batch, recipe):
        return token_cross_entropy(
            model(batch["source"]),
            batch["target_out"],
            label_smoothing=recipe.label_smoothing,
        )

    def evaluate(self, model):
        batch = self.batch(self.ids)
        loss, count = token_cross_entropy(model(batch["source"]), batch["target_out"])
        return {"loss": (loss / count).item()}


class ToyModel(nn.Module):
    class config:
        source_vocab_size = target_vocab_size = VOCABULARY

    def __init__(self, dropout: float = 0.2, width: int = 16):
        super().__init__()
        self.embed, self.read = (
            nn.Embedding(VOCABULARY, width),
            nn.GRU(width, width, batch_first=True),
        )
        self.dropout, self.say = nn.Dropout(dropout), nn.Linear(width, VOCABULARY)

    def forward(self, source):
        return self.say(self.dropout(self.read(self.embed(source))[0]))


def toy_model(dropout: float = 0.2) -> ToyModel:
    torch.manual_seed(1)
    return ToyModel(dropout)
