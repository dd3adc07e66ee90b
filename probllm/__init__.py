"""probllm: exact structured probability and generative models on shared neural encoders, as Pyro models.

What a research script imports: ``fit``, ``compare`` and the models. The rest stands in its room, such as
``probllm.distributions`` and ``probllm.nn``. Names are imported when they are first used, so that ``import probllm``
and the command line's help cost nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probllm.app.comparison import compare
    from probllm.models import (
        HMM,
        HSMM,
        AdaptiveNGram,
        CausalLM,
        CRFTagger,
        CTCTransducer,
        DependencyParser,
        DynamicLM,
        HeadSelectionParser,
        HMMTagger,
        JointNGram,
        MaskedLM,
        MixtureLM,
        NGramModel,
        SemiMarkovTagger,
        Seq2Seq,
        SoftmaxTagger,
    )
    from probllm.training import fit

__version__ = "0.1.0"

__all__ = [
    "HMM",
    "HSMM",
    "AdaptiveNGram",
    "CRFTagger",
    "CTCTransducer",
    "CausalLM",
    "DependencyParser",
    "DynamicLM",
    "HMMTagger",
    "HeadSelectionParser",
    "JointNGram",
    "MaskedLM",
    "MixtureLM",
    "NGramModel",
    "SemiMarkovTagger",
    "Seq2Seq",
    "SoftmaxTagger",
    "__version__",
    "compare",
    "fit",
]

_MODELS = [name for name in __all__ if name[0].isupper()]
_HOMES = dict.fromkeys(_MODELS, "probllm.models") | {"compare": "probllm.app.comparison", "fit": "probllm.training"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'probllm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
