"""Examples of unequal length, and the batches made of them.

An example is a dict of unpadded tensors (``inputs`` may itself be a dict of tensors). ``collate`` pads on the right
with 0 and says in ``mask`` what is real. Batches hold examples of similar length: a shuffled order is cut into pools of
``POOL`` batches, each pool sorted by length (then that of ``target``, if there is one), cut into batches, and the
batches shuffled again. The order is a function of (seed, epoch) alone, so a run that was killed goes on with
``data.batches(..., seed=seed, epoch=epoch)[step:]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

Example: TypeAlias = Mapping[str, Tensor | Mapping[str, Tensor]]
Batch: TypeAlias = dict[str, Tensor | dict[str, Tensor]]

BY_WORD = ("words", "characters", "features", "symbols")  # inputs with an entry a word
PADDING = {"word_index": -1}  # the word of a subword, counted from 0: none; every other field is padded with 0
POOL = 64  # batches sorted by length together: enough for tight padding, few enough to keep the order random


class Dataset(Sequence[Example]):
    """A list of examples, each a dict of unpadded tensors.

    Args:
        examples: dicts with the same keys; ``data[i]`` is an example, ``data[2:5]`` and ``data[[7, 1]]`` are Datasets.
    Raises:
        TypeError: for an example that is no dict.
        ValueError: if two examples have different keys, or an example is a sequence without tokens or has another
            number of words than of tags.
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        self.examples: list[Example] = list(examples)
        for index, example in enumerate(self.examples):
            if not isinstance(example, Mapping):
                raise TypeError(f"example {index} is a {type(example).__name__}, expected a dict of tensors")
            if example.keys() != self.examples[0].keys():
                raise ValueError(
                    f"example {index} has the keys {sorted(example)}, but example 0 has {sorted(self.examples[0])}"
                )
            _check_words(index, example)
        self.lengths: list[int] = [_length(example) for example in self.examples]
        """The number of tokens of each example (1 where an example is not a sequence)."""
        self._sizes = [(n, _target_length(example)) for n, example in zip(self.lengths, self.examples, strict=True)]
        if 0 in self.lengths:
            raise ValueError(f"example {self.lengths.index(0)} has no tokens: every sequence needs at least one")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor | Mapping[str, Tensor]]) -> Dataset:
        """One example a row of tensors that share their leading dimension.

        Raises:
            ValueError: if the leading dimensions differ or a tensor has none.
        """
        sizes = {f"{name}": tuple(value.shape[:1]) for name, value in _leaves(tensors)}
        if len(set(sizes.values())) != 1 or () in sizes.values():
            raise ValueError(f"tensors must share one leading dimension, got {sizes}")
        count = next(iter(sizes.values()))[0]
        return cls(
            {
                key: {name: tensor[i] for name, tensor in value.items()} if isinstance(value, Mapping) else value[i]
                for key, value in tensors.items()
            }
            for i in range(count)
        )

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int]) -> Dataset: ...
    def __getitem__(self, index: int | slice | Sequence[int]) -> Example | Dataset:
        if isinstance(index, slice):
            return Dataset(self.examples[index])
        if isinstance(index, Sequence):
            return Dataset([self.examples[i] for i in index])
        return self.examples[index]

    def __repr__(self) -> str:
        keys = ", ".join(self.examples[0]) if self.examples else ""
        return f"Dataset({len(self)} examples of {{{keys}}}, {sum(self.lengths)} tokens)"

    @staticmethod
    def collate(examples: Sequence[Example]) -> Batch:
        """One batch of several examples, right-padded on the first two axes with 0 (``word_index`` with -1).

        Returns:
            the examples' fields with a leading batch axis and, unless the examples bring their own, ``mask`` (bool
            ``[B, L]``, True = real) where they are sequences.
        Raises:
            ValueError: for no examples, or fields of different rank or of different size beyond the second axis.
        """
        if not examples:
            raise ValueError("examples is empty: a batch needs at least one")
        batch: Batch = {}
        for key, value in examples[0].items():
            if isinstance(value, Mapping):
                batch[key] = {
                    name: _pad(f"{key}.{name}", [example[key][name] for example in examples])  # type: ignore[index]
                    for name in value
                }
            else:
                batch[key] = _pad(key, [example[key] for example in examples])  # type: ignore[misc]
        if "mask" not in batch and _tokens(examples[0]) is not None:
            lengths = torch.tensor([_length(example) for example in examples])
            batch["mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
        return batch

    def batches(
        self,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
    ) -> Batches:
        """The batches of one epoch, each example in exactly one.

        Args:
            batch_size: at most so many examples a batch; 32 if neither bound is given.
            max_tokens: at most so many tokens a batch, padding counted (examples times the longest of them).
            shuffle: random order with examples of similar length together; False keeps the order of the data.
            seed, epoch: the order depends on these two numbers alone.
        Returns:
            a sequence of batches, made when asked for; its ``indices`` say which examples each holds.
        Raises:
            ValueError: if a bound is below 1, or an example alone is longer than ``max_tokens``.
        """
        for name, bound in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if bound is not None and bound < 1:
                raise ValueError(f"{name} must be at least 1, got {bound}")
        if max_tokens is not None and self.lengths and max(self.lengths) > max_tokens:
            longest = int(np.argmax(self.lengths))
            raise ValueError(f"max_tokens={max_tokens}, but example {longest} alone has {self.lengths[longest]} tokens")
        if batch_size is None and max_tokens is None:
            batch_size = 32
        if not shuffle:
            return Batches(self, self.cut(range(len(self)), batch_size, max_tokens))
        random = np.random.default_rng([seed, epoch])
        order = random.permutation(len(self)).tolist()
        mean = max(1.0, float(np.mean(self.lengths))) if self.lengths else 1.0
        pool = POOL * (batch_size if batch_size is not None else max(1, int((max_tokens or 0) / mean)))
        groups: list[list[int]] = []
        for start in range(0, len(order), pool):
            by_length = sorted(order[start : start + pool], key=self._sizes.__getitem__)
            groups.extend(self.cut(by_length, batch_size, max_tokens))
        return Batches(self, [groups[i] for i in random.permutation(len(groups))])

    def cut(self, order: Iterable[int], batch_size: int | None, max_tokens: int | None) -> list[list[int]]:
        """Examples in this order, by index, cut into groups as large as the bounds of ``batches`` let them be."""
        groups: list[list[int]] = []
        longest = 0
        for index in order:
            longest = max(longest, self.lengths[index])
            full = not groups or (batch_size is not None and len(groups[-1]) >= batch_size)
            if full or (max_tokens is not None and longest * (len(groups[-1]) + 1) > max_tokens):
                groups.append([])
                longest = self.lengths[index]
            groups[-1].append(index)
        return groups


class Batches(Sequence[Batch]):
    """A sequence of batches of ``data``, collated one by one when asked for; a slice is again Batches."""

    def __init__(self, data: Dataset, indices: Sequence[Sequence[int]]) -> None:
        self.data = data
        self.indices: list[list[int]] = [list(group) for group in indices]
        """Which examples of ``data`` each batch holds, in the order of its rows."""

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Batches: ...
    def __getitem__(self, index: int | slice) -> Batch | Batches:
        if isinstance(index, slice):
            return Batches(self.data, self.indices[index])
        return self.data.collate([self.data.examples[i] for i in self.indices[index]])


def _leaves(example: Example) -> Iterable[tuple[str, Tensor]]:
    for key, value in example.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", tensor) for name, tensor in value.items())
        else:
            yield key, value


def _tokens(example: Example) -> int | None:
    """The number of tokens: of the tags, else of the inputs, else of the text; None where there are pictures or
    numbers."""
    tags, inputs = example.get("tags"), example.get("inputs", example.get("text"))
    if isinstance(tags, Tensor) and tags.ndim:
        return tags.shape[0]
    if isinstance(inputs, Mapping) and "word_index" in inputs:  # subwords: the tokens are the words
        return int(inputs["word_index"].max()) + 1 if len(inputs["word_index"]) else 0
    for tensor in inputs.values() if isinstance(inputs, Mapping) else () if inputs is None else (inputs,):
        if tensor.ndim in (1, 2):
            return tensor.shape[0]
    return None


def _check_words(index: int, example: Example) -> None:
    """Raise where words and tags differ in number: in a batch with a longer example, padding would hide it."""
    tags, inputs = example.get("tags"), example.get("inputs")
    if not isinstance(tags, Tensor) or not tags.ndim:
        return
    named = inputs if isinstance(inputs, Mapping) else {}
    by_word = {f"inputs.{name}": named[name] for name in BY_WORD if name in named}
    if isinstance(inputs, Tensor) and inputs.ndim == 1:
        by_word["inputs"] = inputs
    for name, tensor in by_word.items():
        if tensor.shape[:1] != tags.shape[:1]:
            raise ValueError(f"example {index}: {name} has shape {list(tensor.shape)} for {len(tags)} tags")


def _target_length(example: Example) -> int:
    """The number of tokens of the target, of an example that has a sequence as one."""
    target = example.get("target")
    return target.shape[0] if isinstance(target, Tensor) and target.dim() == 1 else 0


def _length(example: Example) -> int:
    tokens = _tokens(example)
    return 1 if tokens is None else tokens


def _pad(name: str, tensors: Sequence[Tensor]) -> Tensor:
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) == 1:
        return torch.stack(list(tensors))
    if len({len(shape) for shape in shapes}) > 1:
        raise ValueError(
            f"{name} must have the same rank in every example, got the shapes {sorted(map(tuple, shapes))}"
        )
    if len({shape[2:] for shape in shapes}) > 1:
        raise ValueError(f"{name} may differ in its first two axes only, got the shapes {sorted(map(tuple, shapes))}")
    shape = (len(tensors), *(max(sizes) for sizes in zip(*shapes, strict=True)))
    padded = tensors[0].new_full(shape, PADDING.get(name.rpartition(".")[2], 0))
    for row, tensor in zip(padded, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape[:2])] = tensor
    return padded
