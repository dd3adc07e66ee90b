"""How a sequence is drawn or chosen."""

from probllm.decoding.beam import Beam
from probllm.decoding.choices import Greedy, Sample
from probllm.decoding.contrastive import Contrastive
from probllm.decoding.ctc import ctc_beam, ctc_greedy
from probllm.decoding.generate import Generation, generate, stream
from probllm.decoding.reader import Reader, State

__all__ = [
    "Beam",
    "Contrastive",
    "Generation",
    "Greedy",
    "Reader",
    "Sample",
    "State",
    "ctc_beam",
    "ctc_greedy",
    "generate",
    "stream",
]
