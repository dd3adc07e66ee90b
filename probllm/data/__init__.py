"""Text and pictures to ids, tensors and batches: readers, vocabularies, and the embedded data sets."""

from probllm.data.bio import (
    Span,
    bio_rules,
    segmentation_from_spans,
    spans_from_segmentation,
    spans_from_tags,
    tags_from_spans,
)
from probllm.data.brackets import (
    Constituent,
    chart_from_tree,
    chart_labels,
    parse_brackets,
    read_brackets,
    tree_from_chart,
)
from probllm.data.captions import CaptionedImage, load_image, read_captioned_images
from probllm.data.conll import (
    TaggedSentence,
    TreebankSentence,
    read_conll,
    read_conllu,
    read_tagged,
    write_conll,
    write_conllu,
)
from probllm.data.dataset import Batch, Batches, Dataset, Example
from probllm.data.dependencies import find_cycle, is_projective, projectivise
from probllm.data.digits import Digits, digits
from probllm.data.emoji import Glyphs, emoji_glyphs, emoji_languages, emoji_names
from probllm.data.features import TAGGING_TEMPLATES, FeatureHasher
from probllm.data.lines import LabelledText, read_labelled_lines, read_lines, read_parallel_lines, read_text
from probllm.data.masking import Masked, prefix_pairs, span_denoising
from probllm.data.parsing import ParsingVocabulary
from probllm.data.pronunciations import Pronunciation, letters_to_phonemes, pronunciations, stress_tagging
from probllm.data.python_reference import PythonReference, python_reference
from probllm.data.segmentation import labels_of_tags, segmentation_from_tags, tags_from_segmentation
from probllm.data.splits import Split, random_split
from probllm.data.subwords import Subwords, WordPieces
from probllm.data.tagging import TaggingVocabulary
from probllm.data.transduction import Pair, TransductionVocabulary
from probllm.data.turkish import turkish_treebank
from probllm.data.vocabulary import Vocabulary
from probllm.data.windows import Windows
from probllm.data.word_classes import WordClasses

__all__ = [
    "TAGGING_TEMPLATES",
    "Batch",
    "Batches",
    "CaptionedImage",
    "Constituent",
    "Dataset",
    "Digits",
    "Example",
    "FeatureHasher",
    "Glyphs",
    "LabelledText",
    "Masked",
    "Pair",
    "ParsingVocabulary",
    "Pronunciation",
    "PythonReference",
    "Span",
    "Split",
    "Subwords",
    "TaggedSentence",
    "TaggingVocabulary",
    "TransductionVocabulary",
    "TreebankSentence",
    "Vocabulary",
    "Windows",
    "WordClasses",
    "WordPieces",
    "bio_rules",
    "chart_from_tree",
    "chart_labels",
    "digits",
    "emoji_glyphs",
    "emoji_languages",
    "emoji_names",
    "find_cycle",
    "is_projective",
    "labels_of_tags",
    "letters_to_phonemes",
    "load_image",
    "parse_brackets",
    "prefix_pairs",
    "projectivise",
    "pronunciations",
    "python_reference",
    "random_split",
    "read_brackets",
    "read_captioned_images",
    "read_conll",
    "read_conllu",
    "read_labelled_lines",
    "read_lines",
    "read_parallel_lines",
    "read_tagged",
    "read_text",
    "segmentation_from_spans",
    "segmentation_from_tags",
    "span_denoising",
    "spans_from_segmentation",
    "spans_from_tags",
    "stress_tagging",
    "tags_from_segmentation",
    "tags_from_spans",
    "tree_from_chart",
    "turkish_treebank",
    "write_conll",
    "write_conllu",
]
