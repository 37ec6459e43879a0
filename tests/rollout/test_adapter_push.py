"""An adapter alone goes into the LoRA of a real, colocated vLLM that holds the base: after each push the engine
computes with this adapter and no older one, a damaged or unpushed one is found, and the bytes are the adapter's.

The run is built as `train` builds it; its bridge is driven by hand. Not covered: GPUs, sleep; experts, whose kernels
beside LoRA vLLM has on GPUs alone (the refusal is tested).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import ConfigError, RolloutError
from megatron_gkd.weights.adapters import fill
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import T, build_run, run_config, write_pair, write_rows

pytestmark = pytest.mark.slow
SAMPLING: dict[str, Any] = dict(lmbda=1.0, max_length=192, max_completion_length=64, global_batch_size=4, train_iters=1)
LORA: dict[str, Any] = dict(tuner_type="lora", lora_rank=5, lora_alpha=10.0, vllm_enable_lora=True)


def other_values(run: Any, seed: int) -> None:
    """Adapters with an A and a B that are far from those before, the same in every layout."""

    def read(name: str, rows: int, columns: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + sum(name.encode()))
        return torch.randn(rows, columns, generator=generator) * (0.3 if ".lora_B." in name else columns**-0.5)

    student = run.student
    fill(student.models, run.architecture, student.groups, read)


def pushes(config: RunConfig) -> tuple[int, float, list[str]]:
    with megatron():
        run = build_run(config)
        assert run.rollouts is not None
        bridge: Any = run.rollouts._bridge
        try:
            faults, largest, sizes = [], 0.0, set()
            for version in range(3):
                if version:
                    other_values(run, version)
                    with pytest.raises(RolloutError) as stale:  # a fault: the engine has the adapter before
                        bridge.verify()
                    faults.append(str(stale.value))
                sizes.add(bridge.push(version).num_bytes)
                largest = max(largest, bridge.verify().largest)
            deliver = bridge._buckets
            bridge._buckets = Damaged(deliver)
            with pytest.raises(RolloutError) as damaged:
                bridge.push(3)
            faults.append(str(damaged.value))
            bridge._buckets = Less(deliver)
            with pytest.raises(RolloutError) as less:
                bridge.push(3)
            faults.append(str(less.value))
            bridge._buckets = deliver
            bridge.push(3)
            largest = max(largest, bridge.verify().largest)
            (size,) = sizes
            return size, largest, faults
        finally:
            run.rollouts.close()


class Damaged:
    """A bit of the last layer's last matrix is another than its checksum is of."""

    def __init__(self, buckets: Any) -> None:
        self.buckets = buckets

    def __iter__(self) -> Any:
        *before, (tensors, sums) = self.buckets
        tensors[-1][1].view(torch.int32)[0, 0] ^= 1
        yield from [*before, (tensors, sums)]


class Less(Damaged):
    """The last layer is missing."""

    def __iter__(self) -> Any:
        yield from [*self.buckets][:-1]


CASES: dict[str, tuple[int, dict[str, Any]]] = {"one": (1, {})}
if FULL:
    CASES["TP2, engine over both ranks"] = (2, dict(tensor=2, vllm_tensor_parallel_size=2))


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_goes_into_vllms_lora(tmp_path: Path, case: str) -> None:
    world, layout = CASES[case]
    model = write_tiny_checkpoint(tmp_path / "student", "qwen3", layers=2, head_dim=32, tied=True, seed=1)
    teacher = write_tiny_checkpoint(tmp_path / "teacher", "qwen3", layers=1, hidden_size=32, seed=2)
    rows, sizes = write_rows(tmp_path / "rows.jsonl", 8), {T.get(name, name): value for name, value in layout.items()}
    given: dict[str, Any] = dict(
        lmbda=1.0, max_length=192, max_completion_length=64, global_batch_size=4, train_iters=1
    )
    config = run_config(str(model), str(teacher), rows, **given, **LORA, **sizes)
    query, kv, hidden, ffn = 4 * 32, 2 * 32, 64, 96
    matrices = [
        (query, hidden),
        (kv, hidden),
        (kv, hidden),
        (hidden, query),
        (ffn, hidden),
        (ffn, hidden),
        (hidden, ffn),
    ]
    for num_bytes, largest, faults in run_ranks(pushes, config, world=world, with_vllm=True):
        assert num_bytes == 4 * 5 * sum(map(sum, matrices)) * 2
        assert largest < 1e-4
        stale, stale_again, damaged, less = faults
        assert "the engines do not hold the trainer's weights" in stale
        assert "The worst tensor is base_model.model.model.layers." in stale_again
        assert "layers.1.mlp.down_proj.lora_B.weight was damaged on the way" in damaged
        assert "14 tensors of the model were not sent" in less


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(config: RunConfig) -> str:
    with megatron():
        try:
            build_run(config)
        except ConfigError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(tuner_type="full", lora_rank=8, lora_alpha=32.0), "sends an adapter, and --tuner_type is full"),
        (dict(vllm_mode="subprocess"), "is for a colocated vLLM, and --vllm_mode is subprocess"),
        (dict(sleep_level=2), "--sleep_level 2 discards them: give 0 or 1"),
        (dict(modules_to_save=["norm"]), "vLLM's LoRA has no such modules"),
        (dict(lora_rank=513), "takes adapters up to rank 512, and --lora_rank is 513"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_where_merged_weights_have_to_be_sent(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_config("S", "T", "rows", **dict(lmbda=1.0) | LORA | given)


def test_experts_beside_vllms_lora_need_a_gpu(tmp_path: Path) -> None:
    """vLLM 0.32 on a CPU: "module 'triton.language' has no attribute 'float32'", as the engine starts."""
    student, teacher = write_pair(tmp_path, "mixtral")
    flags: dict[str, Any] = dict(
        lmbda=1.0, global_batch_size=4, train_iters=1, max_length=256, max_completion_length=64
    )
    config = run_config(student, teacher, write_rows(tmp_path / "rows.jsonl", 4), **flags, **LORA)
    (said,) = run_ranks(refused, config, world=1)
    assert "of a mixtral model: beside LoRA vLLM's experts are Triton kernels, and this run is on a CPU" in said
