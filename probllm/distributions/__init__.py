"""Pyro distributions whose sample is a structure, or that have summed one out."""

from probllm.distributions.autoregressive import Autoregressive
from probllm.distributions.constrained_chain import ConstrainedChain, intersect
from probllm.distributions.ctc_labels import CTCLabels
from probllm.distributions.factorial_hidden_markov_model import FactorialHiddenMarkovModel
from probllm.distributions.grammar_tree import GrammarTree
from probllm.distributions.hidden_markov_model import HiddenMarkovModel
from probllm.distributions.hidden_semi_markov_model import HiddenSemiMarkovModel
from probllm.distributions.higher_order_crf import HigherOrderCRF
from probllm.distributions.linear_chain_crf import LinearChainCRF
from probllm.distributions.linear_gaussian_ssm import LinearGaussianSSM
from probllm.distributions.monotonic_alignment import MonotonicAlignment
from probllm.distributions.pair_alignment import PairAlignment
from probllm.distributions.probabilistic_cfg import ProbabilisticCFG
from probllm.distributions.projective_dependency_tree import ProjectiveDependencyTree
from probllm.distributions.semi_markov_crf import SemiMarkovCRF
from probllm.distributions.span_tree import SpanTree
from probllm.distributions.spanning_tree import SpanningTree
from probllm.distributions.structure import StructuredDistribution

__all__ = [
    "Autoregressive",
    "CTCLabels",
    "ConstrainedChain",
    "FactorialHiddenMarkovModel",
    "GrammarTree",
    "HiddenMarkovModel",
    "HiddenSemiMarkovModel",
    "HigherOrderCRF",
    "LinearChainCRF",
    "LinearGaussianSSM",
    "MonotonicAlignment",
    "PairAlignment",
    "ProbabilisticCFG",
    "ProjectiveDependencyTree",
    "SemiMarkovCRF",
    "SpanTree",
    "SpanningTree",
    "StructuredDistribution",
    "intersect",
]
