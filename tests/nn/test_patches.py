"""Pictures as patches: each patch has its place, and a dropped one is not seen."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.nn import PatchEmbedding, PatchEncoder, from_config, to_config


def build() -> PatchEncoder:
    torch.manual_seed(0)
    return PatchEncoder((6, 8), 2, channels=3, dim=8, layers=2, heads=2, dropout=0.0).double()


def test_patches_come_row_by_row_projected_and_placed():
    embedding = PatchEmbedding((6, 8), 2, channels=3, dim=5).double()
    pictures = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    states = embedding(pictures)
    assert embedding.length == 12
    for place in range(12):
        row, column = 2 * (place // 4), 2 * (place % 4)
        patch = pictures[:, :, row : row + 2, column : column + 2]
        expected = torch.einsum("bchw,dchw->bd", patch, embedding.convolution.weight) + embedding.convolution.bias
        torch.testing.assert_close(states[:, place], expected + embedding.places[place])


@given(data=st.data())
def test_what_a_dropped_patch_shows_changes_nothing(data):
    encoder = build()
    row = st.lists(st.booleans(), min_size=12, max_size=12)
    mask = torch.tensor(data.draw(st.lists(row, min_size=2, max_size=2)))
    pictures, others = torch.randn(2, 2, 3, 6, 8, dtype=torch.float64)
    keep = mask.view(2, 1, 3, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
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


def test_config_and_weights_give_an_equal_encoder():
    encoder, pictures = build(), torch.randn(1, 3, 6, 8, dtype=torch.float64)
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
