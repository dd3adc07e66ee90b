"""Shapes broadcast as torch's do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.math.shapes import broadcast_shapes

shapes = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), max_size=4)


@given(shapes=shapes)
def test_shapes_broadcast_as_torchs_do(shapes):
    try:
        expected = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            broadcast_shapes(*shapes)
    else:
        assert broadcast_shapes(*shapes) == expected
        assert isinstance(broadcast_shapes(*shapes), torch.Size)
