"""The laws have what the table of capabilities says, and the documentation shows that table."""

import re
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch

from probllm import distributions
from probllm.distributions.capabilities import CAPABILITIES, MEMBERS, table
from probllm.math.automata import counting

E, A = torch.randn(2, 3, 4), torch.randn(4, 4)
LAWS = {
    "LinearChainCRF": distributions.LinearChainCRF(E, A),
    "ConstrainedChain": distributions.intersect(distributions.LinearChainCRF(E, A), counting(1, 4, at_most=1)),
    "HigherOrderCRF": distributions.HigherOrderCRF(E, torch.randn(4, 4, 4), [torch.zeros(4), A]),
    "MonotonicAlignment": distributions.MonotonicAlignment(E),
    "PairAlignment": distributions.PairAlignment(torch.randn(2, 3, 4, 3)),
    "SemiMarkovCRF": distributions.SemiMarkovCRF(torch.randn(2, 3, 2, 4), A),
    "SpanTree": distributions.SpanTree(torch.randn(2, 3, 3, 4)),
    "GrammarTree": distributions.GrammarTree(torch.randn(2, 3, 3, 4), torch.randn(3, 4, 4), torch.randn(3)),
    "ProjectiveDependencyTree": distributions.ProjectiveDependencyTree(torch.randn(2, 3, 3), torch.randn(3)),
    "SpanningTree": distributions.SpanningTree(torch.randn(2, 3, 3), torch.randn(3)),
    "ProbabilisticCFG": distributions.ProbabilisticCFG(
        torch.randn(3), torch.randn(3, 4, 4), torch.randn(1, 5), max_length=3
    ),
    "HiddenMarkovModel": distributions.HiddenMarkovModel(
        torch.zeros(2, 4), A, dist.Normal(torch.arange(4.0), 1.0), duration=3
    ),
    "FactorialHiddenMarkovModel": distributions.FactorialHiddenMarkovModel(
        torch.zeros(2, 2, 2), torch.zeros(2, 2, 2), dist.Normal(torch.arange(4.0), 1.0), duration=3
    ),
    "HiddenSemiMarkovModel": distributions.HiddenSemiMarkovModel(
        torch.zeros(2, 4), A, torch.zeros(4, 2), dist.Normal(torch.arange(4.0), 1.0), duration=3
    ),
}
LAWS["CTCLabels"] = distributions.CTCLabels(torch.zeros(2, 3, 4))
LAWS["LinearGaussianSSM"] = distributions.LinearGaussianSSM(
    dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.eye(2), dist.Normal(torch.zeros(2), 1.0).to_event(1),
    torch.randn(2, 3), dist.Normal(torch.zeros(3), 1.0).to_event(1), duration=3,
)  # fmt: skip


def ask(law: object, member: str) -> object:
    found = getattr(law, member)
    if not callable(found):
        return found
    value = law.sample()  # type: ignore[attr-defined]
    scores = law.marginals if "marginals" in CAPABILITIES[type(law).__name__] else E  # type: ignore[attr-defined]
    every = torch.ones_like(scores, dtype=torch.bool)
    arguments = {
        "log_prob": (value,), "score": (value,), "posterior": (value,), "filter": (value,), "topk": (2,),
        "cross_entropy": (law,), "expectation": (scores,), "condition": (every,), "log_prob_partial": (every,),
    }  # fmt: skip
    return found(*arguments.get(member, ()))


def test_every_law_of_the_package_is_in_the_table() -> None:
    others = {"StructuredDistribution", "Autoregressive"}  # a base, and a law over sequences that have no structure
    laws = {name for name in distributions.__all__ if name[0].isupper() and name not in others}
    assert laws == set(CAPABILITIES) == set(LAWS)


@pytest.mark.parametrize(("name", "member"), [(name, member) for name in CAPABILITIES for member in MEMBERS])
def test_law_has_the_member_or_says_why_not(name: str, member: str) -> None:
    value, law = CAPABILITIES[name].get(member), LAWS[name]
    if value in ("exact", "sampled"):
        assert ask(law, member) is not None
    else:
        with pytest.raises((NotImplementedError, AttributeError)) as error:
            ask(law, member)
        if value is not None:
            assert error.type is NotImplementedError
            assert value.split(":")[0] in str(error.value)


def test_documentation_shows_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "laws.md").read_text()
    squeeze = re.compile(r"[ -]+")
    assert squeeze.sub(" ", table()) in squeeze.sub(" ", page)
