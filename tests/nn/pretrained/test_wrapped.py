"""Any transformers model as an encoder: padding, words from subwords, saving, a tagger on top."""

import json
from typing import Any

import pytest
import torch

from probllm.models import CRFTagger
from probllm.nn import PretrainedEncoder, from_config, to_config

transformers = pytest.importorskip("transformers")
V = 19
SMALL = {
    "vocab_size": V, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 10,
    "max_position_embeddings": 30,
}  # fmt: skip
MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
    "bert_with_head": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=V, dim=8, n_layers=1, n_heads=2, hidden_dim=10)
    ),
    "gpt2": lambda: transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=V, d_model=8, num_layers=1, num_heads=2, d_kv=4, d_ff=10)
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def inputs() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Two sentences of three and two words; special tokens around each."""
    torch.manual_seed(0)
    word_index = torch.tensor([[-1, 0, 0, 1, 2, -1], [-1, 0, 1, -1, -1, -1]])
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    batch = {"subwords": torch.randint(1, V, (2, 6)), "word_index": word_index, "subword_mask": real}
    return batch, torch.tensor([[True, True, True], [True, True, False]])


@every_model
@pytest.mark.parametrize("pooling", ["first", "mean"])
@torch.no_grad()
def test_words_are_pooled_and_padding_changes_nothing(name, pooling):
    encoder = PretrainedEncoder(MODELS[name](), pooling).eval()
    batch, mask = inputs()
    words = encoder(batch, mask)
    assert words.shape == (2, 3, 8)
    assert encoder.dim == 8
    states = encoder(batch["subwords"], batch["subword_mask"])
    assert not states[~batch["subword_mask"]].any()
    assert not words[~mask].any()
    torch.testing.assert_close(states[1:, :4], encoder(batch["subwords"][1:, :4]))
    first = states[0, 1] if pooling == "first" else states[0, 1:3].mean(0)
    torch.testing.assert_close(words[0, 0], first)
    torch.testing.assert_close(words[1, 1], states[1, 2])
    torch.testing.assert_close(encoder(batch), words)


@every_model
def test_it_comes_back_from_json_and_weights(name):
    encoder = PretrainedEncoder(MODELS[name](), "mean").eval()
    again = from_config(json.loads(json.dumps(to_config(encoder)))).eval()
    again.load_state_dict(encoder.state_dict())
    batch, mask = inputs()
    assert torch.equal(again(batch, mask), encoder(batch, mask))
    assert again.pooling == "mean"


def test_a_local_folder_is_read_and_a_pickle_is_not(tmp_path):
    model = MODELS["bert"]()
    model.save_pretrained(tmp_path)
    batch, mask = inputs()
    encoder = PretrainedEncoder(tmp_path).eval()
    assert torch.equal(encoder(batch, mask), PretrainedEncoder(model.eval())(batch, mask))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has no safetensors"):
        PretrainedEncoder(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        PretrainedEncoder("bert-base-uncased")


def test_a_tagger_on_top_learns_through_it_and_is_saved(tmp_path):
    tagger = CRFTagger(PretrainedEncoder(MODELS["bert"]()), 3)
    batch, mask = inputs()
    data: dict[str, Any] = {"inputs": batch, "mask": mask, "tags": torch.tensor([[0, 1, 2], [2, 0, 0]])}
    loss = tagger.loss(data)
    loss.backward()
    assert tagger.encoder.model.embeddings.word_embeddings.weight.grad.any()
    tagger.eval().save(tmp_path)
    again = CRFTagger.load(tmp_path).eval()
    torch.testing.assert_close(again.loss(data), tagger.loss(data))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"subwords": torch.full((2, 6), V)}, ValueError, f"subwords has ids from {V} to {V}; expected ids from 0"),
        ({"subword_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "subword_mask has shape"),
        ({"word_index": torch.full((2, 6), 3)}, ValueError, "word_index has ids"),
    ],
)
def test_bad_inputs_raise_by_name(change, error, message):
    encoder = PretrainedEncoder(MODELS["bert"]())
    batch, mask = inputs()
    with pytest.raises(error, match=message):
        encoder({**batch, **change}, mask)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="model is a Linear"):
        PretrainedEncoder(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pooling is 'max'"):
        PretrainedEncoder(MODELS["bert"](), "max")
    config = to_config(PretrainedEncoder(MODELS["bert"]()))
    config["arguments"]["model"]["name"] = "pipeline"
    with pytest.raises(ValueError, match="names 'pipeline', which is no model"):
        from_config(config)
