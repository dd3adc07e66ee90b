"""Emoji: names in the languages of the ``emoji`` package (BSD), pictures from the Noto Emoji font (OFL-1.1).

With emoji 2.16 and manimgx-fonts 2026.9: 3,972 emoji named in 14 languages, and 1,386 pictures (of 1,593 forms, but
207 of them ask by a variation selector for the same picture again). Ten pictures still repeat another: 👫 👬 👭, 💃 🕺.
"""

from __future__ import annotations

from importlib import resources
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probllm.data.optional import missing_data_package

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

FONT = "NotoEmoji[wght].ttf"
VARIATION_SELECTOR = "\ufe0f"  # asks for the coloured picture; the code point before it is the emoji


class Glyphs(NamedTuple):
    """Pictures ``[N, 1, size, size]``, float32 from 0 (paper) to 1 (ink), and the emoji of each."""

    images: Tensor
    emoji: list[str]


def emoji_languages() -> list[str]:
    """The languages that have names, as two-letter codes."""
    return sorted(_package().LANGUAGES)


def emoji_names(language: str = "en") -> dict[str, str]:
    """The name of every emoji in a language: ``{"😀": "grinning face", …}``; those without one there are left out.

    Raises:
        ValueError: for a language that the package lacks.
        ImportError: without the package, with the command that installs it.
    """
    package = _package()
    if language not in package.LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(emoji_languages())}, got {language!r}")
    package.config.load_language(language)
    whole = package.STATUS["fully_qualified"]
    return {
        character: str(entry[language]).strip(":").replace("_", " ")
        for character, entry in package.EMOJI_DATA.items()
        if entry["status"] <= whole and language in entry  # partly qualified forms name the same emoji again
    }


def emoji_glyphs(size: int = 32, weight: int = 400) -> Glyphs:
    """A picture of every emoji that is one code point and has a glyph in Noto Emoji, in the order of the code points.

    Each is drawn whole in the middle of its square, all at the one scale at which the largest just fits.

    Args:
        size: pixels a side, at least 8.
        weight: thickness of the strokes, from 300 (light) to 700 (bold).
    Raises:
        ValueError: for a size or weight out of range.
        ImportError: without the packages, with the command that installs them.
    """
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    if not 300 <= weight <= 700:
        raise ValueError(f"weight must lie from 300 to 700, got {weight}")
    for module, name in (("PIL", "pillow"), ("manimgx_fonts", "manimgx-fonts")):
        if find_spec(module) is None:
            raise missing_data_package(name)
    from PIL import ImageFont

    def draw(candidates: list[str], points: float) -> list[NDArray[np.uint8]]:
        font = ImageFont.truetype(str(path), size=points)
        font.set_variation_by_axes([weight])
        return [_ink(font, character) for character in candidates]

    with resources.as_file(resources.files("manimgx_fonts") / FONT) as path:
        candidates = sorted({character.removesuffix(VARIATION_SELECTOR) for character in _package().EMOJI_DATA})
        candidates = [character for character in candidates if len(character) == 1]
        absent, *drawn = draw(["\U0010ffff", *candidates], size)
        emoji = [c for c, ink in zip(candidates, drawn, strict=True) if not np.array_equal(ink, absent)]
        points, drawn = float(size), draw(emoji, size)
        while (extent := max(max(ink.shape) for ink in drawn)) > size:
            points = min(points * size / extent, points - size / 64)  # rounding to pixels may ask for one step more
            drawn = draw(emoji, points)
    pictures = np.zeros((len(emoji), 1, size, size), dtype=np.uint8)
    for picture, ink in zip(pictures, drawn, strict=True):
        height, width = ink.shape
        top, left = (size - height) // 2, (size - width) // 2
        picture[0, top : top + height, left : left + width] = ink
    return Glyphs(torch.from_numpy(pictures).float() / 255, emoji)


def _ink(font: FreeTypeFont, character: str) -> NDArray[np.uint8]:
    """The smallest rectangle of pixels that holds all ink of a character, 0 to 255."""
    mask = font.getmask(character)
    pixels = np.frombuffer(bytes(mask), dtype=np.uint8).reshape(mask.size[::-1])
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    if not len(rows):
        return pixels[:0, :0]
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _package() -> Any:
    try:
        import emoji
    except ImportError as error:
        raise missing_data_package("emoji") from error
    return emoji
