"""Masked language models: the battery of a model, what hidden tokens count for, and BERT's checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyro
import pytest
import torch
from torch import Tensor

from probllm.models import MaskedLM
from probllm.nn import RecurrentEncoder, TransformerEncoder, WordEmbedding
from probllm.nn.embeddings import TypedWordEmbedding
from probllm.nn.pretrained.checkpoint import OutputTransform
from tests.models.battery import CHECKS, Case

SIZE = 7
INPUTS = torch.tensor([[6, 3, 6, 4], [2, 6, 0, 0], [1, 0, 6, 0]])
MASK = torch.tensor([[True] * 4, [True, True, False, False], [True, True, True, False]])
HIDDEN = INPUTS == 6
TARGET = torch.tensor([[5, 0, 2, 0], [0, 1, 0, 0], [0, 0, 3, 0]])
BATCH = {"inputs": INPUTS, "mask": MASK, "hidden": HIDDEN, "target": TARGET}


def bert(tied: bool = True) -> MaskedLM:
    encoder = TransformerEncoder(
        TypedWordEmbedding(SIZE, 8, 2), dim=8, layers=2, heads=2, dropout=0.0, positions="learned", max_length=16,
        norm_first=False, embedding_norm=True,
    )  # fmt: skip
    return MaskedLM(encoder, transform=OutputTransform(8, norm_eps=1e-5), tied=tied)


MAKERS: dict[str, Callable[[], MaskedLM]] = {
    "bert": bert,
    "rotary, no transform": lambda: MaskedLM(TransformerEncoder(SIZE, dim=8, layers=1, heads=2, dropout=0.0)),
    "bilstm, a head of its own": lambda: MaskedLM(RecurrentEncoder(SIZE, 4), size=SIZE, tied=False),
    "fewer tokens than rows": lambda: MaskedLM(
        TransformerEncoder(SIZE + 2, dim=8, layers=1, heads=2, dropout=0.0), size=SIZE
    ),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
CASES = [Case(name, make, BATCH, target="target") for name, make in MAKERS.items()]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_battery(case: Case, check: Callable[[Case], None]) -> None:
    check(case)


@makers
def test_each_hidden_token_has_a_law_of_its_own(make: Callable[[], MaskedLM]) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    logits = model.logits(model.encoder(INPUTS, MASK))
    expected = logits.log_softmax(-1).gather(-1, TARGET.unsqueeze(-1)).squeeze(-1) * HIDDEN
    torch.testing.assert_close(model.token_log_probs(BATCH), expected)
    torch.testing.assert_close(model.log_prob(BATCH), expected.sum(-1))
    assert torch.equal(model.predict(BATCH), logits.argmax(-1) * HIDDEN)
    pyro.set_rng_seed(1)
    drawn = model.sample(3000, BATCH)
    assert not drawn[:, ~HIDDEN].any()
    p = logits.softmax(-1)[HIDDEN]
    share = torch.nn.functional.one_hot(drawn[:, HIDDEN], SIZE).double().mean(0)
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / 3000).sqrt() + 1e-3).all()


@makers
def test_where_nothing_is_hidden_the_loss_is_0(make: Callable[[], MaskedLM]) -> None:
    model = make()
    loss = model.loss({**BATCH, "hidden": torch.zeros_like(HIDDEN)})
    assert float(loss.detach()) == 0.0
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()


def test_what_stands_in_other_places_of_the_target_changes_nothing() -> None:
    model = bert().eval()
    other = TARGET.where(HIDDEN, 99)
    assert torch.equal(model.log_prob({**BATCH, "target": other}), model.log_prob(BATCH))
    padded = {**BATCH, "hidden": HIDDEN | ~MASK}  # padding is never asked for
    assert torch.equal(model.log_prob(padded), model.log_prob(BATCH))


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_are_those_of_transformers(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = bert(tied).eval()
    torch.nn.init.normal_(model.bias)
    model.to_huggingface(tmp_path)
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    ids, whole = torch.randint(0, SIZE, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    expected = theirs(ids, attention_mask=whole.long()).logits
    torch.testing.assert_close(model.logits(model.encoder(ids, whole)), expected, rtol=1e-4, atol=1e-4)
    again = MaskedLM.from_huggingface(tmp_path)
    torch.testing.assert_close(again.logits(again.encoder(ids, whole)), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(again.log_prob(BATCH), model.log_prob(BATCH))


def test_checkpoints_without_an_output_layer_are_named(tmp_path: Path) -> None:
    from probllm.nn import write_bert

    write_bert(tmp_path, bert().encoder)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no output layer"):
        MaskedLM.from_huggingface(tmp_path)
    with pytest.raises(ValueError, match="transform is None"):
        MaskedLM(bert().encoder).to_huggingface(tmp_path)
    with pytest.raises(ValueError, match="the head's transform has norm_eps 1e-12"):
        MaskedLM(bert().encoder, transform=OutputTransform(8)).to_huggingface(tmp_path)
    with pytest.raises(TypeError, match="RecurrentEncoder"):
        MAKERS["bilstm, a head of its own"]().to_huggingface(tmp_path)
    model = MaskedLM(TransformerEncoder(SIZE + 2, dim=8, layers=1, heads=2), SIZE, OutputTransform(8))
    with pytest.raises(ValueError, match="size is 7"):
        model.to_huggingface(tmp_path)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"target": TARGET + 5}, "target: expected tokens from 0 to 6"),
        ({"hidden": HIDDEN.long()}, "hidden: expected bool"),
        ({"mask": MASK[:, :3]}, "mask: expected shape"),
    ],
)
def test_bad_batches_are_named(batch: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bert().log_prob({**BATCH, **batch})


def test_bad_parts_are_named() -> None:
    with pytest.raises(TypeError, match="tied=False is needed"):
        MaskedLM(_Bare(), size=3)
    with pytest.raises(TypeError, match="size is needed"):
        MaskedLM(_Bare(), tied=False)
    with pytest.raises(ValueError, match="size: expected"):
        MaskedLM(TransformerEncoder(SIZE, dim=8, layers=1, heads=2), size=8)
    with pytest.raises(ValueError, match="expected 8, to be tied"):
        MaskedLM(TransformerEncoder(WordEmbedding(SIZE, 4), dim=8, layers=1, heads=2))
    with pytest.raises(ValueError, match="batch is None"):
        bert().sample(1)


class _Bare(TransformerEncoder):
    """An encoder whose embedding is none of words."""

    def __init__(self) -> None:
        from probllm.nn import CharacterCNN

        super().__init__(CharacterCNN(5, filters=8), dim=8, layers=1, heads=2)
