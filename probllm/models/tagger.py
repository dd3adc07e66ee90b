"""What the taggers given the words share: emission scores from encoders, and a story in which the tags are all of it.

    tags | words ~ law(words),    emissions(words) = W encoder(words) + b + scores(words)

``scores`` is an encoder with one state unit a tag, whose states are scores as they are. With hashed indicator features
it is the classical log-linear tagger (Ratnaparkhi, 1996; Lafferty, McCallum and Pereira, 2001), trained as such: no
layer stands between a feature's weights and the tags.
"""

from __future__ import annotations

from typing import Literal

import pyro
import torch
from torch import Tensor, nn

from probllm.distributions import LinearChainCRF
from probllm.math.masks import lengths_from_mask
from probllm.models.model import Batch, Model
from probllm.nn.encoder import Encoder, check_mask, in_transform
from probllm.nn.potentials import ChainPotentials

Decoding = Literal["viterbi", "posterior"]


class Tagger(Model):
    """A law over tag sequences given the words; ``CRFTagger`` and ``SoftmaxTagger`` say which.

    A batch is ``{"inputs": ..., "mask": [B, L], "tags": [B, L]}``, ``inputs`` as the encoders take them. A tag of -1 is
    not known; ``allowed`` bool ``[B, L, K]`` says which tags a position may have. What is known in part is observed as
    such: the program's factor is the probability of all sequences that agree, and ``tags`` are drawn from the law given
    that, at no cost (masked). Without ``tags`` and ``allowed`` they are sampled.

    Args:
        encoder: the network whose states a linear layer scores, or None.
        num_tags: K.
        scores: an encoder of ``dim`` K, whose states are added to the emissions as they are, or None.
        potentials: from the states to the law's scores.
    Raises:
        ValueError: if there is neither an encoder nor scores, or ``scores.dim`` is not ``num_tags``.
    """

    def __init__(
        self, encoder: Encoder | None, num_tags: int, scores: Encoder | None, potentials: ChainPotentials
    ) -> None:
        super().__init__()
        if encoder is None and scores is None:
            raise ValueError("encoder and scores are both None: expected at least one of them")
        if scores is not None and scores.dim != num_tags:
            raise ValueError(f"scores.dim is {scores.dim}, expected num_tags = {num_tags}: one score a tag")
        self.num_tags = num_tags
        self.encoder, self.scores, self.potentials = encoder, scores, potentials

    # The Pyro program.

    def forward(self, batch: Batch) -> Tensor:
        law = self.law(batch)
        observed, allowed = self._known(batch)
        with self.plate(batch):
            if allowed is not None:
                pyro.factor("known_tags", law.log_prob_partial(allowed))
                law = law.condition(allowed=allowed).mask(False)
            tags: Tensor = pyro.sample("tags", law, obs=observed)
            return tags

    def guide(self, batch: Batch) -> None:
        """Draws tags that are known only in part from their exact posterior; else there is nothing to guess."""
        law = self.law(batch)
        _, allowed = self._known(batch)
        if allowed is not None:
            with self.plate(batch):
                pyro.sample("tags", law.condition(allowed=allowed).mask(False))

    def law(self, batch: Batch) -> LinearChainCRF:
        """The exact law of the tags given the words alone, of batch shape ``[B]``."""
        emissions, transitions, start, end = self._scores(batch)
        return LinearChainCRF(emissions, transitions, start, end, lengths=self._lengths(batch, emissions))

    # The verbs.

    def log_prob(self, batch: Batch) -> Tensor:
        """Log probability of the known tags given the words, ``[B]``, in nats; what is not known is summed out.

        Raises:
            ValueError: if the batch has neither ``tags`` nor ``allowed``.
        """
        law = self.law(batch)
        observed, allowed = self._known(batch)
        if allowed is not None:
            return law.log_prob_partial(allowed)
        if observed is None:
            raise ValueError(f"batch has no tags to score; its keys are {sorted(batch)}")
        return law.log_prob(observed)

    def token_log_prob(self, batch: Batch) -> Tensor:
        """Log posterior probability of each tag by itself, ``[B, L]``, in nats; 0 at padding.

        Raises:
            ValueError: if the batch has no ``tags``, or a tag that is not known.
        """
        tags = self._tags(batch)
        if tags is None:
            raise ValueError("batch must have known tags at every real position")
        real = self._mask(batch, tags)
        if bool((tags < 0)[real].any()):
            raise ValueError("batch must have known tags at every real position")
        own = self.marginals({**batch, "allowed": None}).gather(-1, torch.where(real, tags, 0).unsqueeze(-1))
        return torch.where(real, own.squeeze(-1), 1.0).log()

    def predict(self, batch: Batch, decoding: Decoding = "viterbi") -> Tensor:
        """Tags ``[B, L]``, 0 at padding; the tags in the batch are not looked at, but what it says is allowed is.

        Args:
            batch: words, perhaps with ``allowed``.
            decoding: ``"viterbi"``, the most probable sequence (-1 where none is possible), or ``"posterior"``, at each
                position the most probable tag, which errs least often (the minimum Bayes risk for Hamming loss).
        """
        check_decoding(decoding)
        law = self._posterior(batch)
        return law.mode if decoding == "viterbi" else law.marginals.argmax(-1)

    def marginals(self, batch: Batch) -> Tensor:
        """Probability of each tag at each position, ``[B, L, K]``; 0 at padding."""
        return self._posterior(batch).marginals

    def sample(self, n: int, batch: Batch | None = None) -> Tensor:
        """``[n, B, L]`` tag sequences drawn given the words."""
        if batch is None:
            raise ValueError("batch is None: a tagger needs words, whose tags it draws")
        return self._posterior(batch).sample((n,))

    # Within.

    def _scores(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if "inputs" not in batch:
            raise ValueError(f"batch has no inputs; its keys are {sorted(batch)}")
        inputs, mask = batch["inputs"], batch.get("mask")
        direct = None if self.scores is None else self.scores(inputs, mask)
        emissions, transitions, start, end = self.potentials(
            direct if self.encoder is None else self.encoder(inputs, mask)
        )
        check_mask(mask, emissions.shape[:2])  # an encoder of the user's own may not have looked
        if self.encoder is not None and direct is not None:
            emissions = emissions + direct
        return emissions, transitions, start, end

    def _posterior(self, batch: Batch) -> LinearChainCRF:
        law, allowed = self.law(batch), batch.get("allowed")
        return law if allowed is None else law.condition(allowed=allowed)

    def _lengths(self, batch: Batch, emissions: Tensor) -> Tensor:
        mask = batch.get("mask")
        if mask is None:
            return torch.full(emissions.shape[:1], emissions.shape[1], device=emissions.device)
        return lengths_from_mask(mask)

    def _mask(self, batch: Batch, like: Tensor | None) -> Tensor:
        mask: Tensor | None = batch.get("mask")
        if mask is not None:
            lengths_from_mask(mask)  # which raises where the law would
            if like is not None and like.shape[:2] != mask.shape:
                raise ValueError(f"tags has shape {list(like.shape)}; expected {list(mask.shape)}, that of the mask")
            return mask
        if like is None:
            raise ValueError(f"batch has neither mask nor tags; its keys are {sorted(batch)}")
        return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)

    def _tags(self, batch: Batch) -> Tensor | None:
        tags: Tensor | None = batch.get("tags")
        if tags is not None and tags.dtype not in (torch.long, torch.int):
            raise TypeError(f"tags has dtype {tags.dtype}; expected torch.long")
        return tags if tags is None or tags.dtype == torch.long else tags.long()  # long() would wrap it in a transform

    def _known(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """The tags if all are known, else what they may be, ``[B, L, K]``; two times None if nothing is given."""
        tags, allowed = self._tags(batch), batch.get("allowed")
        if tags is None:
            return None, allowed
        mask = self._mask(batch, tags)
        real = torch.where(mask, tags, 0)
        # A transform hides the values of tags: there, each is taken as one that may be unknown.
        if not in_transform(tags) and real.numel():
            low, high = (int(bound) for bound in torch.aminmax(real))
            if low < -1 or high >= self.num_tags:
                raise ValueError(f"tags lie from {low} to {high}; expected 0 to {self.num_tags - 1}, or -1 for unknown")
            if low >= 0 and allowed is None:
                return real, None
        own = (real.unsqueeze(-1) < 0) | (real.unsqueeze(-1) == torch.arange(self.num_tags, device=real.device))
        if allowed is None:
            return None, own
        if allowed.dtype != torch.bool or allowed.shape != own.shape:
            raise ValueError(
                f"allowed is {allowed.dtype} of shape {list(allowed.shape)}; expected torch.bool {list(own.shape)}"
            )
        return None, own & allowed


def state_size(encoder: Encoder | None, num_tags: int) -> int:
    """The size of the states that the potentials take: ``encoder.dim``, or K where there is no encoder.

    Raises:
        TypeError: if the encoder is not a module with a whole number as its ``dim``.
    """
    if encoder is None:
        return num_tags
    dim = getattr(encoder, "dim", None)
    if not isinstance(encoder, nn.Module) or not isinstance(dim, int):
        raise TypeError(
            f"encoder is a {type(encoder).__name__} whose dim is {dim!r}; expected a module that is called as "
            "encoder(inputs, mask) and gives states [batch, length, dim]"
        )
    return dim


def check_decoding(decoding: str) -> None:
    """Raise unless ``decoding`` is one that taggers know."""
    if decoding not in ("viterbi", "posterior"):
        raise ValueError(f"decoding is {decoding!r}, expected 'viterbi' or 'posterior'")
