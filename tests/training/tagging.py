"""A tiny tagger and data for it, on which the training tests run."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probllm.data.dataset import Dataset
from probllm.models.model import Batch, Model

WORDS, TAGS = 12, 3


class TinyTagger(Model):
    """One embedding and one linear layer a word; its tags are independent given the words."""

    def __init__(self, dim: int = 6, dropout: float = 0.0, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, dim, sparse=sparse)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, TAGS)
        self.bias = pyro.nn.PyroParam(torch.full((TAGS,), 0.5), constraint=dist.constraints.positive)

    def logits(self, batch: Batch) -> Tensor:
        return self.output(self.norm(self.dropout(self.embedding(batch["inputs"])))) + self.bias

    def forward(self, batch: Batch) -> Tensor:
        logits = self.logits(batch)
        with self.plate(batch):
            law = dist.Categorical(logits=logits).mask(batch["mask"]).to_event(1)
            return pyro.sample("tags", law, obs=batch.get("tags")) * batch["mask"]

    def log_prob(self, batch: Batch) -> Tensor:
        log_probs = self.logits(batch).log_softmax(-1).gather(-1, batch["tags"][..., None])[..., 0]
        return (log_probs * batch["mask"]).sum(-1)

    def predict(self, batch: Batch) -> Tensor:
        return self.logits(batch).argmax(-1) * batch["mask"]


def tagged(count: int = 40, seed: int = 0) -> Dataset:
    """Sentences of 1 to 7 words whose tag is the word's remainder by the number of tags, but for some noise."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        length = int(torch.randint(1, 8, (), generator=generator))
        words = torch.randint(0, WORDS, (length,), generator=generator)
        noise = torch.rand(length, generator=generator) < 0.1
        tags = torch.where(noise, torch.randint(0, TAGS, (length,), generator=generator), words % TAGS)
        examples.append({"inputs": words, "tags": tags})
    return Dataset(examples)


def accuracy(model: TinyTagger, data: Dataset) -> float:
    right = total = 0
    for batch in data.batches(shuffle=False):
        right += int(((model.predict(batch) == batch["tags"]) & batch["mask"]).sum())
        total += int(batch["mask"].sum())
    return right / total
