"""Learning rates, as one number per step."""

import numpy as np

SCHEDULES = ("constant", "cosine")


def learning_rates(schedule: str, peak: float, steps: int, *, warmup_steps: int = 0) -> np.ndarray:
    """Learning rate of every step of a stage, float32 (steps,).

    Args:
      schedule: "constant", or "cosine": ½ peak (1 + cos πt), t from 0 to 1 after the warm-up.
      peak: The rate after the warm-up.
      steps: Of the whole stage.
      warmup_steps: The first steps rise linearly, from peak / warmup_steps to the peak.
    """
    step = np.arange(steps)
    progress = np.clip((step - warmup_steps) / max(steps - warmup_steps, 1), 0.0, 1.0)
    decay = np.ones(steps) if schedule == "constant" else 0.5 * (1 + np.cos(np.pi * progress))
    warmup = np.minimum((step + 1) / warmup_steps, 1.0) if warmup_steps else np.ones(steps)
    return (peak * np.where(step < warmup_steps, warmup, decay)).astype(np.float32)
