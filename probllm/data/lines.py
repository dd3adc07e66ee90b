"""Files of lines: plain text, one sentence a line, ``LABEL text`` a line, and two files that agree line by line.

All are UTF-8, plain or gzip (``.gz``), with ``\\n`` or ``\\r\\n``. A fault names the file and the line.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import NamedTuple, TypeAlias

FilePath: TypeAlias = str | PathLike[str]


class LabelledText(NamedTuple):
    """A text and its label, as they stand on one line."""

    label: str
    text: str


def read_text(path: FilePath) -> str:
    """The whole text of a file, line ends as ``\\n``.

    Raises:
        ValueError: if the file is empty, not UTF-8 (with the line), or not gzip although it ends in ``.gz``.
    """
    ending = "\n" if _read_bytes(path).endswith(b"\n") else ""
    return "\n".join(line for _, line in numbered_lines(path)) + ending


def read_lines(path: FilePath) -> list[str]:
    """The lines of a file, one sentence or name each, without their ends.

    Raises:
        ValueError: as ``read_text``, and for a blank line.
    """
    lines = []
    for number, line in numbered_lines(path):
        if not line.strip():
            raise malformed(path, number, "expected text, got a blank line")
        lines.append(line)
    return lines


def read_labelled_lines(path: FilePath) -> list[LabelledText]:
    """Lines of a label, a space or tab, and a text: ``1 a stirring , funny film``.

    Raises:
        ValueError: as ``read_text``, and for a line without a label and a text.
    """
    texts = []
    for number, line in numbered_lines(path):
        parts = line.split(maxsplit=1)
        if len(parts) < 2 or line[0].isspace():
            raise malformed(path, number, f"expected 'LABEL text', got {line!r}")
        texts.append(LabelledText(parts[0], parts[1].rstrip()))
    return texts


def read_parallel_lines(source: FilePath, target: FilePath) -> list[tuple[str, str]]:
    """Pairs of lines of two files that agree line by line, such as a text and its translation.

    Raises:
        ValueError: as ``read_lines`` for either file, and if one has more lines than the other.
    """
    sources, targets = read_lines(source), read_lines(target)
    if len(sources) != len(targets):
        shorter, longer = sorted((len(sources), len(targets)))
        path = target if len(sources) < len(targets) else source
        raise malformed(path, shorter + 1, f"no line of the other file answers it: {longer} lines against {shorter}")
    return list(zip(sources, targets, strict=True))


def numbered_lines(path: FilePath) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, plain or ``.gz``, with their numbers from 1; a byte order mark is dropped.

    Raises:
        ValueError: if the file is empty (blank lines alone count as empty) or a line is not UTF-8.
    """
    content = _read_bytes(path)
    if not content.strip():
        raise ValueError(f"{path}: the file is empty")
    # Only \n ends a line: str.splitlines would also cut at U+0085 and U+2028, which occur inside real tokens.
    lines = content.removesuffix(b"\n").split(b"\n")
    lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(lines, start=1):
        try:
            yield number, line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            fault = f"not UTF-8: {error.reason} {line[error.start : error.start + 1]!r} at byte {error.start + 1}"
            raise malformed(path, number, fault) from error


def malformed(path: FilePath, number: int, message: str) -> ValueError:
    """The error for a line that a reader cannot take: ``FILE:LINE: message``."""
    return ValueError(f"{path}:{number}: {message}")


def _read_bytes(path: FilePath) -> bytes:
    content = Path(path).read_bytes()
    if Path(path).suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from error
