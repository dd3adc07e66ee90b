"""Words as vectors: by their id, by their characters, by hashed features, or by all of these side by side.

Each is an encoder (``nn.encoder``) whose output at a position depends on that position's ids alone. Given a dict, each
picks its own key: ``words`` ``[B, L]``, ``characters`` ``[B, L, C]``, ``features`` ``[B, L, F]``, ``vectors``
``[B, L, D]``. Id 0 is padding among characters and features; among words padding is what the mask says.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probllm.nn.dropout import Dropout
from probllm.nn.encoder import (
    Encoder,
    Inputs,
    check_dropout,
    check_ids,
    check_mask,
    check_positive,
    check_states,
    in_transform,
    pick,
    zero_padding,
)


class WordEmbedding(Encoder):
    """One learned vector for each id.

    Args:
        vocabulary_size: number of ids, those of padding and of the unknown word included.
        dim: size of a vector; entries start as N(0, 1/dim).
        word_dropout: in training, the probability that a word is replaced by the unknown word, which so learns.
        unknown: id of the unknown word.
        key: entry of a dict of inputs to read.
    """

    def __init__(
        self, vocabulary_size: int, dim: int, word_dropout: float = 0.0, unknown: int = 1, key: str = "words"
    ) -> None:
        super().__init__()
        check_positive(vocabulary_size=vocabulary_size, dim=dim)
        check_dropout("word_dropout", word_dropout)
        if not 0 <= unknown < vocabulary_size:
            raise ValueError(f"unknown is {unknown}; expected an id from 0 to {vocabulary_size - 1}")
        self.vocabulary_size, self.dim, self.key = vocabulary_size, dim, key
        self.word_dropout, self.unknown = word_dropout, unknown
        self.weight = nn.Parameter(torch.randn(vocabulary_size, dim) / dim**0.5)

    def forward(self, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
        """``[B, L, dim]`` from ids ``[B, L]`` in ``0..vocabulary_size-1``."""
        words = pick(inputs, self.key)
        check_ids(self.key, words, self.vocabulary_size, rank=2)
        check_mask(mask, words.shape)
        if self.training and self.word_dropout > 0:
            dropped = torch.rand(words.shape, device=words.device) < self.word_dropout
            words = words.masked_fill(dropped, self.unknown)
        return zero_padding(F.embedding(words, self.weight), mask)


class TypedWordEmbedding(WordEmbedding):
    """A vector for each id plus one for the type of its token: which of two sentences it is of, in BERT's inputs.

    The types are the entry ``types`` ``[B, L]`` of a dict of inputs; without one, all are of type 0.

    Args:
        vocabulary_size, dim: as in ``WordEmbedding``.
        types: number of types.
        key: entry of a dict of inputs to read the ids from.
    Source: Devlin et al. (2019), section 3.
    """

    def __init__(self, vocabulary_size: int, dim: int, types: int = 2, key: str = "words") -> None:
        super().__init__(vocabulary_size, dim, unknown=min(1, vocabulary_size - 1), key=key)
        check_positive(types=types)
        self.types = types
        self.type_weight = nn.Parameter(torch.randn(types, dim) / dim**0.5)

    def forward(self, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
        """``[B, L, dim]`` from ids ``[B, L]``, or a dict of ids and types."""
        vectors = super().forward(inputs, mask)
        if isinstance(inputs, Tensor) or "types" not in inputs:
            return zero_padding(vectors + self.type_weight[0], mask)
        types = inputs["types"]
        check_ids("types", types, self.types, rank=2)
        if types.shape != vectors.shape[:2]:
            raise ValueError(f"types has shape {list(types.shape)}; expected {list(vectors.shape[:2])}")
        return zero_padding(vectors + F.embedding(types, self.type_weight), mask)


class CharacterCNN(Encoder):
    """A vector of a word from its characters: convolutions of several widths, then the maximum over the word.

    ``y_f = max_i relu(w_f · [c_{i-h}, …, c_{i+h}] + b_f)`` with zeros around the word. Every distinct word of the
    batch is computed once. A word without characters gives 0.

    Args:
        num_characters: number of character ids, 0 (padding) included.
        character_dim: size of a character's vector.
        filters: number of filters of each width; ``dim = filters * len(widths)``.
        widths: widths of the convolutions, in characters.
        key: entry of a dict of inputs to read.
    Source: Ma and Hovy (2016), section 2.1; dos Santos and Zadrozny (2014).
    """

    def __init__(
        self,
        num_characters: int,
        character_dim: int = 32,
        filters: int = 64,
        widths: Sequence[int] = (3,),
        key: str = "characters",
    ) -> None:
        super().__init__()
        check_positive(num_characters=num_characters, character_dim=character_dim, filters=filters)
        for width in widths:
            check_positive(widths=width)
        self.num_characters, self.key = num_characters, key
        self.dim = filters * len(widths)
        self.embedding = nn.Parameter(torch.randn(num_characters, character_dim) / character_dim**0.5)
        self.convolutions = nn.ModuleList(nn.Conv1d(character_dim, filters, width) for width in widths)

    def forward(self, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
        """``[B, L, dim]`` from character ids ``[B, L, C]``, each word padded with 0."""
        characters = pick(inputs, self.key)
        check_ids(self.key, characters, self.num_characters, rank=3)
        check_mask(mask, characters.shape[:2])
        words = characters.flatten(0, 1)  # [N, C]
        if not words.shape[1]:
            return self.embedding.new_zeros(*characters.shape[:2], self.dim)
        if mask is not None:
            words = words.masked_fill(~mask.reshape(-1, 1), 0)
        if in_transform(words) or torch.compiler.is_compiling():
            states = self.compose(words)
        else:
            distinct, which = distinct_rows(words)
            states = self.compose(distinct)[which]
        return states.view(*characters.shape[:2], self.dim)

    def compose(self, words: Tensor) -> Tensor:
        """``[N, dim]`` from the character ids ``[N, C]`` of N words."""
        real = words != 0
        embedded = F.embedding(words, self.embedding).masked_fill(~real.unsqueeze(-1), 0.0).transpose(1, 2)
        maxima = []
        for convolution in self.convolutions:
            assert isinstance(convolution, nn.Conv1d)
            width = convolution.kernel_size[0]
            scores = F.relu(convolution(F.pad(embedded, ((width - 1) // 2, width // 2))))  # [N, filters, C]
            # After the relu a 0 at padding is below every maximum that a real character could give.
            maxima.append(scores.masked_fill(~real.unsqueeze(1), 0.0).amax(-1))
        return torch.cat(maxima, -1)


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of an integer matrix, and for each row which of them it is.

    Rows are compared by a weighted 64-bit sum, thirty times as fast as ``torch.unique(dim=0)``; the answer is checked.
    """
    sums, which = torch.unique((rows * _scattered(rows.shape[1], rows.device)).sum(-1), return_inverse=True)
    # Where several rows write, any one of them may win: they are equal.
    first = which.new_zeros(len(sums)).scatter_(0, which, torch.arange(len(rows), device=rows.device))
    distinct = rows[first]
    if not torch.equal(distinct[which], rows):
        distinct, which = torch.unique(rows, dim=0, return_inverse=True)
    return distinct, which


def _scattered(count: int, device: torch.device) -> Tensor:
    """That many numbers without a pattern: SplitMix64 (Steele, Lea and Flood, 2014), in wrapping arithmetic."""
    x = torch.arange(1, count + 1, device=device) * -0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    return x ^ (x >> 27)


class FeatureEmbedding(Encoder):
    """The sum of the vectors of a word's features: what a linear model with sparse indicator features computes.

    Args:
        num_features: size of the table; ids run from 1 to ``num_features - 1``, and 0 is no feature.
        dim: size of a vector; with ``dim`` = number of tags the output can serve as a CRF's emissions.
        sparse: give sparse gradients, for ``torch.optim.SparseAdam`` or ``Adagrad``: an update then costs what the
            batch's features cost, not the table. It pays from about ten million numbers in the table.
        key: entry of a dict of inputs to read.
    """

    def __init__(self, num_features: int, dim: int, sparse: bool = False, key: str = "features") -> None:
        super().__init__()
        check_positive(num_features=num_features, dim=dim)
        self.num_features, self.dim, self.sparse, self.key = num_features, dim, sparse, key
        # Small, since a word sums some dozens of them; not 0, where a layer above would have no gradient to give.
        self.weight = nn.Parameter(0.01 * torch.randn(num_features, dim))

    def forward(self, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
        """``[B, L, dim]`` from feature ids ``[B, L, F]``."""
        features = pick(inputs, self.key)
        check_ids(self.key, features, self.num_features, rank=3)
        check_mask(mask, features.shape[:2])
        present = features != 0
        if mask is not None:
            present = present & mask.unsqueeze(-1)
        # Not embedding_bag: with a padding index it is three times as slow on the CPU, forward and backward.
        if self.sparse:
            vectors = F.embedding(features, self.weight, padding_idx=0, sparse=True)
        else:
            vectors = self.weight.index_select(0, features.flatten()).view(*features.shape, self.dim)
        return (present.to(vectors.dtype).unsqueeze(-2) @ vectors).squeeze(-2)


class VectorInputs(Encoder):
    """Vectors computed elsewhere, ``[B, L, dim]``, as the embedding of any encoder.

    Args:
        dim: size of a vector.
        key: entry of a dict of inputs to read.
    """

    def __init__(self, dim: int, key: str = "vectors") -> None:
        super().__init__()
        check_positive(dim=dim)
        self.dim, self.key = dim, key

    def forward(self, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
        """The vectors themselves, 0 at padded positions."""
        vectors = pick(inputs, self.key)
        check_states(self.key, vectors, self.dim)
        check_mask(mask, vectors.shape[:2])
        return zero_padding(vectors, mask)


class WordRepresentation(Encoder):
    """Several encoders of the same words side by side: one vector a word, their outputs concatenated.

    ``WordRepresentation([WordEmbedding(20000, 100, word_dropout=0.05), CharacterCNN(120)])``

    Args:
        parts: encoders that read the same dict of inputs; ``dim`` is the sum of theirs.
        dropout: probability of dropping a unit of the result.
    """

    def __init__(self, parts: Sequence[Encoder], dropout: float = 0.0) -> None:
        super().__init__()
        if not parts:
            raise ValueError("parts is empty; expected at least one encoder")
        for i, part in enumerate(parts):
            if not isinstance(part, Encoder):
                raise TypeError(f"parts[{i}] is a {type(part).__name__}; expected a probllm.nn.Encoder")
        check_dropout("dropout", dropout)
        self.parts = nn.ModuleList(parts)
        self.dim = sum(part.dim for part in parts)
        self.dropout = Dropout(dropout)

    def forward(self, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
        """``[B, L, dim]`` from the dict of ids that the parts read."""
        states: Tensor = self.dropout(torch.cat([part(inputs, mask) for part in self.parts], -1))
        return states


def as_embedding(embedding: Encoder | int, dim: int) -> Encoder:
    """The encoder given, or for a vocabulary size a fresh ``WordEmbedding`` of that many words and ``dim``."""
    if isinstance(embedding, Encoder):
        return embedding
    if isinstance(embedding, bool) or not isinstance(embedding, int):
        raise TypeError(
            f"embedding is a {type(embedding).__name__}; expected a probllm.nn.Encoder, such as a WordEmbedding, "
            "or a vocabulary size"
        )
    return WordEmbedding(embedding, dim, unknown=min(1, embedding - 1))
