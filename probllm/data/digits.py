"""Handwritten digits: 1,797 scans of 8×8 pixels, from scikit-learn (UCI; Alpaydin and Kaynak, 1998)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Digits(NamedTuple):
    """Pictures ``[1797, 1, 8, 8]``, float32 from 0 (paper) to 1 (ink), and the digit of each, long ``[1797]``."""

    images: Tensor
    labels: Tensor


def digits() -> Digits:
    """All scans, in the order of the source. By its custom the first 1,000 train and the rest test."""
    from sklearn.datasets import load_digits  # a second to import: where it is used

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    return Digits(images, torch.from_numpy(bunch.target).long())
