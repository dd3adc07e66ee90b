"""The k-th greatest of many numbers, compiled: numba's own partition takes long to compile."""

from __future__ import annotations

from probllm.math.kernels.compiled import compiled


@compiled()
def kth_greatest(x, size, k):  # type: ignore[no-untyped-def]
    """The k-th greatest (from 1) of the first ``size`` numbers of x, which are put into another order; no NaN."""
    low, high = 0, size - 1
    while low < high:
        pivot = x[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while x[i] > pivot:
                i += 1
            while x[j] < pivot:
                j -= 1
            if i <= j:
                x[i], x[j] = x[j], x[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    return x[k - 1]
