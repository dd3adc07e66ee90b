"""Deterministic finite automata over tags: which tag sequences are allowed, as rules, counts or a pattern.

    accepted(x) = [ the state after delta(... delta(delta(start, x_1), x_2) ..., x_n) is an accepting one ]

A pattern (regular expression) becomes an automaton with empty moves (Thompson 1968) and then, by the sets of its states
that a prefix can reach, a deterministic one (Rabin and Scott 1959); states that behave alike are merged (Moore 1956).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")


class Automaton(NamedTuple):
    """A deterministic automaton over tags 0 to K - 1. It starts in state 0; delta is -1 where no tag may follow."""

    delta: Tensor  # [Q, K] long, the state after a tag
    accepting: Tensor  # [Q] bool, states in which a sequence may end

    @property
    def num_tags(self) -> int:
        """K."""
        return self.delta.shape[1]

    def accepts(self, tags: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Whether tag sequences ``[..., T]`` are accepted, bool ``[...]``; they end after ``lengths`` tags."""
        n = torch.tensor(tags.shape[-1]) if lengths is None else lengths
        dead = len(self.accepting)
        delta = torch.cat(
            [torch.where(self.delta < 0, dead, self.delta), self.delta.new_full((1, self.num_tags), dead)]
        )
        delta = delta.to(tags.device)
        state = tags.new_zeros(torch.broadcast_shapes(tags.shape[:-1], n.shape), dtype=torch.long)
        for t, tag in enumerate(tags.long().unbind(-1)):
            state = torch.where(t < n.to(tags.device), delta[state, tag.expand(state.shape)], state)
        return torch.cat([self.accepting, self.accepting.new_zeros(1)]).to(tags.device)[state]

    def both(self, other: Automaton) -> Automaton:
        """The automaton that accepts what this one and the other accept."""
        if other.num_tags != self.num_tags:
            raise ValueError(f"other: expected an automaton over {self.num_tags} tags, got {other.num_tags}")
        mine, theirs = self.delta.tolist(), other.delta.tolist()
        ends, other_ends = self.accepting.tolist(), other.accepting.tolist()

        def follow(pair: tuple[int, int], tag: int) -> tuple[int, int] | None:
            after = mine[pair[0]][tag], theirs[pair[1]][tag]
            return None if min(after) < 0 else after

        return _explore((0, 0), self.num_tags, follow, lambda pair: ends[pair[0]] and other_ends[pair[1]])


def from_rules(transitions: Tensor, start: Tensor | None = None, end: Tensor | None = None) -> Automaton:
    """What may follow what, as ``data.bio_rules`` gives it: bool ``[K, K]`` (from, to), ``[K]`` and ``[K]``.

    Returns:
        An automaton whose state is the last tag, and which accepts no empty sequence.
    """
    k = transitions.shape[-1]
    for name, mask, shape in (("transitions", transitions, (k, k)), ("start", start, (k,)), ("end", end, (k,))):
        if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
            raise ValueError(f"{name}: expected bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    first = torch.ones(k, dtype=torch.bool) if start is None else start.cpu()
    last = torch.ones(k, dtype=torch.bool) if end is None else end.cpu()
    allowed, ends = torch.cat([first[None], transitions.cpu()]).tolist(), [False, *last.tolist()]
    return _explore(0, k, lambda state, tag: tag + 1 if allowed[state][tag] else None, lambda state: ends[state])


def counting(tag: int, num_tags: int, at_least: int = 0, at_most: int | None = None) -> Automaton:
    """Sequences that hold a tag no fewer than ``at_least`` and no more than ``at_most`` times (None: no bound)."""
    if not 0 <= tag < num_tags:
        raise ValueError(f"tag: expected from 0 to {num_tags - 1}, got {tag}")
    if at_least < 0 or (at_most is not None and at_most < at_least):
        raise ValueError(f"at_least, at_most: expected 0 <= at_least <= at_most, got {at_least} and {at_most}")
    greatest = at_least if at_most is None else at_most + 1  # counts beyond are alike

    def follow(count: int, seen: int) -> int | None:
        after = min(count + (seen == tag), greatest)
        return None if at_most is not None and after > at_most else after

    return _explore(0, num_tags, follow, lambda count: count >= at_least)


def from_pattern(pattern: str, tag_names: Sequence[str]) -> Automaton:
    """The automaton of a regular expression over tag names, which must match whole sequences.

    Args:
        pattern: tag names with spaces between them; ``.`` is any tag, ``|`` or, ``*`` any number, ``+`` one or more,
            ``?`` none or one, ``( )`` a group. A backslash makes the next character part of a name, as in ``PRP\\$`` or
            ``\\.``. ``"DET ADJ* NOUN (. )*"`` is every sequence that begins with a noun phrase.
    Raises:
        ValueError: for a name that is no tag, or a pattern that is no expression; tells where.
    """
    number = {name: index for index, name in enumerate(tag_names)}
    parser = _Parser(pattern, number)
    start, end = parser.whole()
    moves, empty = parser.moves, parser.empty

    def closure(states: frozenset[int]) -> frozenset[int]:
        found, waiting = set(states), list(states)
        while waiting:
            for after in empty[waiting.pop()]:
                if after not in found:
                    found.add(after)
                    waiting.append(after)
        return frozenset(found)

    def follow(states: frozenset[int], tag: int) -> frozenset[int] | None:
        after = frozenset(to for state in states for tags, to in moves[state] if tag in tags)
        return closure(after) if after else None

    return _explore(closure(frozenset([start])), len(tag_names), follow, lambda states: end in states)


class _Parser:
    """A pattern read by recursive descent; each expression becomes moves between a first and a last state."""

    def __init__(self, pattern: str, number: dict[str, int]) -> None:
        self.pattern, self.number, self.at = pattern, number, 0
        self.moves: list[list[tuple[frozenset[int], int]]] = []  # by state: tags and the state they lead to
        self.empty: list[list[int]] = []
        self.tokens = self._tokens()

    def _tokens(self) -> list[tuple[str, str, int]]:
        """(kind, name, position): kind is the special character itself, ``name``, or empty at the end."""
        found, name, begun, i = [], "", 0, 0
        text = self.pattern
        while i <= len(text):
            c = text[i] if i < len(text) else " "
            escaped = c == "\\" and i + 1 < len(text)
            if escaped or not (c.isspace() or c in ".|*+?()"):
                begun = begun if name else i
                name += text[i + 1] if escaped else c
            else:
                if name:
                    found.append(("name", name, begun))
                    name = ""
                if not c.isspace():
                    found.append((c, c, i))
            i += 2 if escaped else 1
        return [*found, ("", "", len(text))]

    def _fail(self, message: str) -> ValueError:
        return ValueError(f"pattern: {message} at character {self.tokens[self.at][2]} of {self.pattern!r}")

    def _state(self) -> int:
        self.moves.append([])
        self.empty.append([])
        return len(self.moves) - 1

    def whole(self) -> tuple[int, int]:
        ends = self._either()
        if self.tokens[self.at][0]:
            raise self._fail(f"unexpected {self.tokens[self.at][1]!r}")
        return ends

    def _either(self) -> tuple[int, int]:
        first, last = self._sequence()
        while self.tokens[self.at][0] == "|":
            self.at += 1
            other_first, other_last = self._sequence()
            both, end = self._state(), self._state()
            self.empty[both] += [first, other_first]
            self.empty[last].append(end)
            self.empty[other_last].append(end)
            first, last = both, end
        return first, last

    def _sequence(self) -> tuple[int, int]:
        first = last = self._state()
        while self.tokens[self.at][0] not in ("", "|", ")"):
            begin, end = self._repeated()
            self.empty[last].append(begin)
            last = end
        return first, last

    def _repeated(self) -> tuple[int, int]:
        first, last = self._one()
        while (mark := self.tokens[self.at][0]) in ("*", "+", "?") and mark:
            self.at += 1
            begin, end = self._state(), self._state()
            self.empty[begin].append(first)
            self.empty[last].append(end)
            if mark != "?":
                self.empty[last].append(first)
            if mark != "+":
                self.empty[begin].append(end)
            first, last = begin, end
        return first, last

    def _one(self) -> tuple[int, int]:
        kind, name, _ = self.tokens[self.at]
        if kind == "(":
            self.at += 1
            ends = self._either()
            if self.tokens[self.at][0] != ")":
                raise self._fail("expected ')'")
            self.at += 1
            return ends
        if kind == "name" and name not in self.number:
            raise self._fail(f"{name!r} is no tag")
        if kind not in ("name", "."):
            raise self._fail(f"expected a tag, '.' or '(', got {name!r}")
        self.at += 1
        tags = frozenset(self.number.values()) if kind == "." else frozenset([self.number[name]])
        first, last = self._state(), self._state()
        self.moves[first].append((tags, last))
        return first, last


def _explore(
    start: State, num_tags: int, follow: Callable[[State, int], State | None], ends: Callable[[State], bool]
) -> Automaton:
    """The smallest automaton with the behaviour of the states that can be reached from ``start``."""
    number, states, rows = {start: 0}, [start], []
    for state in states:  # grows as it goes
        row = []
        for tag in range(num_tags):
            after = follow(state, tag)
            if after is not None and after not in number:
                number[after] = len(states)
                states.append(after)
            row.append(-1 if after is None else number[after])
        rows.append(row)
    return _smallest(rows, [bool(ends(state)) for state in states])


def _smallest(delta: list[list[int]], accepting: list[bool]) -> Automaton:
    """Merges states that accept the same continuations (Moore's partition refinement); what accepts none is -1."""
    dead = len(delta)
    delta = [[dead if to < 0 else to for to in row] for row in delta] + [[dead] * len(delta[0])]
    block = [int(x) for x in [*accepting, False]]
    while True:
        keys = [(block[q], *(block[to] for to in row)) for q, row in enumerate(delta)]
        number: dict[tuple[int, ...], int] = {}
        refined = [number.setdefault(key, len(number)) for key in keys]
        if len(number) == len(set(block)):
            break
        block = refined
    # blocks in the order of their first states, so that the start is 0; the dead one is left out unless all are dead
    order: dict[int, int] = {}
    for q in range(dead):
        if refined[q] != refined[dead] or q == 0:
            order.setdefault(refined[q], len(order))
    first = {refined[q]: q for q in range(dead, -1, -1)}
    rows = [[order[refined[to]] if refined[to] != refined[dead] else -1 for to in delta[first[b]]] for b in order]
    return Automaton(torch.tensor(rows), torch.tensor([[*accepting, False][first[b]] for b in order]))
