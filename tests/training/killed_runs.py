"""Run by test_resume.py as a process of its own: for each moment, a training that is
killed by SIGKILL there, then one that resumes it.

Prints a JSON object {moment: {"killed": signal, "step": of the checkpoint found,
"digest": of the weights at the end, "steps": in metrics.jsonl}}. Each run is a fork of
this process, which has only imported torch and not yet computed with it.
"""

import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import accelerate.utils  # noqa: F401  before the forks
import torch
import torch._dynamo
import torch.utils.tensorboard
from training_toy import RECIPE, Toy, toy_model

from attn_notes.training import checkpoints, history, loop

AVERAGING = replace(RECIPE, ema_decay=None, average_last=3, average_every=2)


def recipe_of(moment: str):
    """The moments of an averaging run end in these words."""
    return AVERAGING if moment.endswith(", averaging") else RECIPE


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def dying(function, call: int, before: bool = True):
    """`function`, which kills its process at the n-th call, before or after it."""
    calls = iter(range(1, 10**6))

    def wrapped(*arguments, **options):
        n = next(calls)
        if n == call and before:
            die()
        result = function(*arguments, **options)
        if n == call:
            die()
        return result

    return wrapped


def half_a_file(save, call: int):
    """torch.save, which at its n-th call writes half of the bytes and dies."""
    calls = iter(range(1, 10**6))

    def wrapped(state, file):
        if next(calls) != call:
            return save(state, file)
        import io

        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        die()

    return wrapped


def half_a_line(record, call: int):
    """RunFiles.write, which at its n-th call leaves half a line and dies."""
    calls = iter(range(1, 10**6))

    def wrapped(self, row):
        if next(calls) != call:
            return record(self, row)
        self.metrics.write(b'{"step": 99, "lo')
        die()

    return wrapped


def sabotage(moment: str) -> None:
    """Arrange for this process to be killed."""
    moment = moment.removesuffix(", averaging")
    if moment == "in a forward pass":
        Toy.loss = dying(Toy.loss, 8)
    elif moment == "between gradient and update":
        torch.optim.Adam.step = dying(torch.optim.Adam.step, 5)
    elif moment == "half a checkpoint":
        torch.save = half_a_file(torch.save, 3)
    elif moment == "before the rename":
        checkpoints.os.replace = dying(os.replace, 2)
    elif moment == "after the rename":
        checkpoints.os.replace = dying(os.replace, 3, before=False)
    elif moment == "half a line":
        history.RunFiles.write = half_a_line(history.RunFiles.write, 8)
    elif moment == "while evaluating":
        Toy.evaluate = dying(Toy.evaluate, 2)


def in_fork(work, *arguments) -> int:
    """Do it in a child process; the signal that ended it, 0 if none."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def first_run(folder: Path, moment: str) -> None:
    sabotage(moment)
    loop.train(toy_model(), Toy(), recipe_of(moment), folder, progress=False)


def resumed_run(folder: Path, moment: str) -> None:
    model = toy_model()
    loop.train(model, Toy(), recipe_of(moment), folder, resume=True, progress=False)
    (folder / "digest").write_text(digest(model))


def note_step(folder: Path) -> None:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    (folder / "step").write_text(str(state["step"]))


def digest(model) -> str:
    return hashlib.sha256(
        b"".join(p.numpy().tobytes() for p in model.state_dict().values())
    ).hexdigest()


def killed_from_outside(folder: Path, lines: int) -> int:
    """Start a run and kill it from here, as soon as its metrics have so many lines."""
    pid = os.fork()
    if pid == 0:
        first_run(folder, "")
        os._exit(0)
    while (
        not (folder / "metrics.jsonl").exists()
        or (folder / "metrics.jsonl").read_bytes().count(b"\n") < lines
    ):
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def main(root: Path, moments: list[str]) -> None:
    torch.set_num_threads(1)
    found = {}
    for i, moment in enumerate(moments):
        folder = root / str(i)
        killed = (
            killed_from_outside(folder, 4)
            if moment == "from outside"
            else in_fork(first_run, folder, moment)
        )
        in_fork(note_step, folder)
        in_fork(resumed_run, folder, moment)
        steps = [
            json.loads(line)["step"]
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        found[moment] = {
            "killed": killed,
            "step": int((folder / "step").read_text()),
            "digest": (folder / "digest").read_text(),
            "steps": steps,
            "parts": [p.name for p in folder.iterdir() if p.name.endswith(".part")],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
