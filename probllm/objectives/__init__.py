"""What training minimises: losses of structured laws beside the likelihood."""

from probllm.objectives.structured import perturbed_loss, sparsemap_loss, sparsemap_marginals, structured_hinge

__all__ = ["perturbed_loss", "sparsemap_loss", "sparsemap_marginals", "structured_hinge"]
