"""What does a CRF add to a network of your own?

Any ``nn.Module`` that scores tags will do: the law takes the scores. The same small network is trained twice, once
with independent tags and once with a linear-chain CRF, to give the vowels of a word their stress. Ends in a table.

    python examples/crf_on_your_encoder.py [--small]
"""

import sys

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from probllm.data import TaggingVocabulary, stress_tagging
from probllm.distributions import LinearChainCRF
from probllm.evaluation import accuracy, correct_tokens, paired_bootstrap, unpad

small = "--small" in sys.argv
sentences = stress_tagging()
vocabulary = TaggingVocabulary.build(sentences.train)
train = vocabulary.dataset(sentences.train[: 500 if small else 8000], ["words"])
test = vocabulary.dataset(sentences.test[: 200 if small else 2000], ["words"])
K = vocabulary.num_tags


class YourNetwork(nn.Module):
    """Scores of each tag at each phoneme, ``[B, L, K]``; nothing in it knows of probllm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(vocabulary.words), 32)
        self.read = nn.Sequential(nn.Conv1d(32, 64, 5, padding=2), nn.GELU(), nn.Conv1d(64, K, 1))

    def forward(self, phonemes: Tensor) -> Tensor:
        return self.read(self.embed(phonemes).transpose(1, 2)).transpose(1, 2)


def train_and_tag(with_crf: bool) -> list[Tensor]:
    torch.manual_seed(0)
    network = YourNetwork()
    transitions = nn.Parameter(torch.zeros(K, K), requires_grad=with_crf)  # zeros: independent tags
    optimiser = torch.optim.Adam([*network.parameters(), transitions], lr=3e-3)

    def law(batch) -> LinearChainCRF:
        return LinearChainCRF(network(batch["inputs"]["words"]), transitions, lengths=batch["mask"].sum(-1))

    for epoch in range(2 if small else 6):
        for batch in train.batches(batch_size=64, seed=0, epoch=epoch):
            loss = -law(batch).log_prob(batch["tags"]).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        return [tags for b in test.batches(256, shuffle=False) for tags in unpad(law(b).mode, b["mask"])]


gold = [example["tags"].numpy() for example in test]
tagged = {name: train_and_tag(with_crf) for name, with_crf in (("independent tags", False), ("CRF", True))}

table = Table("law on the same network", "accuracy", "95 % interval")
for name, predicted in tagged.items():
    score = accuracy(predicted, gold)
    table.add_row(name, f"{score.value:.2%}", f"{score.low:.2%} to {score.high:.2%}")
Console().print(table)

right = {name: correct_tokens(predicted, gold) for name, predicted in tagged.items()}
gain = paired_bootstrap(right["CRF"][0], right["independent tags"][0], right["CRF"][1])
print(f"CRF - independent: {gain.value:+.2%} ({gain.low:+.2%} to {gain.high:+.2%}), p = {gain.p:.2g}")
