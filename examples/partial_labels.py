"""How far does a CRF get when most of its labels are missing?

Of every training word only some vowels keep their stress label; the rest are unknown. The likelihood of what is known
sums over all that is not, exactly, so nothing is thrown away and nothing is guessed. Ends in a table.

    python examples/partial_labels.py [--small]
"""

import sys

import pyro
import torch
from rich.console import Console
from rich.table import Table

from probllm import CRFTagger, fit
from probllm.data import Dataset, TaggingVocabulary, stress_tagging
from probllm.evaluation import accuracy, unpad
from probllm.nn import ConvolutionEncoder, WordEmbedding

small = "--small" in sys.argv
sentences = stress_tagging()
vocabulary = TaggingVocabulary.build(sentences.train)
train = vocabulary.dataset(sentences.train[: 400 if small else 6000], ["words"])
test = vocabulary.dataset(sentences.test[: 200 if small else 2000], ["words"])


def forget(data: Dataset, kept: float) -> Dataset:
    """The same words, each label kept with a certain probability and unknown (-1) otherwise."""
    generator = torch.Generator().manual_seed(0)
    return Dataset(
        {
            **example,
            "tags": torch.where(torch.rand(len(example["tags"]), generator=generator) < kept, example["tags"], -1),
        }
        for example in data
    )


def test_accuracy(kept: float):
    pyro.set_rng_seed(0)
    encoder = ConvolutionEncoder(WordEmbedding(len(vocabulary.words), 32), 64)
    model = CRFTagger(encoder, vocabulary.num_tags)
    fit(model, forget(train, kept), epochs=2 if small else 8, learning_rate=3e-3, progress=False)
    with torch.no_grad():
        predicted = [tags for b in test.batches(256, shuffle=False) for tags in unpad(model.predict(b), b["mask"])]
    return accuracy(predicted, [example["tags"].numpy() for example in test])


table = Table("labels known", "accuracy", "95 % interval")
for kept in (1.0, 0.5, 0.2, 0.05):
    score = test_accuracy(kept)
    table.add_row(f"{kept:.0%}", f"{score.value:.2%}", f"{score.low:.2%} to {score.high:.2%}")
Console().print(table)
