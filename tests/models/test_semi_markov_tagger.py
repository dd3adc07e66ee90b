"""Semi-Markov CRF taggers: the battery of every model, and the law that a user would build."""

import pytest
import torch

from probllm.data import Dataset, labels_of_tags, segmentation_from_tags, tags_from_segmentation
from probllm.distributions import SemiMarkovCRF
from probllm.models.model import Model
from probllm.models.semi_markov_tagger import SemiMarkovTagger
from probllm.nn import FeatureEmbedding
from probllm.training import fit
from tests.models.battery import CHECKS, Case
from tests.models.test_tagger import FEATURES, random_batch, recurrent

K, D = 3, 3
SEGMENTATION = torch.tensor([[1, 2, 0, 0, 3], [2, 0, 0, 0, 0], [1, 3, 0, 0, 0], [1, 1, 2, 0, 1]])
BATCH = {**random_batch([5, 1, 3, 5]), "segmentation": SEGMENTATION}
del BATCH["tags"]

MODELS = {
    "on states": lambda: SemiMarkovTagger(recurrent(), K, D),
    "on features": lambda: SemiMarkovTagger(None, K, D, FeatureEmbedding(FEATURES, 3 * K)),
    "on both": lambda: SemiMarkovTagger(recurrent(), K, [1, 3, 2], FeatureEmbedding(FEATURES, 3 * K)),
}
CASES = [Case(name, make, BATCH, target="segmentation") for name, make in MODELS.items()]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_battery(case, check):
    check(case)


def test_the_law_is_that_of_the_potentials_on_the_encoders_states():
    model = MODELS["on states"]().eval()
    law = SemiMarkovCRF(*model.potentials(model.encoder(BATCH["inputs"], BATCH["mask"])), lengths=BATCH["mask"].sum(1))
    with torch.no_grad():
        torch.testing.assert_close(model.log_prob(BATCH), law.log_prob(SEGMENTATION))
        torch.testing.assert_close(model.marginals(BATCH), law.marginals)
        assert torch.equal(model.predict(BATCH), law.mode)
        assert torch.equal(model.predict(BATCH, "min_risk"), law.min_risk())
        assert model.sample(4, BATCH).shape == (4, 4, 5)


def test_no_segment_is_longer_than_its_label_allows(tmp_path):
    model = MODELS["on both"]().eval()
    with torch.no_grad():
        model.potentials.emit.bias[3:6] = 5.0  # it would like to stay inside
    allowed = torch.arange(1, 4).unsqueeze(-1) <= torch.tensor([1, 3, 2])
    model.save(tmp_path)
    for law in (model.law(BATCH), Model.load(tmp_path).law(BATCH)):
        marginals = law.marginals.sum((0, 1))
        assert bool((marginals[~allowed] == 0).all())
        assert bool((marginals[allowed] > 0).all())


def test_entities_are_learnt_from_their_tags():
    """A word that begins an entity, one that goes on with it, and one that ends it."""
    tags = [["O", "B-x", "I-x", "O", "B-x"], ["B-x", "I-x", "I-x"], ["O", "O"], ["B-x", "B-x", "I-x", "O"]]
    words = [[1, 2, 3, 1, 4], [2, 5, 3], [1, 1], [4, 2, 3, 1]]
    labels = labels_of_tags(["O", "B-x", "I-x"])
    examples = [
        {"inputs": {"features": torch.tensor(w).unsqueeze(-1)}, "segmentation": segmentation_from_tags(t, labels)}
        for w, t in zip(words, tags, strict=True)
    ]
    model = SemiMarkovTagger(None, 2, [1, 3], FeatureEmbedding(6, 6))
    fit(model, Dataset(examples), epochs=60, learning_rate=0.1, progress=False)
    batch = Dataset.collate(examples)
    found = model.predict(batch)
    for row, n, expected in zip(found, batch["mask"].sum(1).tolist(), tags, strict=True):
        assert tags_from_segmentation(row[:n], labels) == expected


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SemiMarkovTagger(None, 2, 3), ValueError, "encoder and scores are both None"),
        (lambda: SemiMarkovTagger(None, 2, 3, FeatureEmbedding(5, 2)), ValueError, r"3 \* num_labels = 6"),
        (lambda: SemiMarkovTagger(recurrent(), 2, 0), ValueError, "max_duration"),
        (lambda: SemiMarkovTagger(recurrent(), 2, [1, 2, 3]), ValueError, "max_duration has 3 numbers"),
        (lambda: SemiMarkovTagger("lstm", 2, 3), TypeError, "encoder is a str"),
        (lambda: MODELS["on states"]().log_prob({"inputs": BATCH["inputs"]}), ValueError, "no segmentation to score"),
        (lambda: MODELS["on states"]().law({"mask": BATCH["mask"]}), ValueError, "no inputs"),
        (lambda: MODELS["on states"]().predict(BATCH, "viterbi"), ValueError, "decoding is 'viterbi'"),
        (lambda: MODELS["on states"]().sample(2), ValueError, "batch is None"),
        (
            lambda: MODELS["on both"]().loss({**BATCH, "segmentation": SEGMENTATION.clamp_max(1)}),
            ValueError,
            r"probability 0 in the rows \[0, 2, 3\]",
        ),
        (lambda: MODELS["on both"]().loss({**BATCH, "segmentation": SEGMENTATION.float()}), TypeError, "torch.long"),
    ],
)
def test_bad_arguments_raise_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
