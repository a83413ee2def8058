"""An experiment that other processes can import."""

import numpy as np


def draw(seed: int, low: float) -> dict:
    return {"score": float(np.random.default_rng(seed).uniform(low, low + 1))}
