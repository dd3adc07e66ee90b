r"""N-gram models in the ARPA format, as KenLM and SRILM read and write it.

    \data\                          one line "log10 p <tab> words <tab> log10 back-off weight" for each n-gram,
    ngram 1=3                       by its length; <s> begins a text and </s> ends it
    \1-grams:
    -0.6  a  -0.3
    \end\
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from probllm.data.lines import malformed, numbered_lines
from probllm.math.ngrams import NGrams

BEGIN, NOTHING = "<s>", -99.0  # what the format writes for the logarithm of 0


def write_arpa(path: str | Path, ngrams: NGrams, vocabulary: Sequence[str]) -> None:
    """Write a model; ``vocabulary`` names the tokens from 0 to ``size - 1``. Errors as in ``NGramModel.write_arpa``."""
    if len(vocabulary) != ngrams.size or len(set(vocabulary)) != ngrams.size:
        raise ValueError(f"vocabulary: expected {ngrams.size} different names, got {len(set(vocabulary))}")
    bad = next((x for x in vocabulary if not x or x == BEGIN or any(c.isspace() for c in x)), None)
    if bad is not None:
        raise ValueError(f"vocabulary: expected names without white space, and not {BEGIN}, got {bad!r}")
    names = [*vocabulary, BEGIN]
    parent = np.concatenate([[0], np.repeat(np.arange(len(ngrams.tokens)), np.diff(ngrams.children))])
    depth = np.zeros(len(parent), np.int64)
    for _ in range(ngrams.order):
        depth[1:] = depth[parent[1:]] + 1
    logs, weights = (np.where(np.isfinite(x), x / math.log(10), NOTHING) for x in (ngrams.logs, ngrams.backoffs))
    grams = [""]
    with open(path, "w", encoding="utf-8") as file:
        file.write("\\data\\\n")
        for n in range(1, ngrams.order + 1):
            file.write(f"ngram {n}={int((depth == n).sum())}\n")
        for n in range(1, ngrams.order + 1):
            file.write(f"\n\\{n}-grams:\n")
            for node in np.flatnonzero(depth == n).tolist():
                before = grams[parent[node]]
                grams.append(f"{before} {names[ngrams.tokens[node]]}" if before else names[ngrams.tokens[node]])
                last = f"\t{weights[node]:.9g}" if n < ngrams.order else ""
                file.write(f"{logs[node]:.9g}\t{grams[node]}{last}\n")
        file.write("\n\\end\\\n")


def read_arpa(path: str | Path) -> tuple[NGrams, list[str]]:
    """A model, and the names of its tokens from 0 to ``size - 1``, in the order of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a malformed file, with its name and line.
    """
    path = Path(path)
    lines = iter(numbered_lines(path))
    counts = _counts(path, lines)
    order = len(counts)
    number: dict[str, int] = {}
    child: dict[tuple[int, int], int] = {}
    parents, tokens, logs, weights = [0], [-1], [0.0], [0.0]
    for n in range(1, order + 1):
        found = []
        for line, words, log, weight in _section(path, lines, n, counts[n - 1], n == order):
            if n == 1:
                if words[0] != BEGIN:
                    number.setdefault(words[0], len(number))
                found.append((0, words[0], log, weight, line))
                continue
            node = 0
            for word in words[:-1]:
                node = child.get((node, number.get(word, -1)), -1)
                if node < 0:
                    raise malformed(path, line, f"expected the {n - 1}-gram {' '.join(words[:-1])!r} before it")
            if words[-1] not in number:
                raise malformed(path, line, f"{words[-1]!r} is not among the 1-grams")
            found.append((node, words[-1], log, weight, line))
        if n == 1:
            if BEGIN not in {word for _, word, *_ in found}:
                found.append((0, BEGIN, -math.inf, 0.0, 0))
            vocabulary = list(number)
            number[BEGIN] = len(vocabulary)
        level = sorted((node, number[word], log, weight, line) for node, word, log, weight, line in found)
        for node, token, log, weight, line in level:
            if (node, token) in child:
                raise malformed(path, line, "an n-gram stands here a second time")
            child[node, token] = len(parents)
            parents.append(node)
            tokens.append(token)
            logs.append(-math.inf if token == len(vocabulary) else log)
            weights.append(weight)
    if not any(text.strip() == "\\end\\" for _, text in lines):
        raise ValueError(f"{path}: expected \\end\\ behind the last n-gram: the file is cut off")
    suffixes = [0] * len(parents)
    for node in range(1, len(parents)):
        at = parents[node]
        while at:  # the longest n-gram without the first token that there is
            at = suffixes[at]
            if (at, tokens[node]) in child:
                suffixes[node] = child[at, tokens[node]]
                break
    children = np.searchsorted(np.array(parents[1:]), np.arange(len(parents) + 1)) + 1
    arrays = (np.array(tokens), np.array(logs), np.array(weights), np.array(suffixes))
    return NGrams(len(vocabulary), order, children, *arrays), vocabulary


def _counts(path: Path, lines: Iterator[tuple[int, str]]) -> list[int]:
    """How many n-grams of each length the head of the file says."""
    counts: list[int] = []
    for line, text in lines:
        text = text.strip()
        if not text or text == "\\data\\" or (not counts and not text.startswith("ngram ")):
            if counts and not text:
                return counts
            continue
        head, _, count = text.removeprefix("ngram ").partition("=")
        if not text.startswith("ngram ") or not head.strip().isdigit() or not count.strip().isdigit():
            raise malformed(path, line, f"expected 'ngram N=count', got {text!r}")
        if int(head) != len(counts) + 1:
            raise malformed(path, line, f"expected the count of the {len(counts) + 1}-grams, got {text!r}")
        counts.append(int(count))
    raise ValueError(f"{path}: expected \\data\\ and the counts of n-grams: this is no ARPA file")


def _section(
    path: Path, lines: Iterator[tuple[int, str]], n: int, count: int, last: bool
) -> Iterator[tuple[int, list[str], float, float]]:
    """Line, words, log p and log back-off weight (natural logarithms) of the n-grams of a length."""
    for line, text in lines:
        if text.strip():
            if text.strip() != f"\\{n}-grams:":
                raise malformed(path, line, f"expected '\\{n}-grams:', got {text.strip()!r}")
            break
    else:
        raise ValueError(f"{path}: expected '\\{n}-grams:': the file is cut off")
    for _ in range(count):
        line, text = next(lines, (0, ""))
        fields = text.split()
        try:
            if len(fields) not in ((n + 1,) if last else (n + 1, n + 2)):
                raise ValueError
            log, weight = float(fields[0]), float(fields[n + 1]) if len(fields) == n + 2 else 0.0
            if not (log <= 1e-6 and weight < math.inf):
                raise ValueError
        except ValueError:
            end = "" if last else " and perhaps the log of its back-off weight"
            raise malformed(
                path, line, f"expected a log probability, {n} word{'s' if n > 1 else ''}{end}, got {text.strip()!r}"
            ) from None
        scale = math.log(10)
        yield (
            line,
            fields[1 : n + 1],
            log * scale if log > NOTHING else -math.inf,
            weight * scale if weight > NOTHING else -math.inf,
        )
