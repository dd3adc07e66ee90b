"""Text and pictures to ids, tensors and batches: readers, vocabularies, and the embedded data sets."""

from probllm.data.dataset import Batch, Batches, Dataset, Example

__all__ = ["Batch", "Batches", "Dataset", "Example"]
