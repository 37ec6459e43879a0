"""What goes wrong on the way to the sampler is caught, named and undone: each fault is injected into a real bridge over
a real vLLM engine, and afterwards a complete push makes the engine exact again.

One process runs all faults on one engine, because building an engine takes seconds; each returns what it saw.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.errors import RolloutError
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.rollout.protocol import Completion, SamplingSettings
from megatron_gkd.rollout_bridge import RolloutBridge
from megatron_gkd.train.rollouts import Rollouts
from tests.support.bridging import (
    GREEDY,
    PROBES,
    bridge_for,
    buckets_of,
    engine_for,
    load_model,
    megatron,
    requests,
    set_weights,
)
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

VICTIM = "model.layers.1.mlp.up_proj.weight"


class Tampered:
    """Buckets with a fault in the passes that `passes` names (counted from 0); `fault` changes one bucket's tensors."""

    def __init__(self, buckets: Any, fault: Callable[[list[Any]], list[Any]], passes: Sequence[int]) -> None:
        self.buckets, self.fault, self.passes, self.count = buckets, fault, passes, -1

    def __iter__(self) -> Iterator[Any]:
        self.count += 1
        for tensors, sums in self.buckets:
            yield (self.fault(tensors) if self.count in self.passes else tensors), sums


def corrupt(tensors: list[Any]) -> list[Any]:
    """One number of one tensor changes after its owner took the checksum."""
    for name, tensor in tensors:
        if name == VICTIM:
            tensor.view(-1)[7] += 1e-3
    return tensors


def drop(tensors: list[Any]) -> list[Any]:
    return [(name, tensor) for name, tensor in tensors if name != VICTIM]


def double(tensors: list[Any]) -> list[Any]:
    return [*tensors, *[item for item in tensors if item[0] == VICTIM]]


def rename(tensors: list[Any]) -> list[Any]:
    return [(name.replace("up_proj", "upp_proj"), tensor) for name, tensor in tensors]


def reshape(tensors: list[Any]) -> list[Any]:
    return [(name, tensor.T if name == VICTIM else tensor) for name, tensor in tensors]


def halve(tensors: list[Any]) -> list[Any]:
    return [(name, tensor.bfloat16() if name == VICTIM else tensor) for name, tensor in tensors]


FAULTS = {fault.__name__: fault for fault in (corrupt, drop, double, rename, reshape, halve)}


def _message(action: Callable[[], Any]) -> str:
    try:
        action()
    except RolloutError as error:
        return str(error)
    return ""


def inject(paths: list[Path]) -> dict[str, Any]:
    """All faults, one after the other, on one engine."""
    seen: dict[str, Any] = {}
    with megatron(), engine_for(paths[0], sleep_level=0) as engines:
        student = load_model(paths[0], Layout())
        engine: Any = engines.engines[0]

        def exact(bridge: RolloutBridge) -> bool:
            bridge.verify()
            return bridge.version is not None

        seen["unpushed"] = _message(lambda: engine.generate(requests(), GREEDY))
        for name, fault in FAULTS.items():
            set_weights(student, paths[1])
            bridge = bridge_for(student, engines, buckets=Tampered(buckets_of(student), fault, passes=(0, 1)))
            seen[name] = _message(lambda bridge=bridge: bridge.push(1))
            seen[f"{name}: refused afterwards"] = _message(lambda: engine.generate(requests(), GREEDY))
            seen[f"{name}: third push"] = (bridge.push(2).attempts, exact(bridge))
        once = bridge_for(student, engines, buckets=Tampered(buckets_of(student), corrupt, passes=(0,)))
        seen["corrupted once"] = (once.push(3).attempts, exact(once))

        # Weights that changed after the push: the check of log-probabilities, and the tensor's name.
        bridge = bridge_for(student, engines)
        bridge.push(4)
        (target,) = [
            parameter
            for name, parameter in student.chunks[0].named_parameters()
            if name.endswith("layers.1.mlp.linear_fc2.weight")
        ]
        with torch.no_grad():
            target.mul_(1.3)
        seen["stale weights"] = _message(bridge.verify)
        seen["stale weights: version"] = bridge.version

        # A prefix cache that survives a push.
        bridge = bridge_for(student, engines)
        bridge.push(5)
        vllm = engine._llm
        reset, vllm.reset_prefix_cache = vllm.reset_prefix_cache, lambda *a, **k: True
        seen["cache kept"] = _message(lambda: bridge.push(6))
        vllm.reset_prefix_cache = reset
        seen["cache dropped"] = bridge.push(7).version

        # A completion of an older policy than allowed.
        rollouts = Rollouts(bridge, lambda step: GREEDY, vocab_size=300, train_iters=20)
        original = bridge.sample
        bridge.sample = lambda *a: {  # type: ignore[method-assign]
            key: Completion(key, c.token_ids, c.logprobs, c.finish_reason, 6) for key, c in original(*a).items()
        }
        seen["stale version"] = _message(lambda: rollouts.for_step(8, lambda step: requests(step)))
        bridge.sample = original  # type: ignore[method-assign]
        seen["right version"] = len(rollouts.for_step(9, lambda step: requests(step)))

        # What stops is what the settings say, not the model's generation config.
        seen["endless"] = {c.finish_reason for c in engine.generate(requests(), SamplingSettings(1.0))}

        # The engine fails while it samples.
        generate, vllm.generate = vllm.generate, _raise
        seen["engine died"] = _message(lambda: bridge.sample(requests(), GREEDY))
        vllm.generate = generate
        seen["engine back"] = len(bridge.sample(requests(), GREEDY))
        seen["vocabulary"] = _message(
            lambda: Rollouts(bridge, lambda step: GREEDY, vocab_size=3, train_iters=20).for_step(
                10, lambda step: requests(step)
            )
        )
        bridge.close()
        seen["closed"] = _message(lambda: engine.generate(requests(), GREEDY))
    assert PROBES
    return seen


def _raise(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("EngineDeadError: the worker is gone")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("failures")
    paths = [
        write_tiny_checkpoint(root / f"w{seed}", "qwen3", tied=True, head_dim=32, layers=2, seed=seed)
        for seed in (1, 2)
    ]
    config = paths[0] / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": list(range(300))}))
    found: dict[str, Any] = run_ranks(inject, paths, world=1, timeout_s=600, with_vllm=True)[0]
    return found


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("corrupt", f"{VICTIM} was damaged on the way"),
        ("drop", f"the first is {VICTIM}"),
        ("double", f"{VICTIM} is not a tensor of the model, or was sent twice"),
        ("rename", "upp_proj.weight is not a tensor of the model"),
        ("reshape", f"{VICTIM} was sent as (64, 96)"),
        ("halve", f"{VICTIM} was sent as (96, 64) torch.bfloat16"),
    ],
)
def test_fault_on_the_way(seen: dict[str, Any], fault: str, says: str) -> None:
    """Named, tried twice, rolled back, sampling refused until a complete push, which is then exact."""
    assert says in seen[fault], seen[fault]
    assert "did not reach the engines" in seen[fault]
    assert "no complete weights" in seen[f"{fault}: refused afterwards"]
    assert seen[f"{fault}: third push"] == (1, True)


def test_a_single_fault_is_repaired_by_a_second_push(seen: dict[str, Any]) -> None:
    assert seen["corrupted once"] == (2, True)


def test_nothing_is_sampled_before_the_first_push(seen: dict[str, Any]) -> None:
    assert "a complete update comes first" in seen["unpushed"]


def test_weights_that_differ_stop_the_run_with_the_worst_tensor(seen: dict[str, Any]) -> None:
    assert "do not hold the trainer's weights" in seen["stale weights"]
    assert "The worst tensor is model.layers.1.mlp.down_proj.weight in engine 0" in seen["stale weights"]
    assert seen["stale weights: version"] is None


def test_a_kept_prefix_cache_is_noticed(seen: dict[str, Any]) -> None:
    assert "came from the cache, computed with older weights" in seen["cache kept"]
    assert seen["cache dropped"] == 7


def test_only_the_stop_tokens_of_the_settings_stop(seen: dict[str, Any]) -> None:
    """The generation config in the engine's directory names every token."""
    assert seen["endless"] == {"length"}


def test_an_old_completion_is_refused(seen: dict[str, Any]) -> None:
    assert "completion of policy version 6; version 8 is the oldest" in seen["stale version"]
    assert seen["right version"] == 6


def test_a_dying_engine_is_an_error_on_every_rank(seen: dict[str, Any]) -> None:
    assert "the worker is gone" in seen["engine died"]
    assert seen["engine back"] == 6
    assert "is closed" in seen["closed"] or "make a new engine" in seen["closed"]


def test_a_token_that_the_teacher_lacks_is_refused(seen: dict[str, Any]) -> None:
    assert "which the teacher does not have" in seen["vocabulary"]
