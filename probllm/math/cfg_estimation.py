"""Expectation maximisation for probabilistic context-free grammars: the inside-outside algorithm.

    E: the expected number of times that each root, rule and word is used, given the sentences: the gradient of the log
       likelihood in its log probability
    M: rows proportional to (expected counts + concentration)

A row is the root's choice, a nonterminal's rules and unary rules together, or a preterminal's words. Each has a
Dirichlet prior whose density is taken in the softmax basis, prod_k theta_k^c, so that its mode is (counts + c) / sum,
and any c >= 0 will do (MacKay 1998). No iteration lowers log likelihood + sum of c log theta. Sources: Baker (1979);
Lari and Young (1990).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probllm.math.cfg import RECURSION, word_scores
from probllm.math.chain import check_lengths
from probllm.math.masks import mask_from_lengths
from probllm.math.recursion import log_partition


class Grammar(NamedTuple):
    """Log probabilities; ``-inf`` forbids. A member each of ``ProbabilisticCFG``'s arguments."""

    root: Tensor  # [N]
    rules: Tensor  # [N, N + P, N + P], [parent, left child, right child]
    terminals: Tensor  # [P, V]
    unary: Tensor  # [N, P], normalised together with the rules


class Counts(NamedTuple):
    """Expected counts in the shapes of a grammar's tables, and the log likelihood that they belong to."""

    log_likelihood: Tensor  # [B] in nats; -inf where a sentence has no tree, which then counts nothing
    root: Tensor
    rules: Tensor
    terminals: Tensor
    unary: Tensor


class Estimate(NamedTuple):
    """What expectation maximisation found."""

    grammar: Grammar
    objective: list[float]  # log likelihood + log prior density before each iteration, and at the end


def random_grammar(
    nonterminals: int, preterminals: int, words: int, unary: bool = False, generator: torch.Generator | None = None
) -> Grammar:
    """Rows drawn uniformly from all distributions, float64. Without ``unary``, sentences have two words at least."""
    n, m = nonterminals, nonterminals + preterminals

    def draws(*shape: int) -> Tensor:
        uniform = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return -torch.log1p(-uniform)

    root, rules, terminals, single = draws(n), draws(n, m, m), draws(preterminals, words), draws(n, preterminals)
    return _normalised(Grammar(root, rules, terminals, single if unary else torch.zeros_like(single)))


def expected_counts(words: Tensor, grammar: Grammar, lengths: Tensor | None = None) -> Counts:
    """Expected counts over a batch of sentences, without gradients.

    Args:
        words: ``[B, T]`` long, from 0 to V - 1; anything on padding.
        grammar: log probabilities, or any log weights.
        lengths: ``[B]``; all T if None.
    Raises:
        TypeError: for words that are not integers.
        ValueError: for shapes that do not agree, and lengths or words out of range.
    """
    if words.is_floating_point() or words.dtype == torch.bool:
        raise TypeError(f"words: expected integers, got {words.dtype}")
    if words.dim() != 2 or words.shape[1] < 1:
        raise ValueError(f"words: expected shape [B, T] with T >= 1, got {list(words.shape)}")
    rows, size = words.shape
    if lengths is None:
        lengths = torch.full((rows,), size, device=words.device)
    check_lengths(lengths, size)
    if lengths.shape != (rows,):
        raise ValueError(f"lengths: expected shape [{rows}], got {list(lengths.shape)}")
    real = mask_from_lengths(lengths, size)
    vocabulary = grammar.terminals.shape[-1]
    if rows and (int(words[real].min()) < 0 or int(words[real].max()) >= vocabulary):
        raise ValueError(f"words: expected values from 0 to {vocabulary - 1}")
    root, rules, terminals, unary = (x.detach().double().requires_grad_() for x in grammar)
    with torch.enable_grad():
        spans = word_scores(terminals, words.long(), real, root.shape[-1])
        tables = (spans, rules.unsqueeze(0), root.unsqueeze(0), unary.unsqueeze(0))
        log_z = log_partition(RECURSION, tables, lengths.long()) if rows else root.new_zeros(0)
        possible = torch.where(log_z > -math.inf, log_z, 0.0).sum()
        if rows == 0:
            return Counts(log_z.detach(), *(torch.zeros_like(x).detach() for x in (root, rules, terminals, unary)))
        found = torch.autograd.grad(possible, (root, rules, terminals, unary))
    return Counts(log_z.detach(), *found)


def estimate(
    sentences: Sequence[Tensor],
    grammar: Grammar,
    concentration: float = 0.0,
    iterations: int = 100,
    tolerance: float = 1e-6,
    max_words: int = 4096,
) -> Estimate:
    """The grammar that expectation maximisation reaches from ``grammar``; what is forbidden stays so.

    Args:
        sentences: words ``[T]`` long each.
        grammar: where to begin, such as ``random_grammar``.
        concentration: c of the prior, at least 0 (maximum likelihood).
        iterations: at most so many.
        tolerance: ends when an iteration gains less than this share of the objective.
        max_words: how many words (padding counted) go through the recursion at once.
    Raises:
        ValueError: for no sentences, one that the grammar cannot derive (by its number from 0), or a number out of
            range.
    """
    if not sentences:
        raise ValueError("sentences: expected at least one")
    if not concentration >= 0:
        raise ValueError(f"concentration: expected at least 0, got {concentration}")
    if iterations < 0:
        raise ValueError(f"iterations: expected at least 0, got {iterations}")
    batches = _batches(sentences, max_words)
    grammar = _normalised(Grammar(*(x.detach().double().exp() for x in grammar)))
    objective: list[float] = []
    for iteration in range(iterations + 1):
        total: list[Tensor] = []
        log_likelihood = 0.0
        for rows, words, lengths in batches:
            counts = expected_counts(words, grammar, lengths)
            bad = (counts.log_likelihood == -math.inf).nonzero()
            if len(bad):
                raise ValueError(f"sentences: the grammar derives no tree for number {rows[int(bad[0])]}")
            log_likelihood += float(counts.log_likelihood.sum())
            total = [a + b for a, b in zip(total, counts[1:], strict=True)] if total else list(counts[1:])
        allowed = [x > -math.inf for x in grammar]
        prior = sum(float(x[a].sum()) for x, a in zip(grammar, allowed, strict=True)) if concentration else 0.0
        objective.append(log_likelihood + concentration * prior)
        done = len(objective) > 1 and objective[-1] - objective[-2] <= tolerance * abs(objective[-2])
        if iteration == iterations or done:
            break
        counts_and_prior = (torch.where(a, x + concentration, 0.0) for x, a in zip(total, allowed, strict=True))
        grammar = _normalised(Grammar(*counts_and_prior), before=grammar)
    return Estimate(grammar, objective)


def _normalised(weights: Grammar, before: Grammar | None = None) -> Grammar:
    """Log probabilities of weights whose rows are divided by their sums; a row of zeros stays as it was before."""
    root, rules, terminals, unary = weights
    both = torch.cat([rules.flatten(-2), unary], -1)
    old = [None] * 3 if before is None else [
        before.root, torch.cat([before.rules.flatten(-2), before.unary], -1), before.terminals
    ]  # fmt: skip
    made = []
    for table, row in zip((root, both, terminals), old, strict=True):
        total = table.sum(-1, keepdim=True)
        log = (table / torch.where(total > 0, total, 1.0)).log()
        made.append(log if row is None else torch.where(total > 0, log, row))
    flat = rules.flatten(-2).shape[-1]
    return Grammar(made[0], made[1][:, :flat].reshape(rules.shape), made[2], made[1][:, flat:])


def _batches(sentences: Sequence[Tensor], max_words: int) -> list[tuple[list[int], Tensor, Tensor]]:
    """Numbers of sentences, their words padded with 0, and lengths; of similar lengths together."""
    groups: list[list[int]] = [[]]
    for row in sorted(range(len(sentences)), key=lambda row: len(sentences[row])):
        if groups[-1] and (len(groups[-1]) + 1) * len(sentences[row]) > max_words:
            groups.append([])
        groups[-1].append(row)
    return [
        (
            rows,
            torch.nn.utils.rnn.pad_sequence([sentences[row] for row in rows], batch_first=True),
            torch.tensor([len(sentences[row]) for row in rows]),
        )
        for rows in groups
    ]
