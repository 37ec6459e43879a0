"""GPTModel of megatron-core built from a Hugging Face architecture, on explicit process groups."""
