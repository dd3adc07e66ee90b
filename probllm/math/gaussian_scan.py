"""Kalman filtering and smoothing in O(log T) depth: associative scans (Sarkka and Garcia-Fernandez 2021).

A span of steps is (A, b, C, eta, J): given the state z before it, the state after it, filtered by its observations, is
N(z A + b, C), and its observations say exp(z eta - z J z' / 2) of z. Two spans, the earlier first, make

    M = (I + J2 C1)^-1,    A = A1 M A2,    b = (b1 + eta2 C1) M A2 + b2,    C = A2' C1 M A2 + C2,
    eta = (eta2 - b1 J2) M' A1' + eta1,    J = A1 M J2 A1' + J1

in row-vector form. The smoother's gradients obey an affine recursion backward, whose spans need no inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from probllm.math.gaussian_steps import EVENT_DIMS, Chain, apply, update

Span = tuple[Tensor, ...]  # each [..., T, ...], time first among the event's dimensions

SMALLEST = 1e-10  # part of a variance that must be left, given the other entries, for the spans to be well conditioned


def scan(combine: Callable[[Span, Span], Span], spans: Span, dims: tuple[int, ...]) -> Span:
    """All prefixes of the spans combined: item t is spans 0..t. Blelloch (1990): about 2 T products, 2 log T deep.

    Args:
        combine: the earlier span, the later one -> both in one; associative, over any leading dimensions.
        dims: of each member, how many dimensions stand behind time.
    """
    steps = spans[0].shape[-1 - dims[0]]
    if steps == 1:
        return spans

    def take(x: Tensor, n: int, start: int, stop: int, stride: int) -> Tensor:
        index: Any = (..., slice(start, stop, stride), *(slice(None),) * n)
        return x[index]

    def every(xs: Span, start: int, stop: int, stride: int = 2) -> Span:
        return tuple(take(x, n, start, stop, stride) for x, n in zip(xs, dims, strict=True))

    pairs = combine(every(spans, 0, steps - 1), every(spans, 1, steps))
    odd = scan(combine, pairs, dims)  # prefixes that end at 1, 3, 5, ...
    first = every(spans, 0, 1, 1)
    halves = odd[0].shape[-1 - dims[0]]
    later = every(spans, 2, steps)
    count = later[0].shape[-1 - dims[0]]
    if count:
        even = combine(every(odd, 0, count, 1), later)
        even = tuple(torch.cat((a, b), -1 - n) for a, b, n in zip(first, even, dims, strict=True))
    else:
        even = first
    merged = []
    for e, o, n in zip(even, odd, dims, strict=True):
        head = take(e, n, 0, halves, 1)
        both = torch.stack((head, o), -1 - n).flatten(-2 - n, -1 - n)
        merged.append(torch.cat((both, take(e, n, halves, steps, 1)), -1 - n) if steps % 2 else both)
    return tuple(merged)


def is_regular(chain: Chain, seen: Tensor | None) -> bool:
    """Whether an observation's covariance given the state *before* its step is far enough from singular everywhere."""
    del seen  # an observation that is a part of another one has no less left
    with torch.no_grad():
        emission, error = chain.emission, chain.error
        noise = chain.noise if chain.noise.shape[-3] == 1 else torch.cat((chain.noise[..., :1, :, :], chain.noise), -3)
        if not noise.shape[-3]:
            return True
        total = emission.mT @ noise @ emission + error
        factor, info = torch.linalg.cholesky_ex(total)
        pivots = factor.diagonal(dim1=-2, dim2=-1) ** 2
        state = chain.covariance.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
        scale = torch.maximum(total.diagonal(dim1=-2, dim2=-1), state * emission.square().sum(-2))
        return bool((info == 0).all() and (pivots > SMALLEST * scale).all())


def filtered_moments(chain: Chain, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean ``[..., T, d]`` and covariance ``[..., T, d, d]`` of each state given the observations up to its step."""
    steps, d = chain.value.shape[-2], chain.mean.shape[-1]
    lead = torch.broadcast_shapes(*(x.shape[: x.dim() - n] for x, n in zip(chain, EVENT_DIMS, strict=True)))
    eye = torch.eye(d, dtype=chain.mean.dtype, device=chain.mean.device)

    def timed(x: Tensor, n: int, size: int) -> Tensor:
        return x.expand(*lead, size, *x.shape[x.dim() - n :])

    # the first step starts from a state that is known: it has the law of z_1 for its noise, and no transition
    zero = torch.zeros((), dtype=eye.dtype, device=eye.device)
    moves = torch.cat((zero.expand(*lead, 1, d, d), timed(chain.transition, 2, steps - 1)), -3)
    drift = torch.cat((chain.mean.unsqueeze(-2).expand(*lead, 1, d), timed(chain.drift, 1, steps - 1)), -2)
    noise = torch.cat((chain.covariance.unsqueeze(-3).expand(*lead, 1, d, d), timed(chain.noise, 2, steps - 1)), -3)
    step = update(drift, noise, chain.value, chain.emission, chain.offset, chain.error, seen)
    keep = eye - chain.emission @ step.gain
    seen_by = moves @ chain.emission  # [..., T, d, o]: how z_{t-1} shows in x_t
    eta = (step.scaled.unsqueeze(-2) @ seen_by.mT).squeeze(-2)
    information = seen_by @ step.inverse @ seen_by.mT
    mean = step.mean.expand(*lead, steps, d)
    spans = (moves @ keep, mean, step.covariance.expand(*lead, steps, d, d), eta, information)
    _, mean, covariance, _, _ = scan(_join, spans, (2, 1, 2, 1, 2))
    return mean, 0.5 * (covariance + covariance.mT)


def predicted_moments(chain: Chain, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of each state given the observations before its step, from those up to it."""
    first = (chain.mean.expand(*mean.shape[:-2], -1).unsqueeze(-2), _like(chain.covariance, covariance))
    if mean.shape[-2] == 1:
        return first
    moved = (mean[..., :-1, None, :] @ chain.transition).squeeze(-2) + chain.drift
    spread = chain.transition.mT @ covariance[..., :-1, :, :] @ chain.transition + chain.noise
    return torch.cat((first[0], moved), -2), torch.cat((first[1], spread), -3)


def _like(x: Tensor, steps: Tensor) -> Tensor:
    return x.unsqueeze(-3).expand(*steps.shape[:-3], 1, *x.shape[-2:])


def backward_moments(back: Tensor, push: Tensor, information: Tensor) -> tuple[Tensor, Tensor]:
    """All r_t = push_t + back_t r_{t+1} and N_t = information_t + back_t N_{t+1} back_t', 0 behind the last step."""
    lead = torch.broadcast_shapes(back.shape[:-2], push.shape[:-1], information.shape[:-2])
    n = push.shape[-1]
    spans = (back.expand(*lead, n, n), push.expand(*lead, n), information.expand(*lead, n, n))
    dims = (2, 1, 2)
    flipped = tuple(x.flip(-1 - k) for x, k in zip(spans, dims, strict=True))
    _, r, total = scan(_join_back, flipped, dims)
    return r.flip(-2), total.flip(-3)


def _join_back(one: Span, two: Span) -> Span:
    """``one`` lies behind ``two`` in time."""
    back, r, n = two
    return back @ one[0], r + (one[1].unsqueeze(-2) @ back.mT).squeeze(-2), n + back @ one[2] @ back.mT


def _join(one: Span, two: Span) -> Span:
    a1, b1, c1, eta1, j1 = one
    a2, b2, c2, eta2, j2 = two
    d = a1.shape[-1]
    eye = torch.eye(d, dtype=a1.dtype, device=a1.device)
    ahead = eta2 - apply(b1, j2)
    columns = torch.cat((a2, j2 @ a1.mT, ahead.unsqueeze(-1)), -1)
    solved = torch.linalg.solve(eye + j2 @ c1, columns)  # M times each
    m_a2 = solved[..., :d]
    b = apply(b1 + apply(eta2, c1), m_a2) + b2
    c = a2.mT @ c1 @ m_a2 + c2
    j = a1 @ solved[..., d:-1] + j1
    return a1 @ m_a2, b, 0.5 * (c + c.mT), apply(solved[..., -1], a1.mT) + eta1, 0.5 * (j + j.mT)
