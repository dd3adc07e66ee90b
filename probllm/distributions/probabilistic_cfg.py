"""The probabilistic context-free grammar: a law over sentences in which the parse tree is summed out exactly.

    p(words) = sum over trees of   root(A)  prod p(A -> X Y)  prod p(A -> p)  prod p(p -> word)        (Baker 1979)

In Chomsky normal form: a nonterminal A becomes two symbols, or (where ``unary`` allows) one preterminal p; a
preterminal becomes one word. Weights need not be normalised: log p is then the log weight of a sentence.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import constraints

from probllm.distributions.grammar_tree import GrammarTree, check_grammar, checked_unary
from probllm.distributions.summed_out import SummedOutDistribution
from probllm.math import cfg, low_rank_cfg, recursion
from probllm.math.chain import check_lengths, is_wrapped
from probllm.math.chain_torch import safe_logsumexp
from probllm.math.masks import mask_from_lengths
from probllm.math.shapes import broadcast_shapes


class ProbabilisticCFG(SummedOutDistribution):
    """Law over sentences ``[T]`` of a grammar with N nonterminals, P preterminals and V words; -1 pads a sentence.

    Args:
        root: ``[..., N]`` log weights of the topmost symbol; ``-inf`` forbids, here and below.
        rules: ``[..., N, N + P, N + P]`` log weights of ``[parent, left child, right child]``; nonterminals are the
            symbols 0 to N - 1, preterminals N to N + P - 1.
        terminals: ``[..., P, V]`` log weights of each preterminal's words.
        unary: ``[..., N, P]`` log weights of a nonterminal that becomes a single preterminal. None forbids them all;
            then sentences have two words at least, and those of one word have log probability ``-inf``.
        max_length: the most words of a sentence that is drawn; ``sample`` needs it.
    Raises:
        TypeError: for weights that are not floating point.
        ValueError: for shapes that do not fit together.
    Source: Baker (1979); Lari and Young (1990).
    """

    _of_what = "a grammar's sentences"
    _because = "every sentence sums over all its trees; posterior(words) has it for the trees"

    def __init__(
        self,
        root: Tensor,
        rules: Tensor,
        terminals: Tensor,
        unary: Tensor | None = None,
        max_length: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check_grammar(root, rules)
        self._rules: Tensor | None = rules
        self._factors: tuple[Tensor, Tensor, Tensor] | None = None
        self._set_up(root, {"rules": (rules, 3)}, rules.shape[-1], terminals, unary, max_length)

    @classmethod
    def low_rank(
        cls,
        root: Tensor,
        head: Tensor,
        left: Tensor,
        right: Tensor,
        terminals: Tensor,
        unary: Tensor | None = None,
        max_length: int | None = None,
    ) -> Self:
        """The grammar with the weights exp(rules[A, X, Y]) = sum_r exp(head[A, r] + left[r, X] + right[r, Y]).

        ``log_prob`` costs O(T^3 R + T^2 (N + P) R) and never holds the rules, so that hundreds of symbols fit; the
        other members write them out. Source: Yang, Zhao and Tu (2021); Yang, Liu and Tu (2022).

        Args:
            head: ``[..., N, R]``, left, right: ``[..., R, N + P]`` log weights. The rest as above.
        """
        n = root.shape[-1] if root.dim() else 0
        ranks = head.shape[-1] if head.dim() else 0
        if root.dim() < 1 or n < 1:
            raise ValueError(f"root: expected shape [..., N], got {list(root.shape)}")
        if head.dim() < 2 or head.shape[-2] != n or ranks < 1:
            raise ValueError(f"head: expected shape [..., {n}, R], got {list(head.shape)}")
        if left.dim() < 2 or left.shape[-2] != ranks or left.shape[-1] <= n:
            raise ValueError(f"left: expected shape [..., {ranks}, {n} + P] with P >= 1, got {list(left.shape)}")
        m = left.shape[-1]
        if right.dim() < 2 or right.shape[-2:] != (ranks, m):
            raise ValueError(f"right: expected shape [..., {ranks}, {m}], got {list(right.shape)}")
        law = cls.__new__(cls)
        law._rules, law._factors = None, (head, left, right)
        factors = {"head": (head, 2), "left": (left, 2), "right": (right, 2)}
        law._set_up(root, factors, m, terminals, unary, max_length)
        return law

    def _set_up(
        self, root: Tensor, rules: dict[str, tuple[Tensor, int]], m: int, terminals: Tensor, unary: Tensor | None,
        max_length: int | None,
    ) -> None:  # fmt: skip
        n = root.shape[-1]
        if terminals.dim() < 2 or terminals.shape[-2] != m - n or terminals.shape[-1] < 1:
            raise ValueError(f"terminals: expected shape [..., {m - n}, V], got {list(terminals.shape)}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length: expected at least 1, got {max_length}")
        self.root, self.terminals, self.max_length = root, terminals, max_length
        self.unary = checked_unary(unary, n, m - n, root)
        tables = {"root": (root, 1), **rules, "terminals": (terminals, 2), "unary": (self.unary, 2)}
        for name, (x, _) in tables.items():
            if not x.is_floating_point():
                raise TypeError(f"{name}: expected floating-point weights, got {x.dtype}")
        batches = {name: x.shape[: x.dim() - dims] for name, (x, dims) in tables.items()}
        try:
            self._own_shape = broadcast_shapes(*batches.values())
        except RuntimeError:
            found = ", ".join(f"{name} {list(shape)}" for name, shape in batches.items())
            raise ValueError(f"batch shapes do not broadcast: {found}") from None
        super().__init__(self._own_shape, torch.Size((max_length or 1,)), validate_args=False)

    @property
    def rules(self) -> Tensor:
        """``[..., N, N + P, N + P]``, written out where the grammar has low rank."""
        if self._rules is not None:
            return self._rules
        assert self._factors is not None
        return cfg.low_rank_rules(*self._factors)

    @property
    def num_nonterminals(self) -> int:
        """N."""
        return int(self.root.shape[-1])

    @property
    def num_words(self) -> int:
        """V."""
        return int(self.terminals.shape[-1])

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.integer_interval(-1, self.num_words - 1), 1)

    def normalised(self) -> Self:
        """The grammar with weights that sum to 1: over roots, over each nonterminal's rules and unary rules together
        (of low rank: its factors), over each preterminal's words. A row without weight stays as it is."""
        root, terminals = _normalised(self.root), _normalised(self.terminals)
        if self._factors is None:
            flat = self.rules.flatten(-2)
            joint, unary = _normalised_together(flat, self.unary)
            rules = joint.unflatten(-1, self.rules.shape[-2:])
            return type(self)(root, rules, terminals, unary, self.max_length)
        head, left, right = self._factors
        head, unary = _normalised_together(head, self.unary)
        return self.low_rank(root, head, _normalised(left), _normalised(right), terminals, unary, self.max_length)

    # ---- sentences that are given

    def _spans(self, words: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores of spans ``[*lead, T, T, N + P]`` and lengths ``[*lead]``; no word at all is a word without weight."""
        if words.is_floating_point() or words.dtype == torch.bool:
            raise TypeError(f"words: expected integers, got {words.dtype}")
        if words.dim() < 1 or words.shape[-1] < 1:
            raise ValueError(f"words: expected shape [..., T] with T >= 1, got {list(words.shape)}")
        size = words.shape[-1]
        if lengths is None:
            real = words >= 0
            lengths = real.sum(-1)
            if not is_wrapped(words) and bool((real != mask_from_lengths(lengths, size)).any()):
                raise ValueError("words: expected -1 behind the last word alone, got it before a word")
        else:
            check_lengths(lengths, size)
            real = mask_from_lengths(lengths, size)
        try:
            lead = broadcast_shapes(words.shape[:-1], lengths.shape, self.batch_shape)
        except RuntimeError:
            raise ValueError(
                f"words: batch shape {list(words.shape[:-1])} and that of lengths, {list(lengths.shape)}, do not "
                f"broadcast with {list(self.batch_shape)}, that of the law"
            ) from None
        words, real = words.expand(*lead, size), real.expand(*lead, size)
        if not is_wrapped(words) and not is_wrapped(real) and bool(real.any()):
            low, high = words[real].aminmax()
            if int(low) < 0 or int(high) >= self.num_words:
                raise ValueError(
                    f"words: expected values from 0 to {self.num_words - 1}, got values from {int(low)} to {int(high)}"
                )
        spans = cfg.word_scores(self.terminals, words.long(), real, self.num_nonterminals)
        return spans, lengths.clamp_min(1).expand(lead)

    def log_prob(self, value: Tensor, lengths: Tensor | None = None) -> Tensor:
        """log p(words) ``[...]``, in nats, summed over all trees; ``-inf`` where there is none.

        Args:
            value: words ``[..., T]`` from 0 to V - 1.
            lengths: ``[...]`` from 1 to T; a sentence ends before its first -1 if None.
        Raises:
            TypeError: for words or lengths that are not integers.
            ValueError: for words or lengths out of range, or batch shapes that do not broadcast.
        """
        if self._factors is None:
            return self.posterior(value, lengths).log_partition
        spans, lengths = self._spans(value, lengths)
        lead = lengths.shape
        rows = math.prod(lead)
        tables = zip((*self._factors, self.root, self.unary), (2, 2, 2, 1, 2), strict=True)
        flat = [_rows(x, dims, lead, rows) for x, dims in tables]
        spans = spans.reshape(rows, *spans.shape[-3:])
        if rows == 0:
            return sum(x.sum() for x in (spans, *flat)).expand(lead)  # type: ignore[union-attr]
        log_z = recursion.log_partition(low_rank_cfg.LOW_RANK, (spans, *flat), lengths.reshape(-1))
        return log_z.reshape(lead).to(spans.dtype)

    def posterior(self, value: Tensor, lengths: Tensor | None = None) -> GrammarTree:
        """p(tree | words), a law over parse trees; its ``log_partition`` is log p(words). Arguments as ``log_prob``."""
        spans, lengths = self._spans(value, lengths)
        return GrammarTree(spans, self.rules, self.root, self.unary, lengths)

    # ---- sentences that are drawn

    def _trees(self, size: int, rules: Tensor, lengths: Tensor | None = None) -> GrammarTree:
        """The law over trees of ``size`` words, whatever the words are."""
        words = safe_logsumexp(self.terminals, -1)  # [.., P]
        leaves = words.unsqueeze(-2).expand(*words.shape[:-1], size, words.shape[-1])
        spans = torch.diag_embed(leaves.transpose(-1, -2)).movedim(-3, -1)
        spans = torch.cat([spans.new_zeros(*spans.shape[:-1], self.num_nonterminals), spans], -1)
        return GrammarTree(spans, rules, self.root, self.unary, lengths)

    def log_weight_of_lengths(self, max_length: int) -> Tensor:
        """Log of the weight of all sentences of 1, 2, ..., ``max_length`` words together, ``[*batch, max_length]``.

        With normalised weights: the log probability of each length.
        """
        if max_length < 1:
            raise ValueError(f"max_length: expected at least 1, got {max_length}")
        lengths = torch.arange(1, max_length + 1, device=self.root.device)
        every = self._trees(max_length, self.rules, lengths.reshape(-1, *(1,) * len(self._own_shape)))
        found = every.log_partition.movedim(0, -1)
        return found.expand(*self.batch_shape, max_length)

    def sample_joint(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Exact samples given that a sentence has at most ``max_length`` words, with their trees.

        The length is drawn by the weight of all sentences of that length, then the tree, then the words: nothing is
        rejected, and weights need not be normalised.

        Returns:
            trees ``[*sample, *batch, T, T]`` as in ``GrammarTree``, words ``[*sample, *batch, T]``, T = ``max_length``;
            trees hold 0 and words -1 behind the last word, both -1 where the grammar derives no such sentence.
        Raises:
            ValueError: if the law has no ``max_length``.
        """
        if self.max_length is None:
            raise ValueError("max_length: a grammar is sampled only when max_length is given")
        shape, size, batch = torch.Size(sample_shape), self.max_length, self.batch_shape
        count = math.prod(shape)
        with torch.no_grad():
            weights = self.log_weight_of_lengths(size).double()
            possible = (weights > -math.inf).any(-1)
            shares = torch.where(possible.unsqueeze(-1), weights, torch.zeros_like(weights)).softmax(-1)
            drawn = torch.multinomial(shares.reshape(-1, size), count, replacement=True) if count else None
            lengths = drawn.t().reshape(count, *batch) + 1 if drawn is not None else shares.new_zeros(0, *batch).long()
            trees = self._draw_trees(torch.where(possible, lengths, 0))
            words = self._draw_words(trees)
            trees = torch.where(possible[..., None, None], trees, -1)
        return trees.reshape(*shape, *batch, size, size), words.reshape(*shape, *batch, size)

    def _draw_trees(self, lengths: Tensor) -> Tensor:
        """Trees ``[count, *batch, T, T]`` with these numbers of words ``[count, *batch]``; none for 0."""
        assert self.max_length is not None
        rules = self.rules
        trees = lengths.new_zeros(*lengths.shape, self.max_length, self.max_length)
        for n in lengths.unique().tolist():
            mine = lengths == n
            if n == 0:
                continue
            rank = (mine.cumsum(0) - 1).clamp_min(0)
            drawn = self._trees(n, rules).expand(self.batch_shape).sample((int(mine.sum(0).max()),))
            mine, rank = mine[..., None, None], rank[..., None, None].expand(*rank.shape, n, n)
            trees[..., :n, :n] = torch.where(mine, drawn.gather(0, rank), trees[..., :n, :n])
        return trees

    def _draw_words(self, trees: Tensor) -> Tensor:
        """Words ``[count, *batch, T]`` for the leaves of the trees, -1 where there is no leaf."""
        p, size = self.terminals.shape[-2], trees.shape[-1]
        label = trees.diagonal(dim1=-2, dim2=-1) - 1  # [count, *batch, T]
        m = self.num_nonterminals + p
        preterminal = torch.where(label < m, label - self.num_nonterminals, (label - m) % p)
        at = torch.where(label < 0, -1, preterminal).movedim(0, -1).reshape(math.prod(self.batch_shape), -1)
        words = torch.full_like(at, -1)
        table = self.terminals.double().expand(*self.batch_shape, p, self.num_words)
        for row, terminals in enumerate(table.reshape(-1, p, self.num_words)):
            for k in at[row].unique().tolist():
                if k >= 0:
                    mine = at[row] == k
                    probabilities = terminals[k].softmax(-1)
                    words[row, mine] = torch.multinomial(probabilities, int(mine.sum()), replacement=True)
        return words.reshape(*self.batch_shape, size, trees.shape[0]).movedim(-1, 0)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Words ``[*sample, *batch, max_length]``, -1 behind the last; see ``sample_joint``."""
        return self.sample_joint(sample_shape)[1]


def _rows(x: Tensor, dims: int, lead: torch.Size, rows: int) -> Tensor:
    """A table as ``[1, ...]`` where all rows of the batch share it, else ``[rows, ...]``."""
    event = x.shape[x.dim() - dims :]
    if math.prod(x.shape[: x.dim() - dims]) == 1:
        return x.reshape(1, *event)
    return x.expand(*lead, *event).reshape(rows, *event)


def _normalised(weights: Tensor) -> Tensor:
    """Log weights whose last dimension sums to 1 in probability; as it is where it has no weight."""
    total = safe_logsumexp(weights, -1).unsqueeze(-1)
    return weights - torch.where(total == -math.inf, torch.zeros_like(total), total)


def _normalised_together(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two tables ``[..., N, .]`` whose rows sum to 1 together."""
    lead = broadcast_shapes(first.shape[:-1], second.shape[:-1])
    joint = _normalised(torch.cat([first.expand(*lead, -1), second.expand(*lead, -1)], -1))
    return joint[..., : first.shape[-1]], joint[..., first.shape[-1] :]
