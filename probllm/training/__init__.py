"""One loop for all models: optimisers, schedules, checkpoints, resuming."""

from probllm.training.fit import fit
from probllm.training.precision import fast_bfloat16
from probllm.training.run import Run

__all__ = ["Run", "fast_bfloat16", "fit"]
