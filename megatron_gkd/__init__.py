"""Generalized Knowledge Distillation of large language models on megatron-core."""

__version__ = "0.1.0"
