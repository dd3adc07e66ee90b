"""Text from a model, token by token: greedy, sampled, or searched for.

``generate`` gives whole continuations, ``stream`` each token as it is chosen. Both take every model that reads step by
step (``Reader``): n-grams, recurrent and transformer language models, encoder-decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probllm.decoding.beam import Beam, beam_search
from probllm.decoding.choices import Greedy, Sample
from probllm.decoding.contrastive import Contrastive, contrastive_steps
from probllm.decoding.reader import Reader
from probllm.decoding.stopping import Stop, Stopping

Method = Greedy | Sample | Beam | Contrastive


class Generation(NamedTuple):
    """Continuations of each prompt, ``n`` a prompt, the best first where they were searched for."""

    tokens: Tensor  # [B, n, L] long, the end included; 0 behind it
    log_probs: Tensor  # [B, n, L]: of each token under the model, in nats, before any cut or temperature; 0 behind
    lengths: Tensor  # [B, n]

    @property
    def scores(self) -> Tensor:
        """Log probability of each continuation ``[B, n]``, in nats."""
        return self.log_probs.sum(-1)


class Token(NamedTuple):
    """One step of every row."""

    tokens: Tensor  # [B], 0 where a row has ended before
    log_probs: Tensor  # [B] under the model, in nats; 0 where a row has ended before
    ended: Tensor  # [B] bool: this token was the last, or one before it


def generate(
    model: Reader,
    prompt: Tensor,
    max_tokens: int,
    method: Method = Greedy(),  # noqa: B008
    n: int = 1,
    mask: Tensor | None = None,
    end: int | None = None,
    stop: Sequence[Stop] = (),
    decode: Callable[[list[int]], str] | None = None,
    generator: torch.Generator | None = None,
) -> Generation:
    """Continue each prompt by at most ``max_tokens`` tokens.

    Args:
        model: what reads; put it into evaluation mode first, or its dropout takes part.
        prompt: ``[B, L]`` long; L may be 0 where the model can begin from nothing.
        method: ``Greedy()``, ``Sample(...)``, ``Beam(...)`` or ``Contrastive(...)``.
        n: continuations of each prompt: draws, or the best of a beam. Greedy and contrastive search have one.
        mask: ``[B, L]``, False on padding, which may stand on either side.
        end: the token that ends a text.
        stop: what also ends a text once it stands in the continuation: strings (which need ``decode``), or sequences
            of tokens.
        decode: makes a string of tokens, for the stop strings.
        generator: for the draws; torch's own where missing.
    Raises:
        ValueError, TypeError: for a number out of range, or prompts that the model cannot read.
    """
    _check(model, prompt, max_tokens, n, end)
    if isinstance(method, Beam):
        with torch.no_grad():
            return Generation(*beam_search(model, prompt, max_tokens, method, n, mask, end, stop, decode))
    if n > 1 and not isinstance(method, Sample):
        raise ValueError(f"n: expected 1 for {type(method).__name__}, which has one result, got {n}")
    rows = len(prompt)
    if n > 1:
        prompt = prompt.repeat_interleave(n, 0)
        mask = None if mask is None else mask.repeat_interleave(n, 0)
    steps = list(stream(model, prompt, max_tokens, method, mask, end, stop, decode, generator))
    ended = torch.stack([step.ended for step in steps], -1)
    tokens, log_probs = (torch.stack(x, -1) for x in list(zip(*steps, strict=True))[:2])
    lengths = (~ended).sum(-1).add(1).clamp_max(len(steps))
    return Generation(*(x.view(rows, n, *x.shape[1:]) for x in (tokens, log_probs, lengths)))


@torch.no_grad()
def stream(
    model: Reader,
    prompt: Tensor,
    max_tokens: int,
    method: Greedy | Sample | Contrastive = Greedy(),  # noqa: B008
    mask: Tensor | None = None,
    end: int | None = None,
    stop: Sequence[Stop] = (),
    decode: Callable[[list[int]], str] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Token]:
    """The tokens of ``generate``, each as soon as it is chosen; ends when every row has. Arguments as there."""
    _check(model, prompt, max_tokens, 1, end)
    stopping = Stopping(len(prompt), end, stop, decode, prompt.device)
    if isinstance(method, Contrastive):
        chosen = contrastive_steps(model, prompt, method, mask)
    else:
        chosen = _steps(model, prompt, method, mask, generator)
    for _, (tokens, log_probs) in zip(range(max_tokens), chosen, strict=False):
        going = ~stopping.ended
        shown = Token(tokens.where(going, 0), log_probs.where(going, 0.0), stopping.read(tokens))
        yield shown
        if bool(shown.ended.all()):
            return


def _steps(
    model: Reader,
    prompt: Tensor,
    method: Greedy | Sample,
    mask: Tensor | None,
    generator: torch.Generator | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    log_probs, state = model.start(prompt, mask)
    while True:
        tokens = method(log_probs, generator)
        yield tokens, log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        log_probs, state = model.step(tokens, state)


def _check(model: Reader, prompt: Tensor, max_tokens: int, n: int, end: int | None) -> None:
    if not isinstance(prompt, Tensor) or prompt.dim() != 2 or prompt.dtype != torch.long:
        got = f"{prompt.dtype} of {list(prompt.shape)}" if isinstance(prompt, Tensor) else type(prompt).__name__
        raise TypeError(f"prompt: expected long tokens of shape [B, L], got {got}")
    if not len(prompt):
        raise ValueError("prompt: expected at least one row, got none")
    for name, number in (("max_tokens", max_tokens), ("n", n)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    longest = getattr(model, "longest", None)
    if longest is not None and prompt.shape[1] + max_tokens > longest:
        raise ValueError(
            f"prompt: {prompt.shape[1]} tokens and max_tokens = {max_tokens} more are beyond the {longest} of a text "
            "that the model has positions for"
        )
    if end is not None and not 0 <= end < model.size:
        raise ValueError(f"end: expected a token from 0 to {model.size - 1}, got {end}")
