"""probllm: exact structured probability and generative models on shared neural encoders, as Pyro models."""

__version__ = "0.1.0"
