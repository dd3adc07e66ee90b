"""A masked language model: tokens that are hidden are told from those around them, all at once.

    p(hidden | the others) = prod over hidden t of softmax(W transform(h_t) + b)[x_t],      h = encoder(corrupted text)

A batch is ``{"inputs", "mask", "hidden", "target"}``, each ``[B, L]``: ``inputs`` is the corrupted text, ``hidden``
says which tokens are asked for, and ``target`` has them (what stands elsewhere does not count). ``data.Masked`` makes
such batches. The hidden tokens are independent given the others: that is the law of Devlin et al. (2019), no law of
whole texts. Where nothing is hidden, ``log_prob`` is 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probllm.models.language_model import check_text
from probllm.models.model import Batch, Model
from probllm.nn.embeddings import WordEmbedding
from probllm.nn.encoder import Encoder
from probllm.nn.pretrained import Head, read_bert, write_bert
from probllm.nn.pretrained.checkpoint import OutputTransform
from probllm.nn.transformer import TransformerEncoder


class MaskedLM(Model):
    """A masked language model on an encoder.

    Args:
        encoder: reads ``batch["inputs"]``, a state a token.
        size: tokens go from 0 to ``size - 1``; None: as many as the encoder's embedding holds.
        transform: what stands between the states and the output layer; None: nothing.
        tied: score with the encoder's embeddings (Press and Wolf 2017), else with weights of their own.
    """

    def __init__(
        self,
        encoder: Encoder,
        size: int | None = None,
        transform: OutputTransform | None = None,
        tied: bool = True,
    ) -> None:
        super().__init__()
        embedding: Any = getattr(encoder, "embedding", encoder)
        if not isinstance(embedding, WordEmbedding) and (tied or size is None):
            missing = "tied=False" if size is not None else "size"
            raise TypeError(f"encoder embeds with a {type(embedding).__name__}, no WordEmbedding: {missing} is needed")
        if tied and embedding.dim != encoder.dim:
            raise ValueError(f"encoder: its embedding has dim {embedding.dim}; expected {encoder.dim}, to be tied")
        self.size: int = embedding.vocabulary_size if size is None else size
        if self.size < 1 or (tied and self.size > embedding.vocabulary_size):
            raise ValueError(f"size: expected at least 1 and, tied, at most the embedding's rows, got {size}")
        self.encoder, self.transform = encoder, transform
        self.tied = tied
        self.head = None if tied else nn.Linear(encoder.dim, self.size, bias=False)
        self.bias = nn.Parameter(torch.zeros(self.size))

    def logits(self, states: Tensor) -> Tensor:
        """Unnormalised scores ``[..., size]`` of tokens from states ``[..., dim]``."""
        hidden = states if self.transform is None else self.transform(states)
        weight = self.head.weight if self.head is not None else self._embedding.weight[: self.size]
        return F.linear(hidden, weight, self.bias).float()

    @property
    def _embedding(self) -> WordEmbedding:
        found = getattr(self.encoder, "embedding", self.encoder)
        assert isinstance(found, WordEmbedding)
        return found

    def token_log_probs(self, batch: Batch) -> Tensor:
        """Log probability of each hidden token, ``[B, L]``, in nats; 0 elsewhere."""
        target, hidden = batch["target"], self._hidden(batch)
        check_text(target, hidden, self.size, "target")
        states = self.encoder(batch["inputs"], batch.get("mask"))
        found = -F.cross_entropy(self.logits(states[hidden]), target[hidden], reduction="none")
        return found.new_zeros(target.shape).masked_scatter(hidden, found)

    def _hidden(self, batch: Batch) -> Tensor:
        hidden: Tensor = batch["hidden"]
        mask: Tensor | None = batch.get("mask")
        if hidden.dtype != torch.bool or hidden.dim() != 2:
            raise ValueError(f"hidden: expected bool [B, L], got {hidden.dtype} of {list(hidden.shape)}")
        if mask is not None and mask.shape != hidden.shape:
            raise ValueError(f"mask: expected shape {list(hidden.shape)}, as hidden, got {list(mask.shape)}")
        return hidden if mask is None else hidden & mask

    def forward(self, batch: Batch) -> Tensor:
        hidden = self._hidden(batch)
        logits = self.logits(self.encoder(batch["inputs"], batch.get("mask")))
        law = dist.Categorical(logits=logits).mask(hidden).to_event(1)
        observed = batch.get("target")
        with self.plate(batch):
            target: Tensor = pyro.sample("target", law, obs=None if observed is None else observed.where(hidden, 0))
        return target.where(hidden, 0)

    def log_prob(self, batch: Batch) -> Tensor:
        """Log probability of the hidden tokens given the others, ``[B]``, in nats."""
        return self.token_log_probs(batch).sum(-1)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """The most probable token at each hidden place, ``[B, L]``; 0 elsewhere."""
        hidden = self._hidden(batch)
        best = self.logits(self.encoder(batch["inputs"], batch.get("mask"))[hidden]).argmax(-1)
        return torch.zeros_like(hidden, dtype=torch.long).masked_scatter(hidden, best)

    @torch.no_grad()
    def sample(self, n: int, batch: Batch | None = None) -> Tensor:
        """``n`` draws of the hidden tokens, ``[n, B, L]``; 0 elsewhere."""
        if batch is None:
            raise ValueError("batch is None: a masked language model needs inputs")
        hidden = self._hidden(batch)
        logits = self.logits(self.encoder(batch["inputs"], batch.get("mask"))[hidden])
        drawn = torch.distributions.Categorical(logits=logits).sample((n,))
        every = hidden.expand(n, *hidden.shape)
        return torch.zeros_like(every, dtype=torch.long).masked_scatter(every, drawn)

    # Checkpoints of the Hugging Face format.

    @classmethod
    def from_huggingface(cls, folder: str | Path) -> Self:
        """A masked language model out of a folder with ``config.json`` and safetensors of the BERT family.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: for another family, a pickle, a corrupt file, or a checkpoint without an output layer.
        """
        encoder, head = read_bert(folder)
        if not head.present:
            raise ValueError(f"{folder} holds no output layer of a masked language model; read_bert gives its encoder")
        model: Self = cls(encoder, transform=head.transform, tied=head.weight is None)
        with torch.no_grad():
            if model.head is not None and head.weight is not None:
                model.head.weight.copy_(head.weight)
            if head.bias is not None:
                model.bias.copy_(head.bias)
        model.eval()
        return model

    def to_huggingface(self, folder: str | Path) -> None:
        """Write a folder that ``transformers`` reads as ``BertForMaskedLM``.

        Raises:
            TypeError, ValueError: for an encoder or a head that BERT has not; the message names the first difference.
        """
        if not isinstance(self.encoder, TransformerEncoder):
            raise TypeError(f"encoder is a {type(self.encoder).__name__}; a BERT checkpoint has a TransformerEncoder")
        if self.transform is None:
            raise ValueError("transform is None; a BERT checkpoint has an OutputTransform")
        if self.size != self._embedding.vocabulary_size:
            raise ValueError(f"size is {self.size}; a BERT checkpoint has a token for each of the embedding's rows")
        weight = None if self.head is None else self.head.weight.detach()
        write_bert(folder, self.encoder, Head(weight, self.bias.detach(), self.transform))
