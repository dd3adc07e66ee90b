"""Encoders, embeddings, attention, potentials: layers from ids and pictures to states, from states to scores."""

from probllm.nn.config import Configurable, from_config, to_config

__all__ = ["Configurable", "from_config", "to_config"]
