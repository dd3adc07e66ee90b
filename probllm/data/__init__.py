"""Text and pictures to ids, tensors and batches: readers, vocabularies, and the embedded data sets."""

from probllm.data.conll import TaggedSentence, TreebankSentence, read_conll, read_conllu, read_tagged, write_conll
from probllm.data.dataset import Batch, Batches, Dataset, Example
from probllm.data.digits import Digits, digits
from probllm.data.emoji import Glyphs, emoji_glyphs, emoji_languages, emoji_names
from probllm.data.features import TAGGING_TEMPLATES, FeatureHasher
from probllm.data.lines import LabelledText, read_labelled_lines, read_lines, read_parallel_lines, read_text
from probllm.data.pronunciations import Pronunciation, letters_to_phonemes, pronunciations, stress_tagging
from probllm.data.python_reference import PythonReference, python_reference
from probllm.data.splits import Split, random_split
from probllm.data.tagging import TaggingVocabulary
from probllm.data.vocabulary import Vocabulary
from probllm.data.word_classes import WordClasses

__all__ = [
    "TAGGING_TEMPLATES",
    "Batch",
    "Batches",
    "Dataset",
    "Digits",
    "Example",
    "FeatureHasher",
    "Glyphs",
    "LabelledText",
    "Pronunciation",
    "PythonReference",
    "Split",
    "TaggedSentence",
    "TaggingVocabulary",
    "TreebankSentence",
    "Vocabulary",
    "WordClasses",
    "digits",
    "emoji_glyphs",
    "emoji_languages",
    "emoji_names",
    "letters_to_phonemes",
    "pronunciations",
    "python_reference",
    "random_split",
    "read_conll",
    "read_conllu",
    "read_labelled_lines",
    "read_lines",
    "read_parallel_lines",
    "read_tagged",
    "read_text",
    "stress_tagging",
    "write_conll",
]
