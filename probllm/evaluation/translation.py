"""BLEU of translations with bootstrap intervals, by the counts of the ``sacrebleu`` package.

    BLEU = exp(min(0, 1 - r / c) + 1/4 sum_n log p_n),   p_n: share of the translations' n-grams that references hold

with c and r the lengths of all translations and references; where no n-gram of an order is right, 1/2 of one is, of the
next such order 1/4, ... (sacreBLEU's smoothing). Sources: Papineni et al. (2002); Post (2018); Koehn (2004) for the
bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from probllm.evaluation.bootstrap import Difference, Estimate, difference, estimate, resample

_ORDERS = 4


def bleu_counts(translations: Sequence[str], references: Sequence[str]) -> npt.NDArray[np.float64]:
    """What BLEU is made of, a sentence a row: right n-grams of four orders, all n-grams of them, and both lengths.

    Tokens are sacreBLEU's own ("13a"), case counts.

    Returns:
        ``[sentences, 10]``.
    Raises:
        ImportError: without the ``sacrebleu`` package, with the command that installs it.
        ValueError: if the numbers of sentences differ, or there are none.
    """
    try:
        from sacrebleu import BLEU
    except ImportError as error:
        raise ImportError("BLEU is counted by sacrebleu: pip install 'probllm[translation]'") from error
    if len(translations) != len(references):
        raise ValueError(f"references: expected {len(translations)}, one a translation, got {len(references)}")
    if not len(translations):
        raise ValueError("translations is empty; expected at least one")
    metric = BLEU(effective_order=True)
    rows = []
    for translation, reference in zip(translations, references, strict=True):
        found = metric.sentence_score(translation, [reference])
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return np.array(rows, dtype=np.float64)


def bleu(counts: npt.NDArray[np.float64], *, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> Estimate:
    """BLEU, from 0 to 100, and its percentile bootstrap interval over sentences.

    Args:
        counts: of ``bleu_counts``.
        resamples, level, seed: as of ``bootstrap``.
    """
    draws = resample((1, len(counts)), resamples, seed, lambda weigh: _score(_weighed(weigh, counts)))
    return estimate(float(_score(counts.sum(0))), draws, level, len(counts))


def paired_bleu(
    a: npt.NDArray[np.float64],
    b: npt.NDArray[np.float64],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The difference of two systems' BLEU on the same sentences, by the counts of each; as ``paired_bootstrap``.

    Raises:
        ValueError: if the numbers of sentences differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b must score the same sentences; a is {a.shape}, b is {b.shape}")
    draws = resample(
        (1, len(a)), resamples, seed, lambda weigh: _score(_weighed(weigh, a)) - _score(_weighed(weigh, b))
    )
    return difference(float(_score(a.sum(0)) - _score(b.sum(0))), draws, level, len(a))


def _weighed(weigh: Any, counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sums of the counts at each resample, ``[resamples, 10]``."""
    return np.stack([weigh(column[None]) for column in counts.T], -1)


def _score(sums: npt.NDArray[np.float64]) -> Any:
    """BLEU from sums of counts ``[..., 10]``."""
    right, all_, own, reference = sums[..., :4].copy(), sums[..., 4:8], sums[..., 8], sums[..., 9]
    nothing = right[..., 0] == 0
    halved = np.ones(right.shape[:-1])
    for n in range(_ORDERS):
        empty = (right[..., n] == 0) & (all_[..., n] > 0)
        halved = np.where(empty, halved / 2, halved)
        right[..., n] = np.where(empty, halved, right[..., n])
    # an order that no translation is long enough for ends the count of BLEU at 0
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(right / all_).mean(-1)
        brevity = np.where(own < reference, 1 - reference / own, 0.0)
        found = 100 * np.exp(brevity + logs)
    return np.where(nothing | (all_ == 0).any(-1), 0.0, found)
