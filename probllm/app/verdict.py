"""One trained tagger on test sentences: what it predicts, how sure it is, and how fast it says so."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from probllm.data import Dataset
from probllm.evaluation import correct_tokens, expected_calibration_error, token_nll, unpad
from probllm.training.tasks import to_device


class Tagger(Protocol):
    """What a model must offer to be judged."""

    def predict(self, batch: Any) -> Tensor: ...
    def marginals(self, batch: Any) -> Tensor: ...
    def log_prob(self, batch: Any) -> Tensor: ...


@dataclass
class Verdict:
    """A tagger's answers, one array or number a sentence, in the order of the data."""

    predicted: list[npt.NDArray[Any]]  # [T] each
    marginals: list[npt.NDArray[Any]]  # [T, K] each
    correct: npt.NDArray[np.int64]  # [sentences]
    tokens: npt.NDArray[np.int64]  # [sentences]
    token_nll: npt.NDArray[np.float64]  # [sentences], summed over the sentence's tokens
    sequence_nll: npt.NDArray[np.float64]  # [sentences]
    calibration_error: float
    tokens_per_second: float


TIMED_PASSES = 3


def judge(
    model: Tagger,
    data: Dataset,
    gold: Sequence[npt.NDArray[Any]],
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Verdict:
    """Tag the data and score the answers.

    Args:
        model: a tagger in evaluation mode.
        data: examples with ``inputs`` and ``tags``.
        gold: the tags of each example, ``[T]``.
        batch_size: how many sentences are tagged at a time.
        device: where the model is.
    """
    # A generative tagger's log_prob is that of tags and words together; all are judged on the tags given the words.
    given_words = getattr(model, "log_posterior", model.log_prob)
    order, batches = in_batches(data, batch_size, device)
    marginals: list[Any] = []
    log_probs: list[Any] = []
    seconds = []
    with torch.no_grad():
        for _ in range(TIMED_PASSES):  # the fastest pass shows the work alone, not compilation or other programs
            started = time.perf_counter()
            tags = [model.predict(batch).cpu() for batch in batches]
            seconds.append(time.perf_counter() - started)
        for batch in batches:
            marginals += unpad(model.marginals(batch).float().cpu(), batch["mask"].cpu())
            log_probs += given_words(batch).double().cpu().tolist()
    predicted = reorder(
        order, [t for batch, y in zip(batches, tags, strict=True) for t in unpad(y, batch["mask"].cpu())]
    )
    marginals = reorder(order, marginals)
    correct, tokens = correct_tokens(predicted, gold)
    return Verdict(
        predicted,
        marginals,
        correct,
        tokens,
        np.array([nll.sum() for nll in token_nll(marginals, gold)]),
        -np.array(reorder(order, log_probs)),
        expected_calibration_error(np.concatenate(marginals), np.concatenate(gold)),
        int(tokens.sum()) / min(seconds),
    )


@torch.no_grad()
def tag(model: Tagger, data: Dataset, batch_size: int = 64, device: torch.device | str = "cpu") -> list[Any]:
    """The tags that a model gives each example, ``[T]`` each."""
    order, batches = in_batches(data, batch_size, device)
    found = [tags for batch in batches for tags in unpad(model.predict(batch).cpu(), batch["mask"].cpu())]
    return reorder(order, found)


def in_batches(data: Dataset, batch_size: int, device: torch.device | str) -> tuple[list[int], list[Any]]:
    """Batches of similar lengths, and which example stands at each place."""
    order: list[int] = np.argsort(data.lengths, kind="stable").tolist()
    batches = data[order].batches(batch_size=batch_size, shuffle=False)
    return order, [to_device(batch, torch.device(device)) for batch in batches]


def reorder(order: list[int], found: list[Any]) -> list[Any]:
    """What was found at each place, in the order of the data."""
    return [found[place] for place in np.argsort(order).tolist()]
