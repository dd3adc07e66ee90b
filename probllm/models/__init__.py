"""Models: an encoder, potentials and a law, as a Pyro program with the same verbs everywhere; one file a model."""

from probllm.models.adaptive_ngram import AdaptiveNGram
from probllm.models.causal_lm import CausalLM
from probllm.models.crf_tagger import CRFTagger
from probllm.models.ctc_transducer import CTCTransducer
from probllm.models.dependency_parser import DependencyParser
from probllm.models.dynamic_lm import DynamicLM
from probllm.models.gaussian_emissions import GaussianEmissions, MixtureEmissions
from probllm.models.head_selection_parser import HeadSelectionParser
from probllm.models.hmm import HMM
from probllm.models.hmm_emissions import CategoricalEmissions, Emissions, PoissonEmissions
from probllm.models.hmm_tagger import HMMTagger
from probllm.models.hsmm import HSMM
from probllm.models.joint_ngram import JointNGram
from probllm.models.language_model import LanguageModel
from probllm.models.masked_lm import MaskedLM
from probllm.models.mixture_lm import MixtureLM
from probllm.models.model import Model
from probllm.models.ngram_model import NGramModel
from probllm.models.semi_markov_tagger import SemiMarkovTagger
from probllm.models.seq2seq import Seq2Seq
from probllm.models.softmax_tagger import SoftmaxTagger

__all__ = [
    "HMM",
    "HSMM",
    "AdaptiveNGram",
    "CRFTagger",
    "CTCTransducer",
    "CategoricalEmissions",
    "CausalLM",
    "DependencyParser",
    "DynamicLM",
    "Emissions",
    "GaussianEmissions",
    "HMMTagger",
    "HeadSelectionParser",
    "JointNGram",
    "LanguageModel",
    "MaskedLM",
    "MixtureEmissions",
    "MixtureLM",
    "Model",
    "NGramModel",
    "PoissonEmissions",
    "SemiMarkovTagger",
    "Seq2Seq",
    "SoftmaxTagger",
]
