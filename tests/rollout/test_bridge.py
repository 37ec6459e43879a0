"""After every push the engines hold the trainer's weights: greedy tokens, log-probabilities and samples, for student
layouts and engine sizes, on real megatron-core ranks and real vLLM.

The truth is transformers on the same checkpoint. Different sets of weights are pushed in turn, so a tensor that stays
behind shows: three on one rank, two on several.

By default every model, every layout and both engine sizes occur, each with several of the others, and what is special
in a pair: experts with and without expert parallelism, a tied head on another stage. GKD_TEST_FULL=1 pushes three times
in every combination. Does not cover: GPUs, sleep, several machines.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_gkd.parallel.layout import Layout
from tests.support.bridging import PROMPTS, Cell, Pushed, push_everywhere
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.ranks import run_ranks

TIMEOUT_S = 1500
pytestmark = pytest.mark.slow

MODELS = {
    "qwen3": {"family": "qwen3", "tied": True},
    "llama_tied": {"family": "llama", "tied": True},
    "llama_untied": {"family": "llama", "tied": False},
    "qwen3_moe": {"family": "qwen3_moe", "tied": False},
}
TOLERANCE = 1e-4  # nats

TP2, PP2, EP2 = Layout(tensor=2), Layout(pipeline=2), Layout(data=2, expert=2)
VPP2 = Layout(pipeline=2, virtual_pipeline=2)
TP2_PP2, TP2_EP2 = Layout(tensor=2, pipeline=2), Layout(tensor=2, data=2, expert=2)
# An engine takes most of the time: cells of one model and engine size share it.
CELLS = {
    1: [Cell("llama_untied", Layout(), 1)],
    2: [
        *(Cell("qwen3", PP2, 2), Cell("llama_tied", VPP2, 1)),
        *(Cell("qwen3_moe", EP2, 1), Cell("qwen3_moe", TP2, 1)),
    ],
    4: [Cell("qwen3_moe", TP2_EP2, 2), Cell("qwen3_moe", TP2_PP2, 2)],
}
ALL_CELLS = {
    1: [Cell(model, Layout(), 1) for model in MODELS],
    2: [
        Cell(model, layout, size)
        for model in MODELS
        for size in (1, 2)
        for layout in (TP2, PP2, EP2, VPP2)
        if (layout != EP2 or model == "qwen3_moe") and (layout != VPP2 or size == 1)
    ],
    4: [Cell(model, TP2_PP2, size) for model in ("qwen3", "qwen3_moe") for size in (1, 2)]
    + [Cell("qwen3_moe", TP2_EP2, 2)],
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    root = tmp_path_factory.mktemp("rollout")
    return {
        name: [
            write_tiny_checkpoint(root / name / f"w{seed}", head_dim=32, layers=4, seed=seed, **options)  # type: ignore[arg-type]
            for seed in range(4)
        ]
        for name, options in MODELS.items()
    }


@cache
def transformers_model(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def check(pushed: Pushed) -> None:
    """Greedy tokens are transformers' most probable ones, or as probable; the three agree on their values."""
    model = transformers_model(pushed.path)
    assert pushed.greedy.keys() == PROMPTS.keys()
    for position, completion in pushed.greedy.items():
        prompt, tokens = PROMPTS[position], completion.token_ids
        assert completion.version == pushed.version
        rows = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        truth = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (rows.max(-1).values - truth).max() <= TOLERANCE, (pushed.where, position)
        engine, trainer = torch.tensor(completion.logprobs), torch.tensor(pushed.trainer[position])
        assert (engine - truth).abs().max() <= TOLERANCE, (pushed.where, position)
        assert (trainer - truth).abs().max() <= TOLERANCE, (pushed.where, position)


def check_all(found: list[list[Pushed]], num_expected: int) -> None:
    assert len(found[0]) == num_expected
    samples: dict[Path, dict[int, tuple[int, ...]]] = {}
    for ranks in zip(*found, strict=True):
        first = ranks[0]
        check(first)
        assert all(other.greedy == first.greedy and other.sampled == first.sampled for other in ranks[1:])
        assert first.num_buckets > 2
        # The same completions whatever the layout, the engines' number and their size.
        tokens = {position: c.token_ids for position, c in first.sampled.items()}
        assert samples.setdefault(first.path, tokens) == tokens, first.where


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks(checkpoints: dict[str, list[Path]], world: int) -> None:
    cells = ALL_CELLS[world] if FULL else CELLS[world]
    num_pushes = 3 if FULL or world == 1 else 2
    models = {name: paths[: 1 + num_pushes] for name, paths in checkpoints.items()}
    found = run_ranks(push_everywhere, models, cells, world=world, timeout_s=TIMEOUT_S, with_vllm=True)
    check_all(found, len(cells) * num_pushes)
