"""Run by test_processes.py, as one process and under torchrun as two: the first process
writes what the runs gave.

Losses of each recipe; two terms with different counts in double precision; then a run
with dropout that Ctrl-C in the last process stops and that is resumed, against the
unbroken run.
"""

import hashlib
import json
import signal
import sys
from dataclasses import replace

import torch
from toys import Boxes, toy
from training_toy import RECIPE, Toy, toy_model

from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe

RECIPES = {
    "tokens": RECIPE,
    "accumulated": replace(RECIPE, gradient_accumulation_steps=3, max_steps=6),
    "sequences": replace(RECIPE, average_over="sequences"),
    "sgd": replace(RECIPE, optimizer="sgd", learning_rate=0.5, ema_decay=None),
}


class Stopped(Toy):
    """Ctrl-C in one process only, in its fifth step."""

    calls = 0

    def loss(self, model, batch):
        from accelerate import PartialState

        self.calls += 1
        if self.calls == 5 and PartialState().is_last_process:
            signal.raise_signal(signal.SIGINT)
        return super().loss(model, batch)


DOUBLE = Recipe(
    optimizer="sgd", learning_rate=0.05, max_steps=6, batch_size=8, evaluate_every=2
)
TERMS = {
    "whole": DOUBLE,
    "halves": replace(DOUBLE, batch_size=4, gradient_accumulation_steps=2),
    "thirds": replace(DOUBLE, batch_size=3, gradient_accumulation_steps=2),
    "workers": replace(DOUBLE, num_workers=1),
}


class Shared(Boxes):
    """Counts the held-out examples that this process looks at."""

    def shares(self, *arguments):
        batches = super().shares(*arguments)
        self.looked = sum(len(batch["images"]) for batch in batches)
        return batches


def terms_of(recipe) -> dict:
    """Rows and weights of a detector in double precision."""
    task, model = Shared(), toy("boxes")[1].double()
    history = train(model, task, recipe, progress=False)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history]
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).tolist()
    return {"rows": rows, "weights": weights, "looked": task.looked}


def digest(model) -> str:
    return hashlib.sha256(
        b"".join(p.numpy().tobytes() for p in model.state_dict().values())
    ).hexdigest()


def main(folder: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for name, recipe in RECIPES.items():  # 57 rows: the last batch has a single one
        model = toy_model(dropout=0.0)
        history = train(model, Toy(57), recipe, progress=False)
        found[name] = [row["loss"] for row in history] + history.curve("valid_loss")[1]

    for name, recipe in TERMS.items():
        found[name] = terms_of(recipe)

    unbroken, broken = toy_model(), toy_model()
    train(unbroken, Toy(57), RECIPE, f"{folder}/unbroken", progress=False)
    try:
        train(broken, Stopped(57), RECIPE, f"{folder}/broken", progress=False)
    except KeyboardInterrupt as interrupt:
        found["stopped"] = str(interrupt)
    history = train(
        broken, Toy(57), RECIPE, f"{folder}/broken", resume=True, progress=False
    )
    found["steps"], found["same"] = (
        [row["step"] for row in history],
        digest(broken) == digest(unbroken),
    )

    from accelerate import PartialState

    found["world"] = PartialState().num_processes
    if PartialState().is_main_process:
        with open(f"{folder}/found.json", "w") as file:
            json.dump(found, file)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
