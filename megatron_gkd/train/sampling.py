"""Builds the run's `Rollouts` from a RunConfig: engines, bridge, probes and sampling settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.run import RunConfig
from megatron_gkd.data.dataset import Rows
from megatron_gkd.data.image_tokens import ImageTokens
from megatron_gkd.errors import ConfigError
from megatron_gkd.model.build import DTYPES
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.together import on_first
from megatron_gkd.platform import Platform, setup
from megatron_gkd.records import Row, SeenSequence
from megatron_gkd.rollout.engines import engine_image_options, open_engines, probe_servers
from megatron_gkd.rollout.protocol import Request, SamplingSettings
from megatron_gkd.rollout_bridge import RolloutBridge
from megatron_gkd.train.adapting import described, lora_of
from megatron_gkd.train.inputs import Inputs
from megatron_gkd.train.rollouts import Rollouts
from megatron_gkd.train.score import student_logprobs
from megatron_gkd.train.student import Student
from megatron_gkd.weights import adapters
from megatron_gkd.weights.adapter_delivery import AdapterDelivery
from megatron_gkd.weights.checksum import Sums, Tensors
from megatron_gkd.weights.delivery import Delivery
from megatron_gkd.weights.source import ModelSource

logger = get_logger(__name__)

_NUM_PROBES = 8
_PROBE_TOKENS = 64


def engine_length(config: RunConfig, arch: Architecture) -> int:
    """Most tokens of prompt and completion that the engines support."""
    return min(config.sampling.vllm_max_model_len or config.data.max_length, arch.max_position_embeddings)


def check_servers(inputs: Inputs, rows: Rows | None) -> None:
    """Before a weight is read: check that prompts (of `rows`, if they are sampled from) leave room, and that running
    servers are what the run needs. An error of the first rank is raised on all. Collective over the world."""
    config, arch = inputs.config, inputs.student_arch
    sampling, length = config.sampling, engine_length(config, arch)
    if rows is not None:
        check_prompts(rows, length)
    if sampling.vllm_enable_lora and arch.moe is not None and setup(config.parallel.device).kind == "cpu":
        raise ConfigError(
            f"--vllm_enable_lora true of a {arch.model_type} model: beside LoRA vLLM's experts are Triton kernels, and "
            "this run is on a CPU: leave it out, and merged weights are sent"
        )
    if sampling.vllm_mode == "server":
        model, most_s = config.model, 60 * config.parallel.distributed_timeout_minutes
        on_first(
            lambda: probe_servers(
                sampling, model_path=model.model, dtype=model.precision, max_model_len=length, most_s=most_s
            )
        )


def build_rollouts(inputs: Inputs, where: Platform, student: Student, rows: Rows) -> Rollouts:
    """Start or connect the engines and attach them to the student. Collective over the world."""
    config, arch = inputs.config, inputs.student_arch
    sampling, length = config.sampling, engine_length(config, arch)
    group = student.groups.intra_dist_opt  # all ranks of the student's layout
    dtype = config.model.precision
    adapter = described(config, arch) if sampling.vllm_enable_lora else None
    local = open_engines(
        sampling,
        model_path=config.model.model,
        dtype=dtype,
        max_model_len=length,
        group=group,
        image_options=engine_image_options(
            inputs.sight.student, most_pictures(inputs), in_server=sampling.vllm_mode != "colocate"
        ),
        adapter=adapter,
    )
    beside = sampling.vllm_mode == "colocate"
    buckets, manifest = _weights(config, arch, student) if adapter is None else _adapters(config, arch, student)
    bridge = RolloutBridge(
        local,
        buckets=_OfDevice(student, buckets),
        manifest=manifest,
        group=group,
        dtype=dtype,
        probes=probes(rows, length, inputs.sight.student),
        score=lambda sequences: student_logprobs(
            student.chunks, student.layout, student.groups, sequences, vocab_size=arch.vocab_size, device=where.device
        ),
        verify_every=sampling.verify_sync_every,
        make_room=student.leave_device if beside else lambda: None,
    )
    logger.info("sampling: %d engine(s), %s; stop tokens %s", local.num_engines, sampling.vllm_mode, inputs.stop_ids)
    return Rollouts(
        bridge,
        lambda step: step_settings(inputs, step),
        vocab_size=inputs.vocab_size,
        train_iters=student.train_iters,
        steps_per_generation=sampling.steps_per_generation,
        lag=sampling.rollout_lag,
    )


class _OfDevice:
    """Brings offloaded weights back to the device before each pass over them (--offload_model)."""

    def __init__(self, student: Student, delivery: Delivery | AdapterDelivery) -> None:
        self._student, self._delivery = student, delivery

    def __iter__(self) -> Iterator[tuple[Tensors, Sums]]:
        _ = self._student.chunks  # brings them back
        return iter(self._delivery)


_Manifest = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _weights(config: RunConfig, arch: Architecture, student: Student) -> tuple[Delivery, _Manifest]:
    """Delivery of all weights (of a student with adapters merged), and the manifest of what must arrive."""
    sampling, dtype = config.sampling, config.model.precision
    source, bucket_bytes = ModelSource(config.model.model, arch), sampling.weight_bucket_mb * 2**20
    stream = source.stream(student.chunks, student.groups, dtype=dtype, bucket_bytes=bucket_bytes)
    to: Literal["everyone", "writer"] = "everyone" if sampling.vllm_mode == "colocate" else "writer"
    return Delivery(stream, student.groups.intra_dist_opt, to=to), dict(source.manifest(dtype))


def _adapters(config: RunConfig, arch: Architecture, student: Student) -> tuple[AdapterDelivery, _Manifest]:
    """Delivery of adapters only, and their manifest."""
    needed = adapters.shapes(arch, lora_of(config), config.tuner.target_modules)
    dtype = DTYPES[config.model.precision]
    return AdapterDelivery(student.models, arch, student.groups), {n: (shape, dtype) for n, shape in needed.items()}


def step_settings(inputs: Inputs, step: int) -> SamplingSettings:
    """The sampling settings of a step; steps are counted from 0."""
    sampling, temperature = inputs.config.sampling, inputs.config.values_at(step + 1).temperature
    return SamplingSettings(temperature, sampling.top_p, sampling.top_k, inputs.stop_ids, banned_tokens(inputs))


def banned_tokens(inputs: Inputs) -> tuple[int, ...]:
    """The placeholder of an image, which must never be sampled."""
    images = inputs.sight.student
    return () if images is None else (images.image_token_id,)


def seeing(request: Request, row: Row, images: ImageTokens | None) -> Request:
    """The request with the images of its row."""
    if images is None or not row.pictures:
        return request
    return replace(request, pictures=row.pictures, bare_ids=images.bare(row.prompt_ids, row.pictures))


def seeing_of_teacher(request: Request, row: Row, images: ImageTokens | None) -> Request:
    """The same for the teacher's prompt. `images`: how the teacher sees them."""
    pictures = row.pictures if row.teacher_prompt_ids is None else row.teacher_pictures
    if images is None or not pictures:
        return request
    return replace(request, pictures=pictures, bare_ids=images.bare(row.prompt_ids_for_teacher, pictures))


def most_pictures(inputs: Inputs) -> int:
    """The most pictures in a prompt that is sampled from, the teacher's or the student's."""
    if inputs.sight.student is None:
        return 0
    sets = [inputs.rows, inputs.eval_rows if inputs.config.generates else None]
    rows = [found[index] for found in sets if found is not None for index in range(len(found))]
    return max((max(len(row.pictures), len(row.teacher_pictures)) for row in rows), default=0)


def probes(rows: Rows, max_model_len: int, images: ImageTokens | None = None) -> list[Sequence[int]]:
    """Sequences for verification: the beginnings of the first rows, the same in every run on the same data. Of rows
    with pictures only the first one, whole."""
    length = min(_PROBE_TOKENS, max_model_len - 1)
    found: list[Sequence[int]] = []
    has_seen = False
    for index in range(min(_NUM_PROBES, len(rows))):
        row = rows[index]
        if images is not None and row.pictures:
            rest = (row.completion_ids or ())[:_PROBE_TOKENS]
            if not has_seen and len(row.prompt_ids) + len(rest) < max_model_len:
                bare = images.bare(row.prompt_ids, row.pictures)
                found.append(SeenSequence.of((*row.prompt_ids, *rest), row.pictures, (*bare, *rest)))
                has_seen = True
            continue
        ids = (*row.prompt_ids, *(row.completion_ids or ()))[-length:]
        if len(ids) > 1:
            found.append(ids)
    return found or [(0, 1)]


def check_prompts(rows: Rows, max_model_len: int, *, of_teacher: bool = False) -> None:
    """Raise ConfigError for a prompt (the teacher's, with `of_teacher`) that leaves no room for a token."""

    def check(row: Row, place: str) -> None:
        num_tokens = len(row.prompt_ids_for_teacher if of_teacher else row.prompt_ids)
        if num_tokens >= max_model_len:
            raise ConfigError(
                f"{place} has a prompt of {num_tokens} tokens, and the sampling engine takes {max_model_len} "
                "for prompt and completion: raise --vllm_max_model_len (and --max_length), or leave the row out"
            )

    rows.require(check)
