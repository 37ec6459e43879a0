"""The real SmolLM2-135M-Instruct over tensor- and pipeline-parallel ranks: logits and greedy text equal transformers'.

It is the teacher of the quick start (after 4-bit rounding), in cache/quickstart/teacher or where GKD_REAL_MODEL says;
`bash launch/quickstart.sh` prepares it, and without it these tests skip themselves.

The greedy continuation is compared by teacher forcing: transformers generates the tokens once, one pass of the
megatron-core model over prompt and continuation must put each of them first. That is the same statement as generating
(the first token that differed would show), in one pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.model.pipeline import forward_hidden, run_schedule
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import MicroBatch
from tests.ranks import run_ranks
from tests.weights.ranks_at_work import load_model, megatron, micro_batch

MODEL = Path(os.environ.get("GKD_REAL_MODEL", Path(__file__).parents[2] / "cache/quickstart/teacher"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (MODEL / "model.safetensors").is_file(),
        reason=f"no real model in {MODEL}: bash launch/quickstart.sh prepares it",
    ),
]
LAYOUTS = {"TP3": Layout(tensor=3), "PP2": Layout(pipeline=2), "TP3-PP2": Layout(tensor=3, pipeline=2)}
NEW_TOKENS = 8
TOLERANCE = 1e-3
PROMPTS = (
    *("The capital of France is", "Water boils at", "Two plus two equals", "Once upon a time", "The sky is"),
    *("My favourite food is", "In the morning I", "The largest planet is", "Dogs are animals that", "Python is a"),
    *("The opposite of hot is", "A triangle has", "She opened the door and", "The year has twelve", "Bees make"),
    *("To bake bread you need", "The moon is", "Winter comes after", "He read the book because", "Fish live in"),
)


@pytest.fixture(scope="module")
def expected() -> tuple[list[torch.Tensor], list[int], list[torch.Tensor]]:
    """Sequences (prompt and greedy continuation), lengths of the prompts, transformers' logits of the sequences."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
    sequences, starts, logits = [], [], []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
            # The last token's logits are of no use: it has no successor here.
            logits.append(model(out[:, :-1]).logits[0])
        sequences.append(out[0, :-1].clone())
        starts.append(ids.shape[1])
    return sequences, starts, logits


def run_model(layout: Layout, sequences: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """Logits of every sequence, on the first tensor rank of the last stage."""
    with megatron():
        model = load_model(MODEL, layout)

        def forward_step(batches: Iterator[MicroBatch], chunk: Any) -> tuple[torch.Tensor, Any]:
            def collect(hidden: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
                local = torch.nn.functional.linear(chunk.head_input(hidden), chunk.head_weight()).contiguous()
                shards = [torch.empty_like(local) for _ in range(layout.tensor)]
                dist.all_gather(shards, local, group=model.groups.tp)
                return torch.cat(shards, dim=-1)[:, 0, : model.arch.vocab_size]

            return forward_hidden(chunk, next(batches), torch.device("cpu")), collect

        batches = [micro_batch(sequence[None]) for sequence in sequences]
        with torch.no_grad():
            out = run_schedule(
                model.chunks, layout, model.groups, forward_step, batches, forward_only=True, collect=True
            )
    return out if out and model.groups.tp.rank() == 0 else None


@pytest.mark.parametrize("name", LAYOUTS)
def test_greedy_text_and_logits_equal_transformers(expected: Any, name: str) -> None:
    sequences, starts, logits = expected
    layout = LAYOUTS[name]
    results = run_ranks(run_model, layout, sequences, world=layout.world_size, timeout_s=200)
    (found,) = [result for result in results if result is not None]
    assert len(found) == len(PROMPTS) == 20
    for prompt, start, here, there in zip(PROMPTS, starts, found, logits, strict=True):
        assert (here - there).abs().max() <= TOLERANCE, prompt
        assert torch.equal(here[start - 1 :].argmax(-1), there[start - 1 :].argmax(-1)), prompt
