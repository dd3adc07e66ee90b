"""How a compiled kernel uses the machine's cores.

Kernels are plain ``nogil`` functions over strided shares of their work, run by a small pool of ordinary threads.
numba's own parallel layers abort the process on concurrent calls (workqueue) or after a fork (OpenMP); this pool
survives
both: calls from many threads queue up, and a forked child makes a pool of its own. Nothing spins while it waits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

# below this many nanoseconds the wake-up of a second thread costs more than it saves
SMALL = 500_000.0

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


# the threads of a parent do not live on in a forked child
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def shares_of(pieces: int, nanoseconds: float) -> int:
    """Into how many shares ``run_shares`` divides such work."""
    return max(1, min(pieces, torch.get_num_threads())) if nanoseconds > SMALL else 1


def run_shares(kernel: Callable[..., None], arguments: tuple[object, ...], pieces: int, nanoseconds: float) -> None:
    """Calls ``kernel(*arguments, first, step)`` once for each share; share i takes pieces i, i + step, i + 2 step, ...

    Args:
        pieces: how many independent pieces of work there are.
        nanoseconds: about how long one thread takes for all; what is short stays on the calling thread.
    """
    global _pool
    shares = shares_of(pieces, nanoseconds)
    if shares == 1:
        kernel(*arguments, 0, 1)
        return
    pool = _pool
    if pool is None:
        pool = _pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1), thread_name_prefix="probllm-kernel")
    waiting: list[Future[None]] = [pool.submit(kernel, *arguments, share, shares) for share in range(1, shares)]
    try:
        kernel(*arguments, 0, shares)
        for share, future in enumerate(waiting, 1):
            if future.cancel():  # on a busy machine its thread has not woken up yet
                kernel(*arguments, share, shares)
    finally:
        for future in waiting:
            if not future.cancelled():
                future.result()
