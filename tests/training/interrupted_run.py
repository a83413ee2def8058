"""Run by test_experiments.py as a process of its own, in a folder: six runs in two
processes. The first is done at once, the others take a minute; each says that it has
begun."""

import signal
import sys
import time
from pathlib import Path

from attn_notes.training import experiments


def linger(seed: int, folder: str) -> dict:
    (Path(folder) / f"begun {seed}").touch()
    time.sleep(60 if seed else 0)
    return {"score": seed}


if __name__ == "__main__":
    import interrupted_run  # as the processes of the run import it

    # as from a terminal; what a shell starts in the background ignores interrupts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    experiments.artifacts_folder = lambda: Path(sys.argv[1])
    experiments.import_chapters = lambda chapters=(): None
    declare = experiments.experiment(
        "chapter", "slow", [{"folder": sys.argv[1]}], range(6)
    )
    declare(interrupted_run.linger)
    experiments.main(["run", "chapter", "--workers", "2"])
