"""Generalized Knowledge Distillation of large language models on megatron-core."""
