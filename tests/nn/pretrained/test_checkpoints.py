"""GPT-2, BERT and the Llama family: our states and logits are transformers', and what is read is written back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from probllm.nn import (
    TransformerDecoder,
    TransformerEncoder,
    TypedWordEmbedding,
    WordEmbedding,
    read_bert,
    read_gpt2,
    read_llama,
    write_bert,
    write_gpt2,
    write_llama,
)

transformers = pytest.importorskip("transformers")
V = 19
GPT2 = {
    "vocab_size": V,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 12,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BERT = {
    "vocab_size": V, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 10,
    "max_position_embeddings": 12,
}  # fmt: skip
LLAMA = {**BERT, "num_key_value_heads": 1, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2_wide": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "n_inner": 11, "activation_function": "relu"}),
    "gpt2_untied": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "tie_word_embeddings": False}),
    "gpt2_bare": ("GPT2Model", "GPT2Config", GPT2),
    "gpt2_classifier": ("GPT2ForSequenceClassification", "GPT2Config", {**GPT2, "pad_token_id": 0}),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "bert_pretraining": ("BertForPreTraining", "BertConfig", {**BERT, "hidden_act": "gelu_new", "type_vocab_size": 3}),
    "bert_untied": ("BertForMaskedLM", "BertConfig", {**BERT, "tie_word_embeddings": False}),
    "bert_bare": ("BertModel", "BertConfig", BERT),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": 3}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 6, "rope_theta": 500.0}),
}
every_case = pytest.mark.parametrize("name", CASES)


def reader(name: str) -> Any:
    return {"gpt2": read_gpt2, "bert": read_bert}.get(name.split("_")[0], read_llama)


def writer(name: str) -> Any:
    return {"gpt2": write_gpt2, "bert": write_bert}.get(name.split("_")[0], write_llama)


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    cls, config, settings = CASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from zeros, ones and small numbers
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return model


@every_case
@torch.no_grad()
def test_states_and_logits_are_those_of_transformers(name, tmp_path):
    model = save(name, tmp_path)
    stack, head = reader(name)(tmp_path)
    stack.eval()
    ids = torch.randint(0, V, (3, 12))
    weight = stack.embedding.weight
    if "bert" in name:
        mask = torch.arange(12) < torch.tensor([12, 7, 3])[:, None]
        types = torch.randint(0, stack.embedding.types, (3, 12))
        states = stack({"words": ids, "types": types}, mask)
        theirs = model.base_model(ids, mask.long(), types).last_hidden_state
        torch.testing.assert_close(states[mask], theirs[mask], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stack(ids), stack({"words": ids, "types": torch.zeros_like(ids)}))
        assert head.present == (name != "bert_bare")
        if head.present:
            out = model(ids, mask.long(), types)
            logits = out.logits if hasattr(out, "logits") else out.prediction_logits
            torch.testing.assert_close(head.logits(states, weight)[mask], logits[mask], rtol=1e-4, atol=1e-4)
        return
    states = stack(ids)
    torch.testing.assert_close(states, model.base_model(ids).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert head.present == (name not in ("gpt2_bare", "gpt2_classifier"))
    if head.present:
        torch.testing.assert_close(head.logits(states, weight), model(ids).logits, rtol=1e-4, atol=1e-4)
    cache = stack.new_cache(3)
    pieces = torch.cat([stack(piece, cache=cache) for piece in ids.split([5, 1, 6], 1)], 1)
    torch.testing.assert_close(pieces, states, rtol=1e-4, atol=1e-4)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_written_back_byte_for_byte(name, dtype, tmp_path):
    save(name, tmp_path / "theirs", dtype)
    stack, head = reader(name)(tmp_path / "theirs")
    writer(name)(tmp_path / "ours", stack, head)
    theirs, ours = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert set(theirs) == set(ours)
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), ours[key].view(torch.uint8)), key
    assert not [p for p in (tmp_path / "ours").iterdir() if p.suffix == ".new"]
    configs = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("theirs", "ours")]
    changed = {key for key, value in configs[0].items() if configs[1].get(key) != value}
    assert changed <= {"n_inner"}
    # The writer's own fields are enough without those that were read.
    head.config = {}
    writer(name)(tmp_path / "fresh", stack, head)
    again, _ = reader(name)(tmp_path / "fresh")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), stack.parameters(), strict=True))
    options = [module.config_arguments for module in (again, stack)]
    assert {k: v for k, v in options[0].items() if k != "embedding"} == {
        k: v for k, v in options[1].items() if k != "embedding"
    }


OURS = {
    "gpt2": lambda: TransformerDecoder(
        V, dim=8, layers=2, heads=2, positions="learned", activation="gelu_tanh", max_length=12
    ),
    "bert": lambda: TransformerEncoder(
        TypedWordEmbedding(V, 8), dim=8, layers=2, heads=2, positions="learned", norm_first=False, embedding_norm=True
    ),
    "llama": lambda: TransformerDecoder(
        V, dim=8, layers=2, heads=4, kv_heads=2, norm="rms", activation="swiglu", bias=False, rope_base=100.0
    ),
}


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_transformers_reads_what_was_trained_here(name, tmp_path):
    torch.manual_seed(0)
    stack = OURS[name]().eval()
    writer(name)(tmp_path, stack)
    theirs = (transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM).from_pretrained(tmp_path)
    ids = torch.randint(0, V, (2, 10))
    states = theirs.eval().base_model(ids).last_hidden_state
    torch.testing.assert_close(stack(ids), states, rtol=1e-4, atol=1e-4)
    if name != "bert":
        torch.testing.assert_close(stack(ids) @ stack.token_weight.T, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_files_in_pieces_are_read_as_one(tmp_path):
    model = save("llama", tmp_path)
    model.save_pretrained(tmp_path / "pieces", max_shard_size="1KB")
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 1
    whole, _ = read_llama(tmp_path)
    pieces, _ = read_llama(tmp_path / "pieces")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), pieces.parameters(), strict=True))


def test_a_pickle_is_refused(tmp_path):
    model = save("gpt2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        read_gpt2(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        read_gpt2(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        read_gpt2(tmp_path / "nowhere")


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"\x80\x04" + b[2:], lambda b: b""])
def test_corrupt_safetensors_are_named(spoil, tmp_path):
    save("gpt2", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file, or corrupt"):
        read_gpt2(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "gpt2",
            "transformer.h.1.attn.c_attn.weight",
            r"c_attn.weight' has shape \[8, 25\]; config.json says \[8, 24\]",
        ),
        ("bert", "bert.encoder.layer.0.attention.self.key.bias", r"key.bias' has shape \[9\]; config.json says \[8\]"),
        ("llama", "model.layers.1.mlp.up_proj.weight", r"up_proj.weight' has shape \[10, 9\]; .* says \[10, 8\]"),
    ],
)
def test_a_checkpoint_of_another_shape_names_the_first_mismatch(name, tensor, message, tmp_path):
    save(name, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    spoilt = torch.nn.functional.pad(tensors[tensor], (0, 1))
    save_file({**tensors, tensor: spoilt}, path)
    with pytest.raises(ValueError, match=message):
        reader(name)(tmp_path)
    save_file({k: v for k, v in tensors.items() if k != tensor}, path)
    with pytest.raises(ValueError, match=f"lacks the tensor '{tensor}'"):
        reader(name)(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"model_type": "opt"}, "model_type is 'opt'; expected 'gpt2'"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function is 'tanh'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3'"),
        ("llama", {"attention_bias": True}, "attention_bias is True"),
    ],
)
def test_a_config_that_our_layers_do_not_compute_is_refused(name, changes, message, tmp_path):
    save(name, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        reader(name)(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        reader(name)(tmp_path)


@pytest.mark.parametrize(
    ("write", "stack", "message"),
    [
        (write_gpt2, lambda: TransformerDecoder(V, dim=8), "positions is 'rope'; a GPT-2 checkpoint has 'learned'"),
        (write_gpt2, lambda: TransformerDecoder(V, dim=8, positions="learned", activation="swiglu"), "activation is"),
        (
            write_gpt2,
            lambda: TransformerDecoder(WordEmbedding(V, 4), dim=8, positions="learned"),
            "embedding has dim 4",
        ),
        (write_bert, lambda: TransformerEncoder(V, dim=8), "positions is 'rope'; a BERT checkpoint has"),
        (
            write_bert,
            lambda: TransformerEncoder(V, dim=8, positions="learned", norm_first=False, embedding_norm=True),
            "embedding is a WordEmbedding",
        ),
        (write_llama, lambda: TransformerDecoder(V, dim=8), "norm is 'layer'; a Llama checkpoint has 'rms'"),
        (
            write_llama,
            lambda: TransformerDecoder(
                V, dim=8, norm="rms", activation="swiglu", bias=False, qkv_bias=True, qk_norm=True
            ),
            "Qwen3 and Qwen2 at once",
        ),
    ],
)
def test_a_stack_that_the_family_cannot_hold_is_refused(write, stack, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, stack())
