"""Judging predictions: arrays in, numbers or pictures out. Nothing here knows a model."""

from probllm.evaluation.arviz_data import to_arviz
from probllm.evaluation.attachment import AttachmentCounts, AttachmentScores, attachment_counts, attachment_scores
from probllm.evaluation.bootstrap import Difference, Estimate, bootstrap, paired_bootstrap
from probllm.evaluation.calibration import ReliabilityCurve, expected_calibration_error, reliability_curve
from probllm.evaluation.entities import SpanScores, span_counts, span_scores
from probllm.evaluation.plots import plot_confusion, plot_learning, plot_marginals, plot_reliability
from probllm.evaluation.tagging import accuracy, confusion_matrix, correct_tokens, token_nll, unpad
from probllm.evaluation.transduction import EditErrors, edit_distance, edit_errors
from probllm.evaluation.translation import bleu, bleu_counts, paired_bleu

__all__ = [
    "AttachmentCounts",
    "AttachmentScores",
    "Difference",
    "EditErrors",
    "Estimate",
    "ReliabilityCurve",
    "SpanScores",
    "accuracy",
    "attachment_counts",
    "attachment_scores",
    "bleu",
    "bleu_counts",
    "bootstrap",
    "confusion_matrix",
    "correct_tokens",
    "edit_distance",
    "edit_errors",
    "expected_calibration_error",
    "paired_bleu",
    "paired_bootstrap",
    "plot_confusion",
    "plot_learning",
    "plot_marginals",
    "plot_reliability",
    "reliability_curve",
    "span_counts",
    "span_scores",
    "to_arviz",
    "token_nll",
    "unpad",
]
