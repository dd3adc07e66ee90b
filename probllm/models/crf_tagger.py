"""Linear-chain CRF taggers: one law over whole tag sequences, on any encoder or straight on indicator features.

    p(y | x) = exp(start[y_1] + sum_t emissions(x)[t, y_t] + sum_t transitions[y_{t-1}, y_t] + end[y_T]) / Z(x)

Lafferty, McCallum and Pereira (2001), "Conditional random fields"; on a BiLSTM, Huang, Xu and Yu (2015), with
characters Ma and Hovy (2016).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from probllm.distributions import LinearChainCRF
from probllm.models.model import Batch
from probllm.models.tagger import Tagger, state_size
from probllm.nn.encoder import Encoder
from probllm.nn.potentials import ChainPotentials

RULES = ("transitions", "start", "end")


class CRFTagger(Tagger):
    """A CRF given the words; the batch, the program and the verbs are those of ``Tagger``.

    ``CRFTagger(RecurrentEncoder(...), 17)``; the feature CRF is ``CRFTagger(None, 17, FeatureEmbedding(2**18, 17))``.

    Args:
        encoder: the network whose states a linear layer scores, or None.
        num_tags: K.
        scores: an encoder of ``dim`` K, whose states are added to the emissions as they are, or None.
        transitions: one learned table (``"shared"``), or one more at each step, linear in the encoder's state there
            (``"input"``).
        rules: which tags may follow each other, begin and end a sequence, as ``bio_rules`` says: True = allowed,
            ``transitions`` ``[K, K]``, ``start`` ``[K]``, ``end`` ``[K]``, each optional. A sequence that breaks them
            has probability 0, in training too.
    Raises:
        TypeError: if the encoder is no module with ``dim``, or the rules are not bool.
        ValueError: if there is neither an encoder nor scores, ``scores.dim`` is not ``num_tags``, or the rules have
            another shape.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        num_tags: int,
        scores: Encoder | None = None,
        transitions: Literal["shared", "input"] = "shared",
        rules: Mapping[str, Tensor | Sequence[bool] | Sequence[Sequence[bool]]] | None = None,
    ) -> None:
        if transitions not in ("shared", "input"):
            raise ValueError(f"transitions is {transitions!r}, expected 'shared' or 'input'")
        if transitions == "input" and encoder is None:
            raise ValueError("transitions is 'input', but there is no encoder to score them")
        potentials = ChainPotentials(state_size(encoder, num_tags), num_tags, transitions, project=encoder is not None)
        super().__init__(encoder, num_tags, scores, potentials)
        given = {name: torch.as_tensor(rule) for name, rule in (rules or {}).items()}
        for name, rule in given.items():
            if name not in RULES:
                raise ValueError(f"rules has the key {name!r}, expected some of {', '.join(RULES)}")
            if rule.dtype != torch.bool:  # scores of 0 and -inf would say the contrary of what they mean
                raise TypeError(f"rules[{name!r}] has dtype {rule.dtype}, expected torch.bool, True = allowed")
            shape = [num_tags] * (2 if name == "transitions" else 1)
            if list(rule.shape) != shape:
                raise ValueError(f"rules[{name!r}] has shape {list(rule.shape)}, expected {shape}")
        for name in RULES:  # not in the state: the config has them
            self.register_buffer(f"{name}_rule", given.get(name), persistent=False)
        self.has_rules = bool(given)
        if "rules" in self.config_arguments:
            self.config_arguments["rules"] = {name: rule.tolist() for name, rule in given.items()} or None

    def law(self, batch: Batch) -> LinearChainCRF:
        """The exact law of the tags given the words and the rules, of batch shape ``[B]``."""
        law = super().law(batch)
        if not self.has_rules:
            return law
        return law.condition(**{name: getattr(self, f"{name}_rule") for name in RULES})
