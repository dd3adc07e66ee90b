"""How a sequence is drawn or chosen."""

from probllm.decoding.ctc import ctc_beam, ctc_greedy

__all__ = ["ctc_beam", "ctc_greedy"]
