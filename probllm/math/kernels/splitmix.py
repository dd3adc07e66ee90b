"""Random numbers for kernels that cannot tell beforehand how many they take: splitmix64 from a seed.

Steele, Lea and Flood (2014), "Fast splittable pseudorandom number generators".
"""

from __future__ import annotations

import numpy as np

from probllm.math.kernels.compiled import compiled

_GOLDEN, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31, _11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


@compiled()
def uniform(state):  # type: ignore[no-untyped-def]
    """The next number in [0, 1) of a generator whose state [1] is uint64."""
    state[0] += _GOLDEN
    z = state[0]
    z = (z ^ (z >> _30)) * _FIRST
    z = (z ^ (z >> _27)) * _SECOND
    return np.float64((z ^ (z >> _31)) >> _11) * 2.0**-53
