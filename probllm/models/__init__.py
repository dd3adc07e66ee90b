"""Models: an encoder, potentials and a law, as a Pyro program with the same verbs everywhere; one file a model."""

from probllm.models.crf_tagger import CRFTagger
from probllm.models.hmm_tagger import HMMTagger
from probllm.models.model import Model
from probllm.models.softmax_tagger import SoftmaxTagger

__all__ = ["CRFTagger", "HMMTagger", "Model", "SoftmaxTagger"]
