"""Experiments that other processes can import."""

import time
from pathlib import Path

import numpy as np


def draw(seed: int, low: float) -> dict:
    return {"score": float(np.random.default_rng(seed).uniform(low, low + 1))}


def wait(seed: int, rows: str, seconds: float) -> dict:
    """Whether a file is there; so long it waits for it."""
    end = time.monotonic() + seconds
    while not Path(rows).is_file() and time.monotonic() < end:
        time.sleep(0.1)
    return {"there": Path(rows).is_file()}
