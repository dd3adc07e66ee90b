"""Pictures and their captions: a folder of image files with a table that names them.

The table is a CSV file (with a header) or JSON lines, plain or ``.gz``; a row is a file name relative to the table's
folder and a caption. A picture with several captions has several rows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probllm.data.lines import FilePath, malformed, numbered_lines
from probllm.data.optional import missing_data_package

FILE_COLUMNS = ("file_name", "image", "file", "filename")
CAPTION_COLUMNS = ("caption", "text")


class CaptionedImage(NamedTuple):
    """A picture's file and a caption of it."""

    image: Path
    caption: str


def read_captioned_images(table: FilePath) -> list[CaptionedImage]:
    """The rows of a table of pictures and captions.

    Its columns or keys are ``file_name`` (or ``image``, ``file``, ``filename``) and ``caption`` (or ``text``).

    Args:
        table: ``….csv`` or ``….jsonl``, plain or ``.gz``, or the folder of ``captions.…`` or ``metadata.…`` so ending.
    Raises:
        ValueError: for a malformed row, or one whose picture is missing (with file and line); an empty table; another
            kind of file.
        FileNotFoundError: for a folder without a table.
    """
    path = _table(Path(table))
    rows = _csv_rows(path) if ".csv" in path.suffixes else _json_rows(path)
    examples = []
    for number, row in rows:
        name = _value(path, number, row, FILE_COLUMNS)
        caption = _value(path, number, row, CAPTION_COLUMNS)
        image = path.parent / name
        if not image.is_file():
            raise malformed(path, number, f"there is no picture {image}")
        examples.append(CaptionedImage(image, caption))
    if not examples:
        raise ValueError(f"{path}: the table has no rows")
    return examples


def load_image(path: FilePath, size: int | None = None, mode: str = "RGB") -> Tensor:
    """A picture as a float32 tensor ``[channels, height, width]`` from 0 to 1.

    Args:
        size: scale to so many pixels a side, the shorter side cut from the middle; None keeps the picture's own size.
        mode: ``"RGB"``, ``"L"`` (grey) or ``"RGBA"``.
    Raises:
        ValueError: if the file is no picture, or ``mode`` is another.
    """
    channels = {"RGB": 3, "L": 1, "RGBA": 4}
    if mode not in channels:
        raise ValueError(f"mode must be one of {', '.join(channels)}, got {mode!r}")
    if find_spec("PIL") is None:
        raise missing_data_package("pillow")
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert(mode)  # cameras store a turn beside the pixels
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not a picture") from error
    if size is not None:
        image = ImageOps.fit(image, (size, size))
    pixels = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, channels[mode])
    return torch.from_numpy(pixels / 255).permute(2, 0, 1).contiguous()


def _table(path: Path) -> Path:
    if not path.is_dir():
        if not {".csv", ".jsonl"} & set(path.suffixes):
            raise ValueError(f"{path}: expected a table ending in .csv or .jsonl")
        return path
    names = [f"{stem}.{kind}" for stem in ("captions", "metadata") for kind in ("csv", "jsonl", "csv.gz", "jsonl.gz")]
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{path}: the folder holds none of {', '.join(names)}")
    return found[0]


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.reader((line + "\n" for _, line in numbered_lines(path)), strict=True)
    try:
        header = next(reader)
        number = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise malformed(path, number, f"expected {len(header)} columns as in the header, got {len(cells)}")
            if cells:
                yield number, dict(zip(header, cells, strict=True))
            number = reader.line_num + 1  # a quoted cell may run over several lines
    except csv.Error as error:
        raise malformed(path, reader.line_num, str(error)) from error


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise malformed(path, number, f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise malformed(path, number, f"expected a JSON object, got {line!r}")
        yield number, row


def _value(path: Path, number: int, row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
    raise malformed(path, number, f"expected a text under {' or '.join(names)}, got the columns {', '.join(row)}")
