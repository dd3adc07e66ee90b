"""ViT and CLIP: our states and logits are transformers', and what is read is written back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from probllm.nn import CLIP, PatchEncoder, TransformerEncoder, read_clip, read_vit, write_clip, write_vit
from probllm.nn.pretrained import Head

transformers = pytest.importorskip("transformers")
V, END = 19, 17
VIT = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 10, "image_size": [4, 6],
    "patch_size": 2, "num_channels": 1, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2,
}  # fmt: skip
TOWER = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 10}
TEXT = {**TOWER, "vocab_size": V, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": END}
CLIP_ = {
    "text_config": TEXT,
    "vision_config": {**TOWER, "hidden_size": 12, "image_size": 6, "patch_size": 2, "attention_dropout": 0.1},
    "projection_dim": 5,
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vit": ("ViTModel", VIT, {}),
    "vit_bare": ("ViTModel", {**VIT, "image_size": 4, "hidden_act": "quick_gelu"}, {"add_pooling_layer": False}),
    "vit_narrow_pooler": ("ViTModel", {**VIT, "pooler_output_size": 3, "patch_size": [2, 2]}, {}),
    "vit_classifier": ("ViTForImageClassification", {**VIT, "num_labels": 5, "hidden_act": "gelu_pytorch_tanh"}, {}),
    "vit_two_labels": ("ViTForImageClassification", VIT, {}),
    "vit_masked": ("ViTForMaskedImageModeling", VIT, {}),
    "clip": ("CLIPModel", CLIP_, {}),
    "clip_gelu": ("CLIPModel", {**CLIP_, "text_config": {**TEXT, "hidden_act": "gelu"}}, {}),
    "clip_of_old": ("CLIPModel", {**CLIP_, "text_config": {**TEXT, "eos_token_id": 2}}, {}),
}
every_case = pytest.mark.parametrize("name", CASES)


def build(cls: str, given_settings: dict[str, Any], arguments: dict[str, Any]) -> Any:
    config = transformers.CLIPConfig if cls == "CLIPModel" else transformers.ViTConfig
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config(**given_settings), **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from zeros, ones and small numbers
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = build(*CASES[name]).to(dtype)
    model.save_pretrained(folder)
    return model


def read(name: str, folder: Path) -> Any:
    return read_clip(folder) if name.startswith("clip") else read_vit(folder)


def write(name: str, folder: Path, what: Any) -> None:
    if name.startswith("clip"):
        write_clip(folder, what)
    else:
        write_vit(folder, *what)


def parameters(what: Any) -> list[torch.Tensor]:
    if isinstance(what, CLIP):
        return [*what.text.parameters(), *what.image.parameters(), *what[2:5]]
    encoder, head = what
    found = [*encoder.parameters(), *(head.pooler.parameters() if head.pooler else [])]
    return [*found, *(t for t in (head.weight, head.bias) if t is not None)]


def options(what: Any) -> list[dict[str, Any]]:
    encoders = what[:2] if isinstance(what, CLIP) else what[:1]
    return [{k: v for k, v in e.config_arguments.items() if k != "embedding"} for e in encoders]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def texts(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids that end at several places and are padded by the end token, and their mask."""
    ends = torch.randint(0, length, (rows,))[:, None]
    ids = torch.randint(3, END, (rows, length))
    return torch.where(torch.arange(length) < ends, ids, END), torch.arange(length) <= ends


@torch.no_grad()
def check_vit(model: Any, encoder: PatchEncoder, head: Head) -> None:
    pictures = torch.randn(3, *encoder.embedding.shape)
    states = encoder.eval()(pictures)
    out = model.base_model(pictures)
    close(states, out.last_hidden_state)
    assert states.shape == (3, encoder.length, encoder.dim)
    if out.pooler_output is None:
        with pytest.raises(ValueError, match="holds no pooler"):
            head.pooled(states)
    else:
        close(head.pooled(states), out.pooler_output)
    assert head.present == isinstance(model, transformers.ViTForImageClassification)
    if head.present:
        close(head.logits(states[:, 0]), model(pictures).logits)
    else:
        with pytest.raises(ValueError, match="token_weight is None"):
            head.logits(states[:, 0])


@torch.no_grad()
def check_clip(model: Any, clip: CLIP) -> None:
    clip.text.eval()
    clip.image.eval()
    pictures, (ids, mask) = torch.randn(3, *clip.image.embedding.shape), texts(4, 10)
    out = model(ids, pictures, mask.long())
    close(clip.text(ids, mask)[mask], out.text_model_output.last_hidden_state[mask])
    close(clip.image(pictures), model.vision_model.post_layernorm(out.vision_model_output.last_hidden_state))
    close(clip.text_vectors(ids, mask), out.text_embeds)
    close(clip.image_vectors(pictures), out.image_embeds)
    close(clip.logits(pictures, ids, mask), out.logits_per_image)
    close(clip.logits(pictures, ids), out.logits_per_image)  # what follows the end changes nothing


def check(model: Any, what: Any) -> None:
    if isinstance(what, CLIP):
        check_clip(model, what)
    else:
        check_vit(model, *what)


@every_case
def test_states_and_logits_are_those_of_transformers(name, tmp_path):
    check(save(name, tmp_path), read(name, tmp_path))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_every_size_is_read(data, tmp_path):
    def tower(height: int) -> dict[str, Any]:
        heads = data.draw(st.integers(1, 3))
        return {
            "hidden_size": heads * data.draw(st.sampled_from([2, 4])),
            "num_attention_heads": heads,
            "num_hidden_layers": data.draw(st.integers(1, 3)),
            "intermediate_size": data.draw(st.integers(1, 9)),
            "hidden_act": data.draw(st.sampled_from(["gelu", "quick_gelu", "relu", "gelu_pytorch_tanh"])),
            "layer_norm_eps": data.draw(st.sampled_from([1e-5, 1e-2])),
            "patch_size": height,
            "num_channels": data.draw(st.integers(1, 3)),
        }

    patch, rows, columns = (data.draw(st.integers(1, 3)) for _ in range(3))
    if data.draw(st.booleans()):
        size = {"image_size": [patch * rows, patch * columns]}
        model = build("ViTModel", {**tower(patch), **size}, {"add_pooling_layer": data.draw(st.booleans())})
    else:
        text = {**TEXT, **tower(patch)}
        vision = {**tower(patch), "image_size": patch * rows}
        model = build("CLIPModel", {"text_config": text, "vision_config": vision, "projection_dim": columns}, {})
    model.save_pretrained(tmp_path)
    check(model, read(model.config.model_type, tmp_path))


@torch.no_grad()
def test_a_dropped_patch_is_one_that_transformers_hides(tmp_path):
    """Of theirs, only the attention is masked; the class token sees what ours sees."""
    model = save("vit", tmp_path)
    encoder, _ = read_vit(tmp_path)
    pictures = torch.randn(2, 1, 4, 6)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0]]).bool()
    hidden = model(pictures, attention_mask=mask.long()).last_hidden_state
    states = encoder.eval()(pictures, mask)
    close(states[mask], hidden[mask])
    assert not states[~mask].any()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_written_back_byte_for_byte(name, dtype, tmp_path):
    model = save(name, tmp_path / "theirs", dtype)
    what = read(name, tmp_path / "theirs")
    write(name, tmp_path / "ours", what)
    theirs, ours = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert set(theirs) == set(ours)
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype == dtype
        assert tensor.shape == ours[key].shape
        assert torch.equal(tensor.flatten().view(torch.uint8), ours[key].flatten().view(torch.uint8)), key
    configs = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("theirs", "ours")]
    assert {k for k, v in configs[0].items() if configs[1].get(k) != v} <= {"patch_size"}
    again = type(model).from_pretrained(tmp_path / "ours", dtype=dtype, **CASES[name][2])
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@every_case
def test_the_writers_own_fields_are_enough(name, tmp_path):
    model = save(name, tmp_path / "theirs")
    what = read(name, tmp_path / "theirs")
    if isinstance(what, CLIP):
        what = what._replace(config={})
    else:
        what[1].config, what[1].prefix, what[1].extra = {}, None, {}
    write(name, tmp_path / "fresh", what)
    again = read(name, tmp_path / "fresh")
    assert all(torch.equal(a, b) for a, b in zip(parameters(again), parameters(what), strict=True))
    assert options(again) == options(what)
    if name != "vit_masked":
        arguments = CASES[name][2]
        check(type(model).from_pretrained(tmp_path / "fresh", **arguments).eval(), what)


@torch.no_grad()
def test_transformers_reads_what_was_made_here(tmp_path):
    torch.manual_seed(0)
    encoder = PatchEncoder((4, 6), 2, 3, dim=8, layers=2, heads=2, activation="gelu_tanh", class_token=True)
    head = Head(torch.randn(4, 8), torch.randn(4))
    write_vit(tmp_path / "vit", encoder, head)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "vit").eval()
    check_vit(model, encoder, head)
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / who / "model.safetensors") for who in ("vit", "again"))
    assert ours.keys() == theirs.keys()
    text = TransformerEncoder(V, dim=8, layers=1, heads=2, positions="learned", causal=True, max_length=12)
    image = PatchEncoder(
        6, 3, 1, dim=4, layers=2, heads=1, activation="relu", class_token=True, patch_bias=False, embedding_norm=True
    )
    clip = CLIP(text, image, torch.randn(5, 8), torch.randn(5, 4), torch.tensor(1.5), END)
    write_clip(tmp_path / "clip", clip)
    check_clip(transformers.AutoModel.from_pretrained(tmp_path / "clip").eval(), clip)


def test_files_of_old_are_read(tmp_path):
    """With the numbers of positions beside the weights, and settings under a longer name that says what differs."""
    model = save("clip", tmp_path)
    path = tmp_path / "model.safetensors"
    extra = {f"{tower}_model.embeddings.position_ids": torch.arange(12)[None] for tower in ("text", "vision")}
    save_file({**load_file(path), **extra}, path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config_dict"] = config["text_config"]
    config["text_config"] = {**config["text_config"], "hidden_act": "relu"}
    del config["vision_config"]["num_channels"]  # a default
    (tmp_path / "config.json").write_text(json.dumps(config))
    clip = read_clip(tmp_path)
    check_clip(model, clip)
    write_clip(tmp_path / "new", clip)
    assert "text_config_dict" not in (tmp_path / "new" / "config.json").read_text()
    check_clip(transformers.CLIPModel.from_pretrained(tmp_path / "new").eval(), clip)
