"""Checks that a converted model is the same network: compares its logits on a sample text with transformers', both in
fp32.

A round trip proves nothing, because a wrong map inverts itself.
Communication: the schedule's over the pipeline group, one all-gather of [1, S, V/tp] over the tensor group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_gkd.architecture import Architecture
from megatron_gkd.data.chat import load_tokenizer
from megatron_gkd.data.collate import MicroBatch, media_of, without_loss
from megatron_gkd.data.image_tokens import ImageTokens, read_image_tokens
from megatron_gkd.data.pictures import striped_picture
from megatron_gkd.data.positions import rotary_positions
from megatron_gkd.errors import CheckpointError
from megatron_gkd.model.build import HiddenStateGPTModel
from megatron_gkd.model.pipeline import forward_hidden, run_schedule
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import Picture
from megatron_gkd.weights.hf_files import side_files

_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
SAMPLE_TEXT: Final = (
    "The quick brown fox jumps over the lazy dog. In 1969, two people walked on the Moon; 12 did so until 1972.\n"
    "def add(a, b):\n    return a + b\n"
)


def sample_tokens(hf_dir: str | Path, arch: Architecture) -> torch.Tensor:
    """[1, S] token ids of the sample text; where the directory has no tokenizer, ids spread over the vocabulary."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(hf_dir), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        found = [name for name in side_files(Path(hf_dir)) if name in _TOKENIZERS or name.endswith(".tiktoken")]
        if found:  # ids that nobody means would not check what the model is used for
            raise CheckpointError(f"{hf_dir}: {', '.join(found)} cannot be read as a tokenizer: {error}") from error
        return (torch.arange(64) * max(arch.vocab_size // 64, 1) % arch.vocab_size)[None]
    ids = torch.tensor([tokenizer(SAMPLE_TEXT).input_ids])
    if int(ids.max()) >= arch.vocab_size:
        raise CheckpointError(f"{hf_dir}: the tokenizer gives id {int(ids.max())}, the model has {arch.vocab_size}")
    return ids


class Seen(NamedTuple):
    """A sample text with an image, for a model that sees images."""

    tokens: torch.Tensor  # [1, S]: the image's, before those of the text
    images: ImageTokens
    picture: Picture  # in its place


def sample_image(hf_dir: str | Path, arch: Architecture, tokens: torch.Tensor) -> Seen | None:
    """The sample text behind an image; None for a model of text alone."""
    if arch.vision is None:
        return None
    family, token_id = arch.vision.family, arch.vision.image_token_id
    images = read_image_tokens(hf_dir, family, token_id, load_tokenizer(hf_dir), max_tiles=None)
    ids, (picture,) = images.expand((token_id, *tokens[0].tolist()), [striped_picture()])
    return Seen(torch.tensor([ids]), images, picture)


def reference_logits(hf_dir: str | Path, tokens: torch.Tensor, seen: Seen | None = None) -> torch.Tensor:
    """transformers' logits [1, S, V], in fp32 on the CPU."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind: Any = AutoModelForCausalLM if seen is None else AutoModelForImageTextToText
    model = kind.from_pretrained(str(hf_dir), dtype=torch.float32, trust_remote_code=False, local_files_only=True)
    inputs: dict[str, Any] = {"input_ids": tokens}
    if seen is not None:
        inputs |= seen.images.inputs([seen.picture])
        if seen.picture.grid is not None:
            inputs["mm_token_type_ids"] = (tokens == seen.images.image_token_id).int()
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**inputs).logits
    return logits


def model_logits(
    chunks: Sequence[HiddenStateGPTModel],
    layout: Layout,
    groups: ProcessGroupCollection,
    arch: Architecture,
    tokens: torch.Tensor,
    seen: Seen | None = None,
) -> torch.Tensor | None:
    """The megatron-core model's logits [1, S, V], without padding; None outside the last pipeline stage."""
    batch = without_loss(tokens)
    if seen is not None:
        batch = replace(batch, media=media_of([seen.picture], [0]))
        if seen.picture.grid is not None:
            batch = replace(batch, position_ids=rotary_positions(tokens.shape[1], [seen.picture])[:, None])
        for chunk in chunks:
            if chunk.vision is not None:
                chunk.vision.prepare = seen.images.inputs

    def forward_step(batches: Iterator[MicroBatch], chunk: Any) -> tuple[torch.Tensor, Any]:
        def collect(hidden: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
            local = torch.nn.functional.linear(chunk.head_input(hidden), chunk.head_weight()).contiguous()
            shards = [torch.empty_like(local) for _ in range(layout.tensor)]
            dist.all_gather(shards, local, group=groups.tp)
            return torch.cat(shards, dim=-1).transpose(0, 1)

        return forward_hidden(chunk, next(batches), torch.device("cpu")), collect

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        out = run_schedule(chunks, layout, groups, forward_step, [batch], forward_only=True, collect=True)
    return out[0][..., : arch.vocab_size] if out else None
