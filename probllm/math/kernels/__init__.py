"""The compiled recursions, each beside its torch twin in the folder above."""
