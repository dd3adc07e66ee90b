"""An encoder-decoder: one sequence is read whole, the other written token by token, each beside what was read.

    p(y | x) = prod_t softmax(W h_t)[y_t],        h_t = decoder(begin, y_1 .. y_{t-1}; encoder(x))_t

A batch is ``{"inputs", "mask", "target"}``: the target ``[B, U]`` has tokens from 1, the last of them ``end``, and 0
behind it. The strings that end sum to 1. With Transformers it is the model of Vaswani et al. (2017), with LSTMs and
attention that of Bahdanau et al. (2015). Training may smooth the targets (Szegedy et al. 2016): with weight
``label_smoothing`` every token counts alike, which the loss has and ``log_prob`` has not.
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probllm.decoding.choices import Greedy
from probllm.decoding.generate import Method, generate
from probllm.distributions.autoregressive import Autoregressive, up_to_end
from probllm.models.causal_lm import CausalState
from probllm.models.language_model import check_text, last_real
from probllm.models.model import Batch, Model, batch_size
from probllm.nn.decoder import Decoder
from probllm.nn.embeddings import WordEmbedding
from probllm.nn.encoder import Encoder
from probllm.nn.linear import linear


class Seq2Seq(Model):
    """An encoder-decoder.

    Args:
        encoder: reads ``batch["inputs"]``.
        decoder: with a memory of the encoder's size; its embedding holds every token and the beginning. To share the
            embeddings of both sides, give both the same module.
        end: the token that ends a target.
        begin: the token read before a target. None: the embedding's last, which is then no token of a target.
        tied: score with the decoder's embeddings (Press and Wolf 2017), else with weights of their own.
        label_smoothing: from 0 to below 1, in training alone.
        max_length: of a target that is written, ``end`` counted; None: twice the source's positions and ten.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        end: int,
        begin: int | None = None,
        tied: bool = True,
        label_smoothing: float = 0.0,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if decoder.memory_dim != encoder.dim:
            raise ValueError(f"decoder has memory_dim {decoder.memory_dim}; expected the encoder's dim, {encoder.dim}")
        if not isinstance(decoder.embedding, WordEmbedding):
            raise TypeError(f"decoder embeds with a {type(decoder.embedding).__name__}; expected a WordEmbedding")
        count = decoder.embedding.vocabulary_size
        self.begin, self.size = (count - 1, count - 1) if begin is None else (begin, count)
        if begin is not None and not 0 <= begin < count:
            raise ValueError(f"begin: expected a token from 0 to {count - 1}, got {begin}")
        if not 1 <= end < self.size:
            raise ValueError(f"end: expected a token from 1 to {self.size - 1}, got {end}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length: expected at least 1, got {max_length}")
        self.encoder, self.decoder, self.end = encoder, decoder, end
        self.label_smoothing, self.max_length = label_smoothing, max_length
        if tied:
            decoder.token_weight  # noqa: B018 - raises where they cannot be tied
        self.head = None if tied else nn.Linear(decoder.dim, self.size, bias=False)

    # What is read.

    def memory(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The encoder's states ``[B, S, dim]`` and their mask ``[B, S]``, None where all are real."""
        mask = batch.get("mask")
        if mask is not None and bool(mask.all()):
            mask = None
        return self.encoder(batch["inputs"], mask), mask

    def logits(self, states: Tensor) -> Tensor:
        """Unnormalised scores ``[..., size - 1]`` of the tokens from 1, from states ``[..., dim]``."""
        weight = self.decoder.token_weight if self.head is None else self.head.weight
        return linear(states, weight[1 : self.size]).float()

    # The law.

    def real_tokens(self, target: Tensor) -> Tensor:
        """``[B, U]`` bool: the tokens of targets ``[B, U]`` up to ``end``, or all where there is none.

        Raises:
            ValueError: for another shape or dtype, or a token out of range.
        """
        check_text(target, None, self.size, "target")
        real = up_to_end(target, self.end)
        if not bool((target > 0).where(real, True).all()):
            row = int((target > 0).where(real, True).all(-1).long().argmin())
            raise ValueError(
                f"target: row {row} has padding before any end, which is {self.end}: {target[row].tolist()}"
            )
        return real

    def _nats(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Log probability of each token ``[B, U]``, 0 behind the end, and in training what smoothing adds to a loss."""
        target = batch["target"]
        real = self.real_tokens(target)
        memory, mask = self.memory(batch)
        if len(memory) != len(target):
            raise ValueError(f"target: expected {len(memory)} rows, as of inputs, got {len(target)}")
        read = torch.cat([target.new_full((len(target), 1), self.begin), target[:, :-1]], 1)
        # what is read at a position predicts the next one, so padding on the right is never read by what counts
        states = self.decoder(read, memory=memory, memory_mask=mask)
        logits, wanted = self.logits(states[real]), target[real] - 1
        nothing = logits.new_zeros(target.shape)
        log_probs = nothing.masked_scatter(real, -F.cross_entropy(logits, wanted, reduction="none"))
        if not (self.label_smoothing and self.training):
            return log_probs, None
        e = self.label_smoothing
        smoothed = F.cross_entropy(logits, wanted, reduction="none", label_smoothing=e)
        return log_probs, nothing.masked_scatter(real, smoothed) + log_probs

    def token_log_probs(self, batch: Batch) -> Tensor:
        """Log probability of each token given the source and those before it, ``[B, U]``, in nats; 0 behind the end."""
        return self._nats(batch)[0]

    def law(self, batch: Batch, log_probs: Tensor | None = None) -> Autoregressive:
        """The law of the targets given the inputs; of a target in the batch only the length counts, as the most."""
        target = batch.get("target")
        rows = batch_size({"inputs": batch["inputs"]})
        steps = self._most(batch) if target is None else target.shape[1]

        def score(value: Tensor, which: Tensor) -> Tensor:
            # behind the end the law gives 0 for padding
            return self.token_log_probs({**_rows(batch, which), "target": value})

        def draw(which: Tensor) -> Tensor:
            return self._draw(_rows(batch, which), steps)

        known = None if target is None else (target, self.token_log_probs(batch) if log_probs is None else log_probs)
        device = next(self.parameters()).device
        lengths = torch.full((rows,), steps, device=device)
        return Autoregressive(score, draw, lengths, steps, self.size, known, self.end)

    def forward(self, batch: Batch) -> Tensor:
        log_probs, smoothing = self._nats(batch) if "target" in batch else (None, None)
        law = self.law(batch, log_probs)
        with self.plate(batch):
            target: Tensor = pyro.sample("target", law, obs=batch.get("target"))
            if smoothing is not None:
                pyro.factor("label_smoothing", -smoothing.sum(-1))
        return target

    def log_prob(self, batch: Batch) -> Tensor:
        """Log probability of each target, ``[B]``, in nats."""
        return self.token_log_probs(batch).sum(-1)

    def loss(self, batch: Batch) -> Tensor:
        """Minus the mean of ``log_prob``; in training the targets are smoothed."""
        log_probs, smoothing = self._nats(batch)
        nats = -log_probs if smoothing is None else smoothing - log_probs
        return nats.sum(-1).mean()

    # Writing.

    def given(self, batch: Batch) -> GivenSource:
        """What ``decoding.generate`` and ``stream`` read from: the targets' beginnings beside the batch's inputs."""
        return GivenSource(self, batch)

    @torch.no_grad()
    def predict(self, batch: Batch, method: Method = Greedy()) -> Tensor:  # noqa: B008
        """The targets that a method of decoding finds, ``[B, max_length]``: ``end`` counted, 0 behind it."""
        steps = self._most(batch)
        rows = batch_size({"inputs": batch["inputs"]})
        device = next(self.parameters()).device
        prompt = torch.zeros(rows, 0, dtype=torch.long, device=device)
        found = generate(self.given(batch), prompt, steps, method, end=self.end).tokens[:, 0]
        return F.pad(found, (0, steps - found.shape[1]))

    def sample(self, n: int, batch: Batch | None = None) -> Tensor:
        """``n`` targets, ``[n, B, max_length]``."""
        if batch is None:
            raise ValueError("batch is None: an encoder-decoder needs inputs")
        rows = torch.arange(batch_size({"inputs": batch["inputs"]})).repeat(n)
        found: Tensor = self._draw(_rows(batch, rows), self._most(batch)).unflatten(0, (n, -1))
        return found

    def _most(self, batch: Batch) -> int:
        if self.max_length is not None:
            return self.max_length
        mask, inputs = batch.get("mask"), batch["inputs"]
        if mask is None and not isinstance(inputs, Tensor):
            raise ValueError("max_length is None and the batch has no mask, to know how long a target may be")
        steps = 2 * (inputs.shape[1] if mask is None else int(mask.sum(1).max())) + 10
        return min(steps, self.decoder.longest or steps)

    @torch.no_grad()
    def _draw(self, batch: Batch, steps: int) -> Tensor:
        """One target a row, ``[rows, steps]``."""
        reader = self.given(batch)
        rows = batch_size({"inputs": batch["inputs"]})
        target = torch.zeros(rows, steps, dtype=torch.long, device=next(self.parameters()).device)
        log_probs, state = reader.start(target[:, :0])
        going = torch.ones(rows, dtype=torch.bool, device=target.device)
        for t in range(steps):
            drawn = torch.distributions.Categorical(logits=log_probs).sample()
            target[:, t] = drawn.where(going, 0)
            going = going & (drawn != self.end)
            if t + 1 == steps or not bool(going.any()):
                break
            log_probs, state = reader.step(drawn, state)
        return target


class GivenSource:
    """An encoder-decoder beside its sources, as a reader of targets for ``probllm.decoding``."""

    def __init__(self, model: Seq2Seq, batch: Batch) -> None:
        self.model, self.size, self.longest = model, model.size, model.decoder.longest
        self._memory, self._mask = model.memory(batch)

    def start(self, prompt: Tensor, mask: Tensor | None = None) -> tuple[Tensor, CausalState]:
        """Read the beginnings of targets ``[B, L]``, or of several a source, those of one source side by side."""
        check_text(prompt, mask, self.size, "prompt")
        model, memory, memory_mask = self.model, self._memory, self._mask
        if len(prompt) % len(memory):
            raise ValueError(f"prompt: expected {len(memory)} rows, as of inputs, or a multiple, got {len(prompt)}")
        if len(prompt) > len(memory):
            times = len(prompt) // len(memory)
            memory = memory.repeat_interleave(times, 0)
            memory_mask = None if memory_mask is None else memory_mask.repeat_interleave(times, 0)
        cache = model.decoder.new_cache(len(prompt), memory=memory, memory_mask=memory_mask)
        read = torch.cat([prompt.new_full((len(prompt), 1), model.begin), prompt], 1)
        if mask is not None:
            mask = F.pad(mask, (1, 0), value=True)
            read = read.where(mask, model.begin)
        states = model.decoder(read, cache=cache, mask=mask)
        return self._next(last_real(states, states[:, 0], mask)), CausalState(cache, states[:, 1:])

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, CausalState]:
        """Read one token ``[B]`` more."""
        states = self.model.decoder(tokens[:, None], cache=state.cache)
        return self._next(states[:, -1]), CausalState(state.cache, states)

    def _next(self, states: Tensor) -> Tensor:
        return F.pad(self.model.logits(states).log_softmax(-1), (1, 0), value=-torch.inf)


def _rows(batch: Batch, rows: Tensor) -> Batch:
    """The batch's rows of these numbers, without targets."""
    found = {}
    for key, value in batch.items():
        if key != "target":
            found[key] = {name: x[rows] for name, x in value.items()} if isinstance(value, dict) else value[rows]
    return found
