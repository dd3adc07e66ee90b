"""Files of ViT and CLIP without transformers: what is written is read, and what cannot be is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from probllm.nn import CLIP, PatchEncoder, TransformerEncoder, read_clip, read_vit, write_clip, write_vit
from probllm.nn.embeddings import TypedWordEmbedding
from probllm.nn.pretrained import Head

V = 19
FIRST = "encoder.layer.0"


def a_vit(**options: Any) -> PatchEncoder:
    torch.manual_seed(0)
    return PatchEncoder((4, 6), 2, 3, **{"dim": 8, "layers": 2, "heads": 2, "class_token": True, **options}).eval()


def a_clip(text: dict[str, Any] | None = None, image: dict[str, Any] | None = None, **fields: Any) -> CLIP:
    torch.manual_seed(0)
    of_text = {
        "embedding": V,
        "dim": 8,
        "layers": 1,
        "heads": 2,
        "positions": "learned",
        "causal": True,
        "max_length": 9,
    }
    of_image = {
        "image_size": 4, "patch_size": 2, "dim": 4, "layers": 2, "heads": 1, "class_token": True, "patch_bias": False,
        "embedding_norm": True,
    }  # fmt: skip
    first, second = TransformerEncoder(**{**of_text, **(text or {})}), PatchEncoder(**{**of_image, **(image or {})})
    clip = CLIP(first.eval(), second.eval(), torch.randn(5, 8), torch.randn(5, 4), torch.tensor(0.7), end=3)
    return clip._replace(**fields)


def save(family: str, folder: Path) -> None:
    if family == "clip":
        write_clip(folder, a_clip())
    else:
        write_vit(folder, a_vit(), Head(torch.randn(3, 8), prefix="", pooler=torch.nn.Linear(8, 8)))


def reader(family: str) -> Any:
    return read_clip if family == "clip" else read_vit


every_family = pytest.mark.parametrize("family", ["vit", "clip"])


@torch.no_grad()
def test_a_vit_comes_back(tmp_path):
    encoder, pictures = a_vit(activation="quick_gelu"), torch.randn(2, 3, 4, 6)
    head = Head(
        torch.randn(3, 8), torch.randn(3), extra={"decoder.0.bias": torch.ones(2)}, pooler=torch.nn.Linear(8, 5)
    )
    write_vit(tmp_path, encoder, head)
    again, its = read_vit(tmp_path)
    states = encoder(pictures)
    assert torch.equal(again.eval()(pictures), states)
    assert torch.equal(its.logits(states[:, 0]), states[:, 0] @ head.weight.T + head.bias)
    assert torch.equal(its.pooled(states), head.pooled(states))
    assert its.extra.keys() == {"decoder.0.bias"}
    # A classifier without biases is one with biases of 0, and its labels are as many as it has rows.
    write_vit(tmp_path, encoder, Head(torch.randn(4, 8), config={"num_labels": 5}))
    its = read_vit(tmp_path)[1]
    assert torch.equal(its.bias, torch.zeros(4))
    assert its.config["id2label"].keys() == set("0123")
    assert "num_labels" not in its.config
    write_vit(tmp_path, encoder)
    assert not read_vit(tmp_path)[1].present


@torch.no_grad()
@pytest.mark.parametrize("end", [3, None])
def test_a_clip_comes_back(end, tmp_path):
    clip, pictures = a_clip(end=end), torch.randn(2, 1, 4, 4)
    ids = torch.tensor([[5, 3, 8, 3], [3, 9, 9, 3], [7, 11, 3, 0]])
    write_clip(tmp_path, clip)
    again = read_clip(tmp_path)
    again.text.eval()
    again.image.eval()
    assert again.end == end
    assert again.config["architectures"] == ["CLIPModel"]
    assert torch.equal(again.logits(pictures, ids), clip.logits(pictures, ids))
    # Each text is a state of its own: of its first end token, or of the highest id.
    last = [1, 0, 2] if end else [2, 1, 1]
    for row, place, vector in zip(ids, last, clip.text_vectors(ids), strict=True):
        alone = clip.text_projection @ clip.text(row[None, : place + 1])[0, -1]
        torch.testing.assert_close(vector, alone / alone.norm())


def test_a_text_without_an_end_is_refused():
    with pytest.raises(ValueError, match="a row without the end token, 3"):
        a_clip().text_vectors(torch.tensor([[3, 4], [4, 5]]))


@every_family
def test_a_pickle_is_refused(family, tmp_path):
    save(family, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        reader(family)(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        reader(family)(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        reader(family)(tmp_path / "nowhere")


@every_family
def test_corrupt_safetensors_are_named(family, tmp_path):
    save(family, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file, or corrupt"):
        reader(family)(tmp_path)


@pytest.mark.parametrize(
    ("family", "tensor", "message"),
    [
        ("vit", f"{FIRST}.attention.attention.key.bias", r"shape \[9\]; config.json says \[8\]"),
        ("vit", "embeddings.cls_token", r"shape \[1, 1, 9\]; config.json says \[1, 1, 8\]"),
        ("vit", "embeddings.position_embeddings", r"shape \[1, 7, 9\]; config.json says \[1, 7, 8\]"),
        ("vit", "classifier.weight", r"shape \[3, 9\]; config.json says \[3, 8\]"),
        ("vit", "pooler.dense.weight", r"shape \[8, 9\]; config.json says \[8, 8\]"),
        ("vit", "classifier.bias", r"shape \[4\]; config.json says \[3\]"),
        ("clip", "text_model.encoder.layers.0.mlp.fc1.weight", r"shape \[32, 9\]; config.json says \[32, 8\]"),
        ("clip", "vision_model.embeddings.class_embedding", r"shape \[5\]; config.json says \[4\]"),
        ("clip", "visual_projection.weight", r"shape \[5, 5\]; config.json says \[5, 4\]"),
        ("clip", "logit_scale", r"shape \[2\]; expected \[\]"),
    ],
)
def test_a_checkpoint_of_another_shape_names_the_first_mismatch(family, tensor, message, tmp_path):
    save(family, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    spoilt = torch.nn.functional.pad(tensors[tensor], (0, 1)) if tensors[tensor].dim() else torch.ones(2)
    save_file({**tensors, tensor: spoilt}, path)
    with pytest.raises(ValueError, match=f"the tensor '{tensor}' has {message}"):
        reader(family)(tmp_path)
    save_file({k: v for k, v in tensors.items() if k != tensor}, path)
    with pytest.raises(ValueError, match=f"lacks the tensor '{tensor}'"):
        reader(family)(tmp_path)


def test_a_missing_tensor_is_named_with_its_prefix(tmp_path):
    write_vit(tmp_path, a_vit(), Head(torch.randn(3, 8)))
    path = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != "vit.embeddings.cls_token"}, path)
    with pytest.raises(ValueError, match=r"lacks the tensor 'vit\.embeddings\.cls_token'"):
        read_vit(tmp_path)


def test_a_tensor_that_clip_has_not_is_named(tmp_path):
    save("clip", tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "classifier.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"holds the tensor 'classifier\.weight', which CLIP has not"):
        read_clip(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("vit", {"model_type": "deit"}, "model_type is 'deit'; expected 'vit'"),
        ("vit", {"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        ("vit", {"qkv_bias": False}, "qkv_bias is False"),
        ("vit", {"pooler_act": "relu"}, "pooler_act is 'relu'"),
        ("vit", {"patch_size": [2, 1]}, r"patch_size is \[2, 1\]; square patches"),
        ("clip", {"model_type": "siglip"}, "model_type is 'siglip'; expected 'clip'"),
        ("clip", {"text_config": {"eos_token_id": [1, 2]}}, r"eos_token_id is \[1, 2\]"),
        ("clip", {"vision_config": {"hidden_act": "silu"}}, "hidden_act is 'silu'"),
    ],
)
def test_a_config_that_our_layers_do_not_compute_is_refused(family, changes, message, tmp_path):
    save(family, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        reader(family)(tmp_path)


@pytest.mark.parametrize(
    ("options", "head", "message"),
    [
        ({"class_token": False}, None, "class_token is False; a ViT checkpoint has True"),
        ({"embedding_norm": True}, None, "embedding_norm is True; a ViT checkpoint has False"),
        ({"patch_bias": False}, None, "patch_bias is False; a ViT checkpoint has True"),
        ({"activation": "swiglu"}, None, "activation is 'swiglu'; a ViT checkpoint has one of"),
        ({}, Head(torch.ones(3, 7)), r"weight has shape \[3, 7\]"),
        ({}, Head(torch.ones(3, 8), torch.ones(2)), r"its bias \[2\]"),
    ],
)
def test_what_vit_cannot_hold_is_refused(options, head, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_vit(tmp_path, a_vit(**options), head)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": {"causal": False}}, "causal is False; a CLIP checkpoint has True"),
        ({"text": {"positions": "rope"}}, "positions is 'rope'"),
        ({"text": {"embedding": TypedWordEmbedding(V, 8)}}, "embedding is a TypedWordEmbedding"),
        ({"image": {"patch_bias": True}}, "patch_bias is True; a CLIP checkpoint has False"),
        ({"image": {"embedding_norm": False}}, "embedding_norm is False"),
        ({"image": {"image_size": (4, 6)}}, "a CLIP checkpoint has square pictures"),
        ({"text_projection": torch.ones(5, 4)}, r"text_projection has shape \[5, 4\]; expected \[5, 8\]"),
        ({"image_projection": torch.ones(6, 4)}, r"image_projection has shape \[6, 4\]; expected \[5, 4\]"),
        ({"end": 2}, "end is 2"),
    ],
)
def test_what_clip_cannot_hold_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_clip(tmp_path, a_clip(**changes))
