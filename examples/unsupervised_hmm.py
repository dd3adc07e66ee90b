"""Does a hidden Markov model find vowels and consonants by itself?

Letters of English words, no labels. An HMM with two hidden states is fitted by EM (Baum-Welch); then we look at which
state each letter prefers. Ends in a table.

    python examples/unsupervised_hmm.py [--small]
"""

import sys

import pyro
import torch
from rich.console import Console
from rich.table import Table

from probllm import HMMTagger, fit
from probllm.data import Dataset, pronunciations

small = "--small" in sys.argv
pyro.set_rng_seed(1)

words = [word for word in pronunciations() if word.isalpha()][:: 200 if small else 20]
letters = sorted(set("".join(words)))
data = Dataset({"inputs": {"symbols": torch.tensor([letters.index(c) for c in word])}} for word in words)

model = HMMTagger(num_tags=2, num_symbols=len(letters), order=1)
run = fit(model, data, progress=False)
print(f"{len(words)} words, {run.epochs} iterations of EM")
print(f"nats a word: {run.history[0]['loss']:.3f} at first, {run.history[-1]['loss']:.3f} at last")

# p(state | letter) by Bayes' rule, over the letters of all words: the posterior marginals, averaged.
batch = data.collate(data.examples)
marginals, symbols = model.marginals(batch), batch["inputs"]["symbols"]
share = torch.stack([marginals[(symbols == i) & batch["mask"]].mean(0) for i in range(len(letters))])  # [letters, 2]

vowels = int(share[letters.index("e")].argmax())
table = Table("state", "letters, the surest first")
for name, state in (("that of e", vowels), ("the other", 1 - vowels)):
    mine = [i for i in share[:, state].argsort(descending=True).tolist() if share[i, state] > 0.5]
    table.add_row(name, " ".join(f"{letters[i]} {share[i, state]:.2f}" for i in mine))
Console().print(table)
