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
    order = np.argsort(data.lengths, kind="stable").tolist()
    where = torch.device(device)
    batches = [to_device(batch, where) for batch in data[order].batches(batch_size=batch_size, shuffle=False)]
    predicted: list[Any] = []
    marginals: list[Any] = []
    log_probs: list[Any] = []
    with torch.no_grad():
        model.predict(batches[-1])  # compiles what is compiled lazily, so that the clock below shows the work alone
        started = time.perf_counter()
        tags = [model.predict(batch).cpu() for batch in batches]
        seconds = time.perf_counter() - started
        for batch, batch_tags in zip(batches, tags, strict=True):
            mask = batch["mask"].cpu()
            predicted += unpad(batch_tags, mask)
            marginals += unpad(model.marginals(batch).float().cpu(), mask)
            log_probs += given_words(batch).double().cpu().tolist()
    back = np.argsort(order).tolist()
    predicted, marginals = [predicted[i] for i in back], [marginals[i] for i in back]
    correct, tokens = correct_tokens(predicted, gold)
    return Verdict(
        predicted,
        marginals,
        correct,
        tokens,
        np.array([nll.sum() for nll in token_nll(marginals, gold)]),
        -np.array([log_probs[i] for i in back]),
        expected_calibration_error(np.concatenate(marginals), np.concatenate(gold)),
        int(tokens.sum()) / seconds,
    )
