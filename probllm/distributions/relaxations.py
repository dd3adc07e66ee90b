"""Samples of a structure that carry a gradient, by perturbing the scores. Both are biased: the laws are discrete.

Gumbel noise on the score of every structure would give exact samples (Papandreou and Yuille 2011); noise on the parts
alone, whose number is polynomial, gives approximate ones, and their relaxation replaces the best structure by the
marginals at a low temperature (Corro and Titov 2019; Paulus et al. 2020, "Gradient estimation with stochastic softmax
tricks"). For an unbiased gradient use the score function with exact samples, or, of additive scores,
``law.expectation``.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from probllm.distributions.structure import StructuredDistribution

Law = TypeVar("Law", bound=StructuredDistribution)


def perturbed(law: Law, sample_shape: Any = ()) -> Law:
    """The law, over a batch ``[*sample_shape, *batch]``, with Gumbel noise added to each main part's score."""
    main = next(iter(law.parts))
    scores = law._expand_part(main, law.parts[main])
    shape = (*torch.Size(sample_shape), *scores.shape)
    uniform = torch.rand(shape, dtype=torch.float64, device=scores.device).clamp_(1e-300, 1 - 1e-16)
    return law._with(**{main: scores + (-(-uniform.log()).log()).to(scores.dtype)})


def perturb_and_map(law: StructuredDistribution, sample_shape: Any = ()) -> Tensor:
    """Modes of perturbed laws ``[*sample_shape, *batch, *event]``: near samples of the law, but not exact ones."""
    return perturbed(law, sample_shape).mode


def relaxed_sample(law: StructuredDistribution, temperature: float, sample_shape: Any = ()) -> Tensor:
    """Relaxed main parts ``[*sample_shape, *batch, *main]`` in [0, 1], differentiable in the scores; biased.

    Args:
        temperature: above 0; near 0 the parts are those of one structure, and the gradient's variance grows.
    Returns:
        the marginals of a perturbed law at this temperature: a point of the marginal polytope.
    """
    return perturbed(law, sample_shape).with_temperature(temperature).marginals


def straight_through_sample(law: StructuredDistribution, temperature: float = 1.0, sample_shape: Any = ()) -> Tensor:
    """Main parts of whole structures ``[*sample_shape, *batch, *main]``, with the gradient of the relaxed ones; biased.

    The value is that of one ``perturb_and_map``, 0 or 1; the gradient is that of ``relaxed_sample`` from the same noise
    (Bengio, Leonard and Courville 2013; Jang, Gu and Poole 2017).
    """
    noisy = perturbed(law, sample_shape)
    soft = noisy.with_temperature(temperature).marginals
    return noisy.parts_of(noisy.mode) + soft - soft.detach()
