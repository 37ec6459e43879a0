"""After every push the engines hold the trainer's weights: greedy tokens, log-probabilities and samples, for student
layouts and engine sizes, on real megatron-core ranks and real vLLM.

The truth is transformers on the same checkpoint. Three different sets of weights are pushed in turn, so a tensor that
stays behind shows. Does not cover: GPUs, sleep, several machines.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_gkd.parallel.layout import Layout
from tests.checkpoints import write_tiny_checkpoint
from tests.ranks import run_ranks
from tests.rollout.bridging import PROMPTS, Pushed, push_everywhere

pytestmark = pytest.mark.slow

MODELS = {
    "qwen3": {"family": "qwen3", "tied": True},
    "llama_tied": {"family": "llama", "tied": True},
    "llama_untied": {"family": "llama", "tied": False},
    "qwen3_moe": {"family": "qwen3_moe", "tied": False},
}
TOLERANCE = 1e-4  # nats
TIMEOUT_S = 420


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


def test_one_rank(checkpoints: dict[str, list[Path]]) -> None:
    found = run_ranks(
        push_everywhere, list(checkpoints.values()), [(Layout(), 1)], world=1, timeout_s=TIMEOUT_S, fresh=True
    )
    check_all(found, 4 * 3)


def test_two_ranks(checkpoints: dict[str, list[Path]]) -> None:
    layouts = [Layout(tensor=2), Layout(pipeline=2), Layout(data=2, expert=2)]
    cells = [(layout, size) for layout in layouts for size in (1, 2)]
    cells.append((Layout(pipeline=2, virtual_pipeline=2), 1))
    found = run_ranks(push_everywhere, list(checkpoints.values()), cells, world=2, timeout_s=TIMEOUT_S, fresh=True)
    check_all(found, (3 * 5 + 7) * 3)  # expert-parallel cells are for one model of the four


def test_four_ranks(checkpoints: dict[str, list[Path]]) -> None:
    models = [checkpoints["qwen3"], checkpoints["qwen3_moe"]]
    layouts = [Layout(tensor=2, pipeline=2), Layout(tensor=2, data=2, expert=2)]
    cells = [(layouts[0], 1), (layouts[0], 2), (layouts[1], 2)]
    found = run_ranks(push_everywhere, models, cells, world=4, timeout_s=TIMEOUT_S, fresh=True)
    check_all(found, (2 + 3) * 3)
