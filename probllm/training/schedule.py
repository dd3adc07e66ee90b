"""The learning rate over a run, as a factor of its highest value and a function of progress alone.

With p in (0, 1] the part of the run that is done, w the part spent on warming up and d the part spent on decay,

    constant: min(1, p / w)
    cosine:   min(1, p / w) * (1 + cos(pi * max(0, p - w) / (1 - w))) / 2      Loshchilov and Hutter (2017), eq. 5
    wsd:      min(1, p / w) * (1 - sqrt(max(0, p - (1 - d)) / d))              Hägele et al. (2024)

so that a run which goes on after a kill needs no state but its place. ``wsd`` is warm-up, stable, decay (Hu et al.,
2024): until the decay begins, the weights are those of a run of any length.
"""

import math
from typing import Literal, TypeAlias, get_args

Schedule: TypeAlias = Literal["constant", "cosine", "wsd"]
SCHEDULES = get_args(Schedule)


def rate_factor(schedule: Schedule, progress: float, warmup: float, decay: float) -> float:
    """The factor on the learning rate.

    Args:
        schedule: ``"constant"``, ``"cosine"`` or ``"wsd"``, all after a linear warm-up.
        progress: the part of the run that is done, in (0, 1]; the middle of a step is a good choice.
        warmup: the part of the run over which the rate rises, in [0, 1).
        decay: the part of the run over which ``"wsd"`` lets it fall, in (0, 1].
    """
    factor = min(1.0, progress / warmup) if warmup > 0 else 1.0
    if schedule == "cosine":
        factor *= (1 + math.cos(math.pi * max(0.0, progress - warmup) / (1 - warmup))) / 2
    elif schedule == "wsd":
        factor *= 1 - math.sqrt(max(0.0, progress - (1 - decay)) / decay)
    return factor
