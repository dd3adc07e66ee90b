"""Neural language models: the battery of a model, a law over texts, and reading step by step."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from probllm.decoding import Beam, Contrastive, Greedy, Sample, generate, stream
from probllm.models import CausalLM, MixtureLM, NGramModel
from probllm.nn import RecurrentDecoder, TransformerDecoder, WordEmbedding
from tests.models.battery import CHECKS, Case

SIZE = 5
TEXT = torch.tensor([[0, 3, 1, 4], [2, 2, 0, 0], [1, 0, 4, 0]])
MASK = torch.tensor([[True] * 4, [True, True, False, False], [True, True, True, False]])
PREFIX = torch.tensor([[1, 2], [3, 3], [0, 4]])


def transformer(**options: Any) -> CausalLM:
    return CausalLM(TransformerDecoder(SIZE + 1, dim=8, layers=2, heads=2, dropout=0.0, **options))


MAKERS: dict[str, Callable[[], CausalLM]] = {
    "transformer": transformer,
    "learned positions": lambda: transformer(positions="learned", max_length=16),
    "lstm": lambda: CausalLM(RecurrentDecoder(SIZE + 1, hidden=8, layers=2)),
    "gru, a head of its own": lambda: CausalLM(
        RecurrentDecoder(WordEmbedding(SIZE + 1, 6), hidden=8, cell="gru"), tied=False
    ),
    "begin among the tokens": lambda: CausalLM(
        TransformerDecoder(SIZE, dim=8, layers=1, heads=2, dropout=0.0), begin=2
    ),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
CASES = [
    *(Case(name, make, {"text": TEXT, "mask": MASK}, target="text") for name, make in MAKERS.items()),
    Case("with prefixes", transformer, {"text": TEXT, "mask": MASK, "prefix": PREFIX}, target="text"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_battery(case: Case, check: Callable[[Case], None]) -> None:
    check(case)


def made(make: Callable[[], CausalLM]) -> CausalLM:
    torch.manual_seed(3)
    model = make().double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0)  # far from uniform
    return model


@makers
def test_texts_of_a_length_sum_to_one(make: Callable[[], CausalLM]) -> None:
    every = torch.tensor(list(itertools.product(range(SIZE), repeat=3)))
    for prefix in ({}, {"prefix": PREFIX[:1].expand(len(every), -1)}):
        log_prob = made(make).log_prob({"text": every, **prefix})
        assert float(log_prob.exp().sum()) == pytest.approx(1.0)


@makers
def test_reading_step_by_step_gives_the_score_of_each_token(make: Callable[[], CausalLM]) -> None:
    model = made(make)
    expected = model.token_log_probs({"text": TEXT})
    for read in range(4):
        log_probs, state = model.start(TEXT[:, :read])
        for t in range(read, 4):
            torch.testing.assert_close(log_probs.gather(1, TEXT[:, t : t + 1]).squeeze(1), expected[:, t])
            torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3).to(log_probs))
            log_probs, state = model.step(TEXT[:, t], state)


@makers
def test_padding_on_either_side_of_a_prompt_changes_nothing(make: Callable[[], CausalLM]) -> None:
    model = made(make)
    bare, after = model.start(torch.tensor([[0, 1]]))
    bare_next, _ = model.step(torch.tensor([3]), after)
    prompts = torch.tensor([[2, 0, 1], [0, 1, 2], [0, 2, 1]])
    masks = torch.tensor([[False, True, True], [True, True, False], [True, False, True]])
    padded, state = model.start(prompts, masks)
    torch.testing.assert_close(padded, bare.expand(3, -1))
    padded_next, _ = model.step(torch.tensor([3, 3, 3]), state.select(torch.tensor([2, 0, 1])))
    torch.testing.assert_close(padded_next, bare_next.expand(3, -1))


@makers
def test_the_future_and_what_stands_on_padding_change_no_score(make: Callable[[], CausalLM]) -> None:
    model = made(make)
    found = model.token_log_probs({"text": TEXT, "mask": MASK})
    other = torch.where(MASK, TEXT, 99)
    torch.testing.assert_close(model.token_log_probs({"text": other, "mask": MASK}), found)
    assert not found[~MASK].any()
    later = TEXT.clone()
    later[:, 2:] = 1
    torch.testing.assert_close(
        model.token_log_probs({"text": later})[:, :2], model.token_log_probs({"text": TEXT})[:, :2]
    )


def test_a_prefix_is_read_and_not_scored() -> None:
    model = made(transformer)
    whole = model.token_log_probs({"text": torch.cat([PREFIX, TEXT], 1)})
    torch.testing.assert_close(model.token_log_probs({"text": TEXT, "prefix": PREFIX}), whole[:, 2:])


@makers
def test_it_is_continued_in_every_way(make: Callable[[], CausalLM]) -> None:
    model = made(make)
    prompt = PREFIX
    every = torch.tensor(list(itertools.product(range(SIZE), repeat=2)))
    exact = generate(model, prompt, 2, Beam(SIZE**2), n=SIZE**2)
    for row in range(3):
        whole = {"text": every, "prefix": prompt[row].expand(len(every), -1)}
        torch.testing.assert_close(exact.scores[row], model.log_prob(whole).sort(descending=True).values)
    greedy = generate(model, prompt, 4, Greedy())
    assert torch.equal(generate(model, prompt, 4, Beam(1)).tokens, greedy.tokens)
    assert torch.equal(generate(model, prompt, 4, Contrastive(3, 0.0)).tokens, greedy.tokens)
    assert generate(model, prompt, 4, Contrastive(3, 0.9)).tokens.shape == (3, 1, 4)
    drawn = generate(model, prompt, 4, Sample(), n=2)
    scores = model.log_prob({"text": drawn.tokens.flatten(0, 1), "prefix": prompt.repeat_interleave(2, 0)})
    torch.testing.assert_close(drawn.scores.flatten(), scores)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"text": torch.tensor([[5]])}, "text: expected tokens from 0 to 4, got 5 to 5"),
        ({"text": torch.zeros(1, 2)}, "text: expected long tokens"),
        ({"text": TEXT, "prefix": PREFIX[:1]}, "prefix: expected 3 rows"),
        ({"text": TEXT, "prefix": PREFIX + 9}, "prefix: expected tokens from 0 to 4"),
        ({"text": TEXT, "mask": MASK[:1]}, r"mask: expected shape \[3, 4\]"),
    ],
)
def test_bad_batches_are_named(batch: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transformer().log_prob(batch)


def test_bad_decoders_and_long_prompts_are_named() -> None:
    with pytest.raises(ValueError, match="decoder has a memory_dim"):
        CausalLM(TransformerDecoder(SIZE + 1, dim=8, layers=1, heads=2, memory_dim=8))
    with pytest.raises(ValueError, match="begin: expected a token from 0 to 5"):
        CausalLM(TransformerDecoder(SIZE + 1, dim=8, layers=1, heads=2), begin=6)
    with pytest.raises(ValueError, match="to be tied"):
        CausalLM(RecurrentDecoder(WordEmbedding(SIZE + 1, 6), hidden=8))
    model = transformer(positions="learned", max_length=6)
    with pytest.raises(ValueError, match="prompt: 7 tokens and max_tokens = 2 more are beyond the 6 of a text"):
        generate(model, torch.zeros(1, 7, dtype=torch.long), 2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_are_those_of_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options: dict[str, Any] = {"positions": "learned", "activation": "gelu_tanh", "max_length": 16}
    if family == "llama":
        options = {"norm": "rms", "activation": "swiglu", "bias": False, "kv_heads": 1}
    decoder = TransformerDecoder(SIZE, dim=8, layers=2, heads=2, dropout=0.0, **options)
    model = CausalLM(decoder, begin=2, tied=tied).eval()
    model.to_huggingface(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    text = torch.randint(0, SIZE, (2, 6))
    read = torch.cat([torch.full((2, 1), 2), text[:, :-1]], 1)
    expected = theirs(read).logits.log_softmax(-1).gather(-1, text.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(model.token_log_probs({"text": text}), expected, rtol=1e-4, atol=1e-4)
    again = CausalLM.from_huggingface(tmp_path)
    assert again.begin == 2
    assert (again.head is None) == tied
    torch.testing.assert_close(again.token_log_probs({"text": text}), expected, rtol=1e-4, atol=1e-4)
    again.save(tmp_path / "ours")
    loaded = CausalLM.load(tmp_path / "ours")
    assert torch.equal(loaded.log_prob({"text": text}), again.log_prob({"text": text}))


def test_decoders_that_no_checkpoint_has_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="RecurrentDecoder"):
        MAKERS["lstm"]().to_huggingface(tmp_path)
    with pytest.raises(ValueError, match="norm is 'layer'; a Llama checkpoint has 'rms'"):
        transformer().to_huggingface(tmp_path)
    untied = CausalLM(TransformerDecoder(SIZE + 1, dim=8, layers=1, heads=2, positions="learned"), tied=False)
    with pytest.raises(ValueError, match="the output layer has 5 rows"):
        untied.to_huggingface(tmp_path)
    config = {"model_type": "gpt2", "vocab_size": 5, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    model = CausalLM(TransformerDecoder(SIZE, dim=8, layers=1, heads=2, positions="learned", max_length=8), begin=0)
    model.to_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="neither bos_token_id nor eos_token_id"):
        CausalLM.from_huggingface(tmp_path)
    assert CausalLM.from_huggingface(tmp_path, begin=3).begin == 3


def test_a_text_that_is_longer_than_the_positions_is_refused_before_anything_is_written() -> None:
    model = transformer(positions="learned", max_length=6).eval()
    assert model.longest == 6
    assert transformer().longest is None
    prompt = torch.zeros(1, 4, dtype=torch.long)
    assert generate(model, prompt, 2).tokens.shape == (1, 1, 2)
    with pytest.raises(ValueError, match="prompt: 4 tokens and max_tokens = 3 more are beyond the 6 of a text"):
        generate(model, prompt, 3)
    with pytest.raises(ValueError, match="prompt: 6 tokens and max_tokens = 1 more"):
        next(stream(model, torch.zeros(1, 6, dtype=torch.long), 1))
    mixture = MixtureLM([NGramModel(SIZE, 2), model])
    assert mixture.longest == 6
    assert MixtureLM([NGramModel(SIZE, 2)]).longest is None
