"""Pictures as patches: each patch has its place, and a dropped one is not seen."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.nn import PatchEmbedding, PatchEncoder, from_config, to_config


def build(**options) -> PatchEncoder:
    torch.manual_seed(0)
    return PatchEncoder((6, 8), 2, channels=3, dim=8, layers=2, heads=2, dropout=0.0, **options).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("class_token", [False, True])
def test_patches_come_row_by_row_projected_and_placed(class_token, bias):
    embedding = PatchEmbedding((6, 8), 2, channels=3, dim=5, class_token=class_token, bias=bias).double()
    pictures = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    states = embedding(pictures)
    assert embedding.length == states.shape[1] == 12 + class_token
    assert (embedding.convolution.bias is not None) == bias
    if class_token:
        torch.testing.assert_close(states[:, 0], (embedding.class_token + embedding.places[0]).expand(2, -1))
    for patch in range(12):
        place, row, column = patch + class_token, 2 * (patch // 4), 2 * (patch % 4)
        pixels = pictures[:, :, row : row + 2, column : column + 2]
        expected = torch.einsum("bchw,dchw->bd", pixels, embedding.convolution.weight)
        expected = expected + embedding.convolution.bias if bias else expected
        torch.testing.assert_close(states[:, place], expected + embedding.places[place])


@given(data=st.data())
def test_what_a_dropped_patch_shows_changes_nothing(data):
    class_token = data.draw(st.booleans())
    encoder = build(class_token=class_token)
    row = st.lists(st.booleans(), min_size=encoder.length, max_size=encoder.length)
    mask = torch.tensor(data.draw(st.lists(row, min_size=2, max_size=2)))
    pictures, others = torch.randn(2, 2, 3, 6, 8, dtype=torch.float64)
    keep = mask[:, int(class_token) :].view(2, 1, 3, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    states = encoder(pictures, mask)
    assert states.shape == (2, encoder.length, encoder.dim)
    torch.testing.assert_close(states, encoder(torch.where(keep, pictures, others), mask))
    assert not states[~mask].any()


def test_the_place_of_a_patch_matters():
    """And it is told by the places' vectors alone: without them the states move with the patches."""
    encoder, pictures = build(), torch.randn(1, 3, 6, 8, dtype=torch.float64)
    moved = pictures.roll(2, 3)

    def grid(images):
        return encoder(images).view(1, 3, 4, 8)

    assert (grid(pictures).roll(1, 2) - grid(moved)).abs().max() > 1e-6
    encoder.embedding.places.data.zero_()
    torch.testing.assert_close(grid(pictures).roll(1, 2), grid(moved))


@given(data=st.data())
def test_a_class_token_sees_the_patches_that_are_there(data):
    """All that are real and no other, as gradients tell; where it is dropped itself, no patch sees it."""
    encoder = build(class_token=True)
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=13, max_size=13))])
    pictures = torch.randn(1, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    states = encoder(pictures, mask)
    (gradient,) = torch.autograd.grad(states[0, 0].square().sum(), pictures, retain_graph=True)
    seen = gradient[0].view(3, 3, 2, 4, 2).abs().sum((0, 2, 4)).flatten() > 0
    assert torch.equal(seen, mask[0, 1:] & mask[0, :1])
    (gradient,) = torch.autograd.grad(states[0, 1:].square().sum(), encoder.embedding.class_token)
    assert bool(gradient.any()) == bool(mask[0, 0] & mask[0, 1:].any())


def test_an_embedding_norm_comes_before_the_layers():
    encoder, pictures = build(embedding_norm=True, norm_eps=0.1), torch.randn(2, 3, 6, 8, dtype=torch.float64)
    states = encoder.embedding(pictures)
    states = states - states.mean(-1, keepdim=True)
    states = states / (states.square().mean(-1, keepdim=True) + 0.1).sqrt()
    for layer in encoder.layers:
        states = layer(states)
    torch.testing.assert_close(encoder(pictures), encoder.norm(states))
    assert encoder.norm.eps == encoder.layers[0].attention_norm.eps == 0.1


@pytest.mark.parametrize("options", [{}, {"class_token": True, "patch_bias": False, "embedding_norm": True}])
def test_config_and_weights_give_an_equal_encoder(options):
    encoder, pictures = build(**options), torch.randn(1, 3, 6, 8, dtype=torch.float64)
    again = from_config(json.loads(json.dumps(to_config(encoder)))).double()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again({"image": pictures}), encoder(pictures))


@pytest.mark.parametrize(
    ("pictures", "error", "message"),
    [
        (torch.zeros(1, 3, 6, 6), ValueError, "image has shape"),
        (torch.zeros(3, 6, 8), ValueError, "image has shape"),
        (torch.zeros(1, 3, 6, 8, dtype=torch.uint8), TypeError, "image has dtype"),
    ],
)
def test_bad_pictures_raise_by_name(pictures, error, message):
    with pytest.raises(error, match=message):
        build().float()(pictures)


def test_a_picture_must_be_whole_patches():
    with pytest.raises(ValueError, match="multiples of patch_size, 3"):
        PatchEncoder(8, 3)
