"""What each law can do: one table, from which the documentation is written and against which the laws are tested.

A member is ``exact`` (computed by a recursion, to rounding), ``sampled`` (exact draws), or a reason why there is none;
asking then raises ``NotImplementedError`` with that reason.
"""

from __future__ import annotations

from typing import Literal

Capability = Literal["exact", "sampled"] | str

# members in the order of the documentation
MEMBERS = {
    "log_prob": "log probability of a value",
    "score": "unnormalised log probability of a structure",
    "log_partition": "log of the sum over all structures",
    "marginals": "probability of each part",
    "mode": "a structure of the highest score",
    "topk": "the k best structures",
    "sample": "exact samples",
    "log_count": "log of the number of structures allowed",
    "entropy": "entropy",
    "cross_entropy": "cross-entropy and KL divergence to a law over the same structures",
    "expectation": "expectation of additive scores",
    "min_risk": "the structure of the least expected loss",
    "condition": "the law given what is allowed",
    "log_prob_partial": "likelihood of a partial label",
    "sample_joint": "samples of hidden and observed together",
    "posterior": "the law of what is hidden given what is observed",
    "filter": "what is hidden at each step given what was observed until then",
    "mean": "mean (and variance) of a value",
    "rsample": "samples that are differentiable in the parameters",
}

_OVER_STRUCTURES: dict[str, Capability] = {
    name: "sampled" if name == "sample" else "exact" for name in list(MEMBERS)[: list(MEMBERS).index("sample_joint")]
}

_SUMMED_STATES: dict[str, Capability] = {
    "log_prob": "exact",
    "mode": "intractable: every observation sequence sums over all state sequences",
    "sample": "sampled",
    "entropy": "intractable: every observation sequence sums over all state sequences",
    "sample_joint": "sampled",
    "posterior": "exact",
}

_GAUSSIAN: dict[str, Capability] = {
    name: "sampled" if "sample" in name else "exact"
    for name in (
        "log_prob", "mode", "sample", "entropy", "cross_entropy", "sample_joint", "posterior", "filter", "mean",
        "rsample",
    )
}  # fmt: skip

CAPABILITIES: dict[str, dict[str, Capability]] = {
    "LinearChainCRF": _OVER_STRUCTURES,
    "ConstrainedChain": _OVER_STRUCTURES,
    "HigherOrderCRF": _OVER_STRUCTURES,
    "MonotonicAlignment": _OVER_STRUCTURES,
    "PairAlignment": _OVER_STRUCTURES,
    "SemiMarkovCRF": _OVER_STRUCTURES,
    "SpanTree": _OVER_STRUCTURES,
    "GrammarTree": _OVER_STRUCTURES,
    "ProjectiveDependencyTree": _OVER_STRUCTURES,
    "SpanningTree": _OVER_STRUCTURES,
    "HiddenMarkovModel": _SUMMED_STATES,
    "FactorialHiddenMarkovModel": _SUMMED_STATES,
    "HiddenSemiMarkovModel": _SUMMED_STATES,
    "ProbabilisticCFG": {
        name: value.replace("every observation sequence sums over all state sequences", "a string sums over its trees")
        for name, value in _SUMMED_STATES.items()
    },
    "CTCLabels": {
        name: value.replace("every observation sequence sums over all state sequences", "sums over alignments")
        for name, value in _SUMMED_STATES.items()
    },
    "LinearGaussianSSM": _GAUSSIAN,
}


def columns() -> dict[tuple[str, ...], dict[str, Capability]]:
    """The laws that can do the same, together, in the order of the first."""
    alike: list[tuple[list[str], dict[str, Capability]]] = []
    for law, able in CAPABILITIES.items():
        shown = {member: value.split(":")[0] for member, value in able.items()}
        for names, other in alike:
            if shown == other:
                names.append(law)
                break
        else:
            alike.append(([law], shown))
    return {tuple(names): able for names, able in alike}


def table() -> str:
    """The table as Markdown, as it stands in ``docs/laws.md``: laws that can do the same share a column."""
    found = columns()
    heads = ["<br>".join(f"`{name}`" for name in names) for names in found]
    lines = [f"| member | what | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for member, what in MEMBERS.items():
        cells = [able.get(member, "") for able in found.values()]
        lines.append(f"| `{member}` | {what} | {' | '.join(cells)} |")
    return "\n".join(lines)
