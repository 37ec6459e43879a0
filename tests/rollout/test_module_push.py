"""Modules that are trained whole beside adapters reach a real vLLM with the merged weights: after each push the engine
computes with their values, a push that leaves them at the base's is found, and the adapter alone is refused.

The run is built as `train` builds it, with the base as teacher, whose values the modules keep beside their own; its
bridge is driven by hand. Not covered: GPUs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import RolloutError
from megatron_gkd.weights import whole_modules
from tests.rollout.test_adapter_push import other_values
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import T, build_run, run_config, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")]
MODULES = ["embed_tokens", "norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"]


def other_modules(run: Any, seed: int) -> None:
    """Modules a tenth off their base, the same in every layout."""
    shapes = whole_modules.shapes(run.architecture, MODULES)
    student = run.student

    def read(name: str, first: int, last: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + sum(name.encode()))
        around = 1.0 if len(shapes[name]) == 1 else 0.0
        return (around + 0.1 * torch.randn(shapes[name], generator=generator))[first:last]

    whole_modules.fill(student.models, run.architecture, student.groups, MODULES, read)


@contextlib.contextmanager
def at_their_base(run: Any) -> Iterator[None]:
    """A fault: the modules are sent as the base has them."""
    whole = [p for chunk in run.student.models for p in chunk.parameters() if hasattr(p, "of_base")]
    assert whole, "the base teaches, and its values are kept"
    trained = [p.detach().clone() for p in whole]
    with torch.no_grad():
        for parameter in whole:
            parameter.copy_(parameter.of_base)
        yield
        for parameter, value in zip(whole, trained, strict=True):
            parameter.copy_(value)


def pushes(config: RunConfig) -> tuple[float, list[str]]:
    with megatron():
        run = build_run(config)
        assert run.rollouts is not None
        bridge: Any = run.rollouts._bridge
        largest, faults = 0.0, []
        try:
            for version in range(3):
                if version:
                    other_modules(run, version)
                    if version == 2:
                        other_values(run, version)
                    with pytest.raises(RolloutError) as stale:
                        bridge.verify()
                    faults.append(str(stale.value))
                bridge.push(version)
                largest = max(largest, bridge.verify().largest)
            with at_their_base(run):
                bridge.push(3)
            with pytest.raises(RolloutError) as left:
                bridge.verify()
            faults.append(str(left.value))
            bridge.push(4)
            return max(largest, bridge.verify().largest), faults
        finally:
            run.rollouts.close()


@pytest.mark.parametrize(
    ("world", "layout"),
    [(1, {}), (2, dict(tensor=2, vllm_tensor_parallel_size=2)), (2, dict(pipeline=2, vllm_tensor_parallel_size=2))],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_modules_reach_the_engine(tmp_path: Path, world: int, layout: dict[str, Any], tied: bool) -> None:
    model = write_tiny_checkpoint(tmp_path / "student", "qwen3", layers=2, head_dim=32, tied=tied, seed=1)
    rows = write_rows(tmp_path / "rows.jsonl", 8, teacher_prompts=True)
    sizes = {T.get(name, name): value for name, value in layout.items()}
    given: dict[str, Any] = dict(lmbda=1.0, max_length=192, max_completion_length=64, global_batch_size=4)
    lora: dict[str, Any] = dict(tuner_type="lora", lora_rank=5, lora_alpha=10.0, train_iters=1)
    lora["modules_to_save"] = MODULES if tied else [*MODULES, "lm_head"]
    config = run_config(str(model), None, rows, **given, **lora, **sizes)
    for largest, faults in run_ranks(pushes, config, world=world, with_vllm=True):
        assert largest < 1e-4
        assert len(faults) == 3
        assert all("the engines do not hold the trainer's weights" in fault for fault in faults), faults
