"""What every law over structures can do, derived once.

A structure's score is a sum over its parts, so the law is an exponential family, p(x) = exp(score(x)) / Z. A subclass
gives the recursions (``_log_z``, ``_expected``, ``_best``, ``_k_best``, ``_draw``), the score of a structure and its
parts; this class derives

    log_prob(x) = score(x) - log Z               entropy = log Z - E[score]
    cross_entropy(p, q) = log Z_q - E_p[score_q]          KL(p, q) = cross_entropy(p, q) - entropy(p)
    log_prob_partial(allowed) = log Z(allowed) - log Z    log_count = log Z at scores 0

Where nothing is allowed: log_partition and log_prob are -inf, marginals, entropy and gradients 0, mode and samples -1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import register_kl

from probllm.math.chain import is_wrapped
from probllm.math.shapes import broadcast_shapes


class _Structures(constraints.Constraint):
    """Entries from -1 (nothing is allowed) to a greatest value."""

    is_discrete = True
    event_dim = 1

    def __init__(self, greatest: int) -> None:
        self.greatest = greatest
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return ((value >= -1) & (value <= self.greatest)).all(-1)


class StructuredDistribution(TorchDistribution):  # type: ignore[misc]
    """A law over structures with additive scores; see the module's text for what a subclass gives.

    Parts are a dict of score tensors, the main one first. Properties are lazy and kept; ``expand`` shares what is kept.
    """

    has_enumerate_support = False
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    _one_tag_a_step: ClassVar[bool] = False  # main parts are [T, K], and a structure uses one of K at each step
    _own_shape: torch.Size  # batch shape of the scores as they are stored
    _kept: dict[str, tuple[Any, bool]]  # results by name, and whether they were made with gradients

    # ---- what a structure gives; every result is over the stored batch shape

    @property
    def parts(self) -> dict[str, Tensor]:
        """The score tensors by name, the main one first."""
        raise NotImplementedError(f"{type(self).__name__} is abstract in parts")

    def _with(self, **parts: Tensor) -> Self:
        """The same structure with other scores."""
        raise NotImplementedError(f"{type(self).__name__} is abstract in _with")

    def _log_z(self) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} is abstract in _log_z")

    def _expected(self) -> dict[str, Tensor]:
        """Expected parts, in shapes that broadcast with the parts."""
        raise NotImplementedError(f"{type(self).__name__} is abstract in _expected")

    def _best(self) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} is abstract in _best")

    def _k_best(self, k: int) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} is abstract in _k_best")

    def _draw(self, n: int) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} is abstract in _draw")

    def _score(self, value: Tensor) -> Tensor:
        """Score in float64 of structures that are legal or, in a row where nothing is allowed, anything in range."""
        raise NotImplementedError(f"{type(self).__name__} is abstract in _score")

    def _greatest(self) -> int:
        """The greatest entry of a structure."""
        raise NotImplementedError(f"{type(self).__name__} is abstract in _greatest")

    # ---- what follows

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(_Structures(self._greatest()), len(self.event_shape) - 1)

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.parts.values())).dtype

    def _keep(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, kept; made again where it was made without gradients that are wanted now."""
        found, with_gradients = self._kept.get(name, (None, False))
        if found is None or (torch.is_grad_enabled() and not with_gradients and self._requires_grad):
            found = make()
            self._kept[name] = (found, torch.is_grad_enabled())
        return found

    @property
    def _requires_grad(self) -> bool:
        return any(x.requires_grad for x in self.parts.values())

    def _grow(self, x: Tensor) -> Tensor:
        """Expands a result over the stored batch shape to the batch shape."""
        if self._own_shape == self.batch_shape:
            return x
        return x.expand(self.batch_shape + x.shape[len(self._own_shape) :])

    @property
    def log_partition(self) -> Tensor:
        """log Z ``[*batch]``, in nats."""
        log_z = self._keep("log_z", self._log_z)
        return self._grow(self._keep("rounded", lambda: log_z.to(self._dtype)))

    @property
    def marginals(self) -> Tensor:
        """Probability of each main part: the gradient of ``log_partition`` in the main scores."""
        return self._grow(self._keep("marginals", self._main_expected))

    def _main_expected(self) -> Tensor:
        """The expected main parts, for a law to find without the others where that costs less."""
        return self._expected_parts()[next(iter(self.parts))]

    @property
    def mode(self) -> Tensor:
        """A structure of the highest score."""
        return self._grow(self._keep("mode", self._best))

    @property
    def log_count(self) -> Tensor:
        """Log of the number of structures that are allowed, float64."""
        return self._grow(self._keep("log_count", self._log_of_count))

    def _log_of_count(self) -> Tensor:
        return self._with(**self._allowed(torch.float64))._log_z()

    def _expected_parts(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self._keep("expected", self._expected)
        return found

    def score(self, value: Tensor) -> Tensor:
        """Log of the unnormalised probability of structures ``[..., *event]``, in nats; -inf for a forbidden one."""
        return self._score(self._checked(value)).to(self._dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of structures ``[..., *event]``, in nats; padding is ignored."""
        log_z = self._grow(self._keep("log_z", self._log_z))
        possible = log_z > -math.inf
        score = self._score(self._checked(value))
        difference = score - torch.where(possible, log_z, torch.zeros_like(log_z))
        return torch.where(possible, difference, torch.full_like(difference, -math.inf)).to(self._dtype)

    def _checked(self, value: Tensor) -> Tensor:
        """Raises for a value whose shape or dtype is wrong, or whose entries are out of range."""
        shape = self.event_shape
        if value.dtype not in (torch.long, torch.int, torch.short, torch.uint8, torch.int8):
            raise TypeError(f"value: expected integers, got {value.dtype}")
        if value.dim() < len(shape) or value.shape[value.dim() - len(shape) :] != shape:
            raise ValueError(f"value: expected shape [..., {', '.join(map(str, shape))}], got {list(value.shape)}")
        try:
            broadcast_shapes(value.shape[: value.dim() - len(shape)], self.batch_shape)
        except RuntimeError:
            raise ValueError(
                f"value: batch shape {list(value.shape[: value.dim() - len(shape)])} does not broadcast with "
                f"{list(self.batch_shape)}, that of the law"
            ) from None
        real = self._real(value)
        if not is_wrapped(real) and real.numel():
            low, high = real.aminmax()
            if int(high) > self._greatest() or int(low) < -1:
                raise ValueError(
                    f"value: expected entries from 0 to {self._greatest()}, got entries from {int(low)} to {int(high)}"
                )
            if int(low) < 0:
                log_z = self._grow(self._keep("log_z", self._log_z))
                bad = ((real < 0).flatten(real.dim() - len(shape)).any(-1)) & (log_z > -math.inf)
                if bool(bad.any()):
                    raise ValueError(
                        "value: entry -1 where structures are allowed (-1 stands for 'nothing is allowed')"
                    )
        return real.long().clamp_min(0)

    def _real(self, value: Tensor) -> Tensor:
        """The value with padding replaced by a legal entry."""
        return value

    def _validate_sample(self, value: Tensor) -> None:
        """Checks belong to ``_checked``, which every path takes: padding may hold anything."""

    def parts_of(self, value: Tensor) -> Tensor:
        """1 at each main part that a structure uses, else 0, ``[..., *main]``; all 0 where the structure is -1."""
        legal, main = self._checked(value), next(iter(self.parts))
        ones = (1,) * len(self.event_shape)
        empty = (value < 0).flatten(value.dim() - len(ones)).any(-1)
        shape = broadcast_shapes(value.shape[: value.dim() - len(ones)], self.batch_shape)
        scores = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in self.parts.items()}
        size = self._expand_part(main, self.parts[main]).shape[len(self.batch_shape) :]
        with torch.enable_grad():
            leaf = torch.zeros(*shape, *size, dtype=torch.float64, device=value.device, requires_grad=True)
            total = self._with(**{**scores, main: leaf})._score(legal).sum()
            used = torch.autograd.grad(total, leaf)[0]
        used = used.masked_fill(empty.expand(shape).reshape(*shape, *(1,) * len(size)), 0.0)
        return used.to(self._dtype)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k structures of the highest scores, best first and distinct.

        Returns:
            scores ``[k, *batch]`` (differentiable) and structures ``[k, *batch, *event]``; -inf and -1 where there are
            fewer than k.
        """
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        found = self._k_best(k)
        first = found.flatten(1 + len(self._own_shape))[..., 0]
        scores = self._score(found.clamp_min(0))
        scores = torch.where(first >= 0, scores, torch.full_like(scores, -math.inf)).to(self._dtype)
        own = len(self._own_shape)
        size = (k, *self.batch_shape)
        lead = (1,) * (len(self.batch_shape) - own)
        scores = scores.view(k, *lead, *self._own_shape).expand(size)
        return scores, found.view(k, *lead, *self._own_shape, *self.event_shape).expand(size + tuple(self.event_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Independent exact samples ``[*sample_shape, *batch, *event]``."""
        shape = torch.Size(sample_shape)
        with torch.no_grad():
            own, full = self._own_shape, self.batch_shape
            extra = full[: len(full) - len(own)]
            if full[len(extra) :] == own:
                drawn = self._draw(math.prod(shape) * math.prod(extra))
            else:  # a dimension of size 1 was expanded: its copies are drawn independently
                parts = {name: self._expand_part(name, x) for name, x in self.parts.items()}
                drawn = self._with(**parts)._draw(math.prod(shape))
            return drawn.reshape(*shape, *full, *self.event_shape)

    def _expand_part(self, name: str, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} is abstract in _expand_part")

    def entropy(self) -> Tensor:
        """Entropy ``[*batch]``, in nats; 0 where nothing is allowed. Computed in float64."""

        def make() -> Tensor:
            wide = self._wide()
            log_z = wide._keep("log_z", wide._log_z)
            mean = wide._mean_of(wide.parts)
            return torch.where(log_z > -math.inf, log_z - mean, torch.zeros_like(mean)).clamp_min(0)

        return self._grow(self._keep("entropy", make)).to(self._dtype)

    def _wide(self) -> Self:
        """The same law in float64, where log Z and the mean score are far larger than their difference."""
        if self._dtype == torch.float64:
            return self
        return self._with(**{name: x.double() for name, x in self.parts.items()})

    def _mean_of(self, scores: dict[str, Tensor]) -> Tensor:
        """E[sum of the parts' scores] over the stored batch; -inf where a possible part is forbidden by ``scores``."""
        expected = self._expected_parts()
        total = torch.zeros((), dtype=torch.float64, device=expected[next(iter(expected))].device)
        for name, score in scores.items():
            probability = expected[name].double()
            forbidden = score == -math.inf
            terms = probability * torch.where(forbidden, torch.zeros_like(score), score)
            terms = terms.masked_fill(forbidden & (probability > 0), -math.inf)
            total = total + self._sum_parts(name, terms)
        return total

    def _sum_parts(self, name: str, terms: Tensor) -> Tensor:
        """Sums over the dimensions of a part, leaving the batch."""
        raise NotImplementedError(f"{type(self).__name__} is abstract in _sum_parts")

    def _aligned(self, other: Self) -> dict[str, Tensor]:
        """The parts of another law over the same structures, checked."""
        if type(other) is not type(self):
            raise TypeError(f"q: expected {type(self).__name__}, got {type(other).__name__}")
        if other.event_shape != self.event_shape or other._greatest() != self._greatest():
            raise ValueError(
                f"q: expected a law over structures of shape {list(self.event_shape)} with entries to "
                f"{self._greatest()}, got {list(other.event_shape)} with entries to {other._greatest()}"
            )
        return other.parts

    def cross_entropy(self, q: Self) -> Tensor:
        """-E_p[log q] ``[*batch]``, in nats; +inf where p allows what q forbids. Computed in float64."""
        self._aligned(q)
        wide, other = self._wide(), q._wide()
        parts = wide._matching(other)
        mean = wide._grow_to(wide._mean_of(parts), q)
        log_z_p = wide._grow_to(wide._keep("log_z", wide._log_z), q)
        log_z_q = other._grow_to(other._keep("log_z", other._log_z), self)
        value = torch.where(log_z_q > -math.inf, log_z_q - mean, torch.full_like(mean, math.inf))
        return torch.where(log_z_p > -math.inf, value, torch.zeros_like(value)).to(self._dtype)

    def _grow_to(self, x: Tensor, other: StructuredDistribution) -> Tensor:
        return x.expand(broadcast_shapes(x.shape, self.batch_shape, other.batch_shape))

    def _matching(self, other: Self) -> dict[str, Tensor]:
        """The other law's parts in shapes that broadcast with this one's expected parts."""
        return other.parts

    def expectation(self, part_scores: Tensor | dict[str, Tensor]) -> Tensor:
        """E[sum of the scores of a structure's parts] ``[*batch]``.

        Args:
            part_scores: a score for each main part, in the shape of the main scores, or a dict by the names in
                ``parts``.
        """
        names = list(self.parts)
        scores = part_scores if isinstance(part_scores, dict) else {names[0]: part_scores}
        for name, score in scores.items():
            if name not in names:
                raise ValueError(f"part_scores: expected names among {names}, got {name!r}")
            try:
                broadcast_shapes(score.shape, self._expected_parts()[name].shape)
            except RuntimeError:
                raise ValueError(
                    f"part_scores: expected {name} to broadcast with {list(self._expected_parts()[name].shape)}, "
                    f"got {list(score.shape)}"
                ) from None
        mean = self._mean_of(scores)
        return mean.expand(broadcast_shapes(mean.shape, self.batch_shape)).to(self._dtype)

    def condition(self, allowed: Tensor) -> Self:
        """The law given that the structure is allowed; its ``log_partition`` keeps the mass of what is left."""
        raise NotImplementedError(f"{type(self).__name__} is abstract in condition")

    def _conditioned(self, **parts: Tensor) -> Self:
        """The law with some parts masked, over a batch no smaller than this one's."""
        law = self._with(**parts)
        return law.expand(broadcast_shapes(law.batch_shape, self.batch_shape))

    def log_prob_partial(self, allowed: Tensor) -> Tensor:
        """Log probability that the structure is an allowed one, ``[*batch]``: the likelihood of a partial label.

        Args:
            allowed: bool, as in ``condition``.
        """
        left = self.condition(allowed)
        log_z = self._grow(self._keep("log_z", self._log_z))
        of_left = left._grow(left._keep("log_z", left._log_z))
        possible = log_z > -math.inf
        difference = of_left - torch.where(possible, log_z, torch.zeros_like(log_z))
        return torch.where(possible, difference.clamp_max(0), torch.full_like(difference, -math.inf)).to(self._dtype)

    def min_risk(self, loss: Tensor | str = "hamming") -> Tensor:
        """The allowed structure of the least expected loss (minimum Bayes risk), ``[*batch, *event]``.

        Args:
            loss: ``"hamming"``, the number of main parts that only one of the two structures uses (of a sequence, twice
                its wrong tags), or, where each step has one of K tags, ``[K, K]`` cost of predicting k (row) where the
                truth is j (column), summed over the steps.
        """
        main = next(iter(self.parts))
        marginals = self._expected_parts()[main].detach()
        if isinstance(loss, str):
            if loss != "hamming":
                raise ValueError(f"loss: expected 'hamming' or a tensor, got {loss!r}")
            gain = 2 * marginals - 1
        elif not self._one_tag_a_step:
            raise ValueError(f"loss: expected 'hamming' ({type(self).__name__} has no tag at each step)")
        else:
            k = marginals.shape[-1]
            if loss.shape != (k, k):
                raise ValueError(f"loss: expected 'hamming' or shape [{k}, {k}], got {list(loss.shape)}")
            gain = -(marginals @ loss.to(marginals.dtype).T)
        hard = self._allowed(self._dtype)
        hard[main] = gain + hard[main]
        return self._grow(self._with(**hard)._best())

    def with_temperature(self, temperature: float | Tensor) -> Self:
        """The law with every score divided by ``temperature``: flatter above 1, near 0 all at the mode.

        Args:
            temperature: above 0; a number, or a tensor of no dimensions.
        """
        if not bool(torch.as_tensor(temperature) > 0):
            raise ValueError(f"temperature: expected above 0, got {temperature}")
        return self._conditioned(**{name: x / temperature for name, x in self.parts.items()})

    def _allowed(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The parts with every finite score 0: what is allowed and nothing else."""
        return {
            name: torch.zeros_like(x, dtype=dtype).masked_fill(x == -math.inf, -math.inf)
            for name, x in self.parts.items()
        }

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same law over a larger batch; scores are not copied, and what was computed is shared."""
        return expanded(self, batch_shape, _instance)


Law = TypeVar("Law", bound=TorchDistribution)


def expanded(law: Law, batch_shape: Any, instance: Any = None) -> Law:
    """A law of the same class over a larger batch that shares everything with ``law``."""
    new: Law = law._get_checked_instance(type(law), instance)
    new.__dict__.update(law.__dict__)
    shape = torch.Size(batch_shape)
    if not is_expansion(law.batch_shape, shape):
        raise ValueError(f"batch_shape: cannot expand {list(law.batch_shape)} to {list(shape)}")
    new._batch_shape = shape
    return new


def masked(name: str, scores: Tensor, allowed: Tensor, event_dims: int) -> Tensor:
    """Scores that are -inf where ``allowed`` is False; raises by ``name`` for a mask that does not fit them."""
    if allowed.dtype != torch.bool:
        raise TypeError(f"{name}: expected dtype torch.bool, got {allowed.dtype}")
    try:
        shape = broadcast_shapes(scores.shape, allowed.shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected to broadcast with {list(scores.shape)}, got {list(allowed.shape)}"
        ) from None
    if shape[-event_dims:] != scores.shape[-event_dims:]:
        raise ValueError(f"{name}: expected shape like {list(scores.shape)}, got {list(allowed.shape)}")
    return torch.where(allowed, scores, torch.full_like(scores, -math.inf))


def is_expansion(small: torch.Size, large: torch.Size) -> bool:
    """Whether a tensor of the one shape can be expanded to the other."""
    ends = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(n in (1, m) for n, m in ends)


@register_kl(StructuredDistribution, StructuredDistribution)  # type: ignore[untyped-decorator]
def _kl_structures(p: StructuredDistribution, q: StructuredDistribution) -> Tensor:
    if type(p) is not type(q):
        raise NotImplementedError(
            f"no KL divergence between {type(p).__name__} and {type(q).__name__}: different structures"
        )
    wide_p, wide_q = p._wide(), q._wide()
    return (wide_p.cross_entropy(wide_q) - wide_p.entropy()).clamp_min(0).to(p._dtype)
