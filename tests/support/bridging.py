"""What a rank does in the tests of the rollout bridge: a student in some layout, real vLLM engines, pushes, samples.

Called through run_ranks(..., with_vllm=True): importing vLLM changes a process, and its engines are large.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_gkd.parallel.layout import Layout
from megatron_gkd.rollout.engines import LocalEngines
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.rollout.requests import make_requests
from megatron_gkd.rollout.vllm.colocate import ColocatedEngine
from megatron_gkd.rollout_bridge import RolloutBridge
from megatron_gkd.train.score import student_logprobs
from megatron_gkd.weights.chunks import ExpertRank
from megatron_gkd.weights.delivery import Delivery
from megatron_gkd.weights.export import HFTensorStream
from megatron_gkd.weights.hf_files import HFCheckpoint
from megatron_gkd.weights.load import load_hf_weights
from megatron_gkd.weights.plan import hf_tensor_shapes
from tests.support.ranks_at_work import Loaded, load_model, megatron

STOP = 258
MAX_MODEL_LEN = 192
GREEDY = SamplingSettings(0.0, stop_token_ids=(STOP,))
SAMPLED = SamplingSettings(0.9, top_p=0.95, stop_token_ids=(STOP,))
BUCKET_BYTES = 60_000  # several buckets per model
PROMPTS = {
    position: tuple(torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(position)).tolist())
    for position, length in enumerate((5, 17, 40, 9, 150, 3))
}
PROBES = [PROMPTS[2], PROMPTS[4]]


def requests(step: int = 0, max_completion_length: int = 12) -> list[Request]:
    return make_requests(
        PROMPTS,
        run_seed=7,
        step=step,
        max_completion_length=max_completion_length,
        max_length=MAX_MODEL_LEN,
        max_model_len=MAX_MODEL_LEN,
    )


def set_weights(student: Loaded, path: Path) -> None:
    with HFCheckpoint(path) as checkpoint:
        load_hf_weights(
            student.chunks,
            checkpoint,
            student.arch,
            tp_rank=student.groups.tp.rank(),
            tp_size=student.groups.tp.size(),
            expert_rank=ExpertRank.of(student.groups),
        )


def scores(student: Loaded, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    return student_logprobs(
        student.chunks,
        student.layout,
        student.groups,
        sequences,
        vocab_size=student.arch.vocab_size,
        device=torch.device("cpu"),
    )


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


@contextlib.contextmanager
def engine_for(path: Path, tensor_parallel_size: int = 1, **options: Any) -> Iterator[LocalEngines]:
    engine = ColocatedEngine(
        str(path), dtype="fp32", tensor_parallel_size=tensor_parallel_size, max_model_len=MAX_MODEL_LEN, **options
    )
    try:
        yield local(engine, tensor_parallel_size)
    finally:
        engine.close()


def local(engine: Any, tensor_parallel_size: int = 1) -> LocalEngines:
    rank, size = dist.get_rank(), tensor_parallel_size
    return LocalEngines({rank // size: engine}, dist.get_world_size() // size, reports=rank % size == 0)


def buckets_of(student: Loaded, bucket_bytes: int = BUCKET_BYTES, *, to: Any = "everyone") -> Delivery:
    stream = HFTensorStream(
        student.chunks, student.arch, student.groups, bucket_bytes=bucket_bytes, dtypes=torch.float32
    )
    return Delivery(stream, world(), to=to)


def bridge_for(
    student: Loaded, engines: LocalEngines, *, buckets: Iterable[Any] | None = None, verify_every: int = 1
) -> RolloutBridge:
    return RolloutBridge(
        engines,
        buckets=buckets_of(student) if buckets is None else buckets,
        manifest={name: (shape, torch.float32) for name, shape in hf_tensor_shapes(student.arch).items()},
        group=world(),
        dtype="fp32",
        probes=PROBES,
        score=lambda sequences: scores(student, sequences),
        verify_every=verify_every,
    )


@dataclass
class Pushed:
    """What came of one push of the weights at `path`, for one layout and engine size."""

    path: Path
    where: str
    greedy: dict[int, Completion]
    sampled: dict[int, Completion]
    trainer: dict[int, list[float]]  # the trainer's log-probabilities of the greedy tokens
    num_buckets: int
    version: int
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """What is pushed: of a model by name, from a student in a layout, into engines of `engine_size` ranks."""

    model: str
    layout: Layout
    engine_size: int


def push_everywhere(models: dict[str, list[Path]], cells: list[Cell]) -> list[Pushed]:
    """In every cell push the model's weights b, c, ... (of a, b, c, ...) in turn and sample after each. Cells of one
    model and size share engines.
    """
    found = []
    with megatron():
        for model, size in dict.fromkeys((cell.model, cell.engine_size) for cell in cells):
            with engine_for(models[model][0], size) as engines:
                for cell in [cell for cell in cells if (cell.model, cell.engine_size) == (model, size)]:
                    found += push_all(models[model], cell.layout, engines, size)
    assert "LOCAL_WORLD_SIZE" not in os.environ, "vLLM's variable stayed"
    return found


def push_all(
    paths: list[Path], layout: Layout, engines: LocalEngines, size: int, *, to: str = "everyone"
) -> list[Pushed]:
    found = []
    student = load_model(paths[0], layout)
    bridge = bridge_for(student, engines, buckets=buckets_of(student, to=to))
    for version, path in enumerate(paths[1:], start=1):
        set_weights(student, path)
        push = bridge.push(version)
        greedy, sampled = bridge.sample(requests(), GREEDY), bridge.sample(requests(), SAMPLED)
        sequences = [(*PROMPTS[p], *greedy[p].token_ids) for p in PROMPTS]
        trainer = {
            p: values[len(PROMPTS[p]) - 1 :] for p, values in zip(PROMPTS, scores(student, sequences), strict=True)
        }
        where = f"{layout.describe()}, EP {layout.expert}, engine TP {size}"
        found.append(Pushed(path, where, greedy, sampled, trainer, push.num_buckets, push.version))
    return found
