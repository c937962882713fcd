"""Federated fine-tuning of language models by block expansion, on unequal edge hardware, without forgetting."""

__version__ = "0.1.0"
