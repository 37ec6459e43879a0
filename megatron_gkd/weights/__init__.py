"""Hugging Face <-> megatron-core weights: a closed map as data, planned loading, streaming export. See docs/weights.md.

naming.py    roles: their HF names and megatron-core names       plan.py       shard -> rectangles of HF tensors
safetensors_format.py  file headers                    checksum.py   of a tensor's bytes, on CPUs and GPUs
hf_files.py  safetensors directories, read lazily                hf_writer.py  written tensor by tensor
chunks.py    a model's parameters by role and global layer
megatron_files.py   Megatron distributed checkpoints, one parameter at a time
safe_files.py       reads such checkpoints without running code in them
dtypes.py    recorded dtypes of HF tensors                       compare.py    logits against transformers
megatron_bridge.py  another library's conversion, for other families
load.py      HF -> model, each rank its rectangles               export.py     model -> HF, in bounded buckets
"""
