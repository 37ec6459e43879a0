"""Builds the run's `TeacherSamples` from a RunConfig: the sampler, its settings, its identity, its cache.

Two samplers:

    EngineSampler   a local teacher: the first rank starts a vLLM server with the teacher's weights whenever completions
                    are missing, and ends it when they are sampled. Identity: the fingerprint of the model's directory
                    (weights/fingerprint.py) and the precision.
    ServerSampler   the servers of an external teacher, beside the training. Identity: the name of the model and its
                    canary, the distribution of a probe (teacher/servers/probes.py), which is kept with the completions.

A canary is reproduced up to rounding, so it is compared, not hashed: a server whose canary is within `_SAME` of a
stored one is that teacher.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_gkd.config.dtypes import Dtype
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.servers import ServerTeachers
from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.data.image_tokens import ImageTokens
from megatron_gkd.errors import CheckpointError, RolloutError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.rollout.engines import engine_image_options
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.rollout.requests import make_requests
from megatron_gkd.teacher.completion_cache import CompletionCache, prompt_seed
from megatron_gkd.teacher.completions import CompletionStore, Sampler, TeacherSamples
from megatron_gkd.teacher.servers.probes import Probed, ServerRequirements
from megatron_gkd.teacher.servers.servers import TeacherServers
from megatron_gkd.teacher.servers.wire import TopK, distance
from megatron_gkd.train.checkpoint import find_checkpoint, is_hf_directory, read_state
from megatron_gkd.train.draws import Draw
from megatron_gkd.train.inputs import Inputs
from megatron_gkd.train.sampling import (
    banned_tokens,
    check_prompts,
    engine_length,
    most_pictures,
    seeing_of_teacher,
)
from megatron_gkd.weights.fingerprint import fingerprint
from megatron_gkd.weights.stop_tokens import stop_tokens

logger = get_logger(__name__)

_PART = 1024  # completions that are sampled at once, and then written
_TIMEOUT_S = 3600.0  # of such a part, and of an engine's start: a large teacher is read from a slow disk
_CONCURRENCY = 256  # requests under way at each server of an external teacher, as with an engine of the run's own
_SAME = 0.01  # mean total variation between canaries; what another rounding puts above it is sampled again


def build_teacher_samples(inputs: Inputs, needs: ServerRequirements | None) -> TeacherSamples:
    """Check the prompts, and sample for the first window of steps. Collective over all ranks.

    Args:
        needs: what the run requires of its teacher servers; None for a local teacher.
    """
    config, draws, world = inputs.config, inputs.draws, dist.group.WORLD
    assert world is not None
    sampling = config.sampling
    directory = config.teacher.teacher_model or config.model.model
    length = min(engine_length(config, arch) for arch in (inputs.student_arch, inputs.teacher_arch) if arch is not None)
    check_prompts(draws.rows, length, of_teacher=True)
    stop_ids = stop_tokens(directory, ChatEncoder(inputs.tokenizer))
    # One temperature: config/validate.py refuses another for some steps.
    temperature, banned = config.values_at(1).temperature, banned_tokens(inputs)
    settings = SamplingSettings(temperature, sampling.top_p, sampling.top_k, stop_ids, banned)
    images = inputs.sight.teacher or inputs.sight.student
    image_options = engine_image_options(images, most_pictures(inputs), in_server=True)
    own = config.teacher_sampling.teacher_samples_cache
    place = Path(own) if own is not None else Path(config.checkpoint.save) / "teacher_samples"

    def open_store() -> CompletionStore:
        cache = CompletionCache(place)
        logger.info("teacher's completions: %d in %s; stop tokens %s", len(cache), place, settings.stop_token_ids)
        sampler: Sampler
        if isinstance(kind := config.teacher.kind, ServerTeachers) and needs is not None:
            sampler = ServerSampler(kind.urls, needs, place)
        else:
            sampler = EngineSampler(config, directory, length, image_options)
        return CompletionStore(
            sampler,
            cache,
            settings,
            lambda step: teacher_requests(config, draws[step], step, length, images),
            inputs.vocab_size,
        )

    samples = TeacherSamples(
        open_store,
        group=world,
        train_iters=inputs.train_iters,
        window=config.teacher_sampling.teacher_sampling_steps if needs is None else 1,
    )
    samples.begin(_first_step(config.checkpoint.load))
    return samples


def _first_step(load: str | None) -> int:
    """The step at which the run will continue. If the checkpoint cannot be read, the resume will report it, and
    sampling starts with the first step."""
    if load is None or is_hf_directory(load):
        return 0
    try:
        return read_state(find_checkpoint(load)).step
    except CheckpointError:
        return 0


def teacher_requests(
    config: RunConfig, draw: Draw, step: int, longest: int, images: ImageTokens | None = None
) -> list[Request]:
    """The requests to the teacher for a step, keyed by position in the global batch.

    Args:
        draw: of the step.
        longest: most tokens of prompt and completion together, for the models and the engine.
        images: how the teacher sees them.
    """
    _, drawn, sources = draw
    requests = make_requests(
        {
            position: drawn[position].prompt_ids_for_teacher
            for position, source in enumerate(sources)
            if source == "teacher"
        },
        run_seed=config.training.seed,
        step=step,
        max_completion_length=config.values_at(step + 1).max_completion_length,
        max_length=config.data.max_length,
        max_model_len=longest,
    )
    seed = config.training.seed
    return [
        seeing_of_teacher(replace(request, seed=prompt_seed(seed, request.prompt_ids)), drawn[request.key], images)
        for request in requests
    ]


class EngineSampler:
    """A local teacher, in its own vLLM server while it samples."""

    beside_training = False

    def __init__(
        self, config: RunConfig, path: str, longest: int, image_options: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """Args:
        path: the teacher's directory.
        longest: most tokens of prompt and completion together.
        image_options: for a teacher that sees images (`engine_image_options`).
        """
        self._image_options = image_options
        self._path, self._longest = path, longest
        self._dtype: Dtype = config.model.precision
        teacher_sampling = config.teacher_sampling
        self._tensor_parallel_size = teacher_sampling.teacher_vllm_tensor_parallel_size
        self._gpu_memory_utilization = teacher_sampling.teacher_vllm_gpu_memory_utilization
        self.identity = f"directory {fingerprint(path)} {self._dtype}"

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> Iterator[list[Completion]]:
        from megatron_gkd.rollout.vllm.server import SubprocessEngine

        logger.info("teacher's completions: starting a vLLM engine to sample %d", len(requests))
        with SubprocessEngine(
            self._path,
            dtype=self._dtype,
            max_model_len=self._longest + 1,  # a server takes prompts up to one token less
            tensor_parallel_size=self._tensor_parallel_size,
            gpu_memory_utilization=self._gpu_memory_utilization,
            read_weights=True,
            timeout_s=_TIMEOUT_S,
            startup_timeout_s=_TIMEOUT_S,
            engine_options=self._image_options,
        ) as engine:
            for start in range(0, len(requests), _PART):
                yield engine.generate(requests[start : start + _PART], settings)

    def close(self) -> None:
        """Nothing is open between two calls of `sample`."""


class ServerSampler:
    """The servers of an external teacher."""

    beside_training = True

    def __init__(self, urls: Sequence[str], needs: ServerRequirements, place: Path) -> None:
        """Connect and probe.

        Args:
            place: directory of the cache, where canaries are kept.
        """
        self._servers = TeacherServers(urls, needs, timeout_s=_TIMEOUT_S, max_concurrency=_CONCURRENCY)
        try:
            self.identity = known_teacher(place, self._servers.probed, needs.probe)
        except BaseException:
            self._servers.close()
            raise

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> Iterator[list[Completion]]:
        for start in range(0, len(requests), _PART):
            yield self._servers.generate(requests[start : start + _PART], settings)

    def close(self) -> None:
        self._servers.close()


def known_teacher(place: Path, probed: Probed, probe: Sequence[int]) -> str:
    """The identity of a server's teacher: that of the stored canary in `place` that it matches, else a new one, which
    is stored."""
    canary = probed.canary
    name = hashlib.blake2b(repr((probed.model, list(probe), canary.ids.shape)).encode(), digest_size=8).hexdigest()
    try:
        for path in sorted(place.glob(f"teacher-{name}-*.json")):
            kept = json.loads(path.read_text(encoding="utf-8"))
            there = TopK(np.array(kept["logprobs"], np.float32), np.array(kept["ids"], np.int32))
            if distance(there, canary) <= _SAME:
                return f"server {path.stem}"
        digest = hashlib.blake2b(canary.ids.tobytes() + canary.logprobs.tobytes(), digest_size=8).hexdigest()
        path = place / f"teacher-{name}-{digest}.json"
        place.mkdir(parents=True, exist_ok=True)
        record = {"model": probed.model, "probe": list(probe), "ids": canary.ids.tolist()}
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(record | {"logprobs": canary.logprobs.tolist()}), encoding="utf-8")
        unfinished.rename(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RolloutError(
            f"the canaries of teacher servers in {place} cannot be read or written ({error}); give another "
            "--teacher_samples_cache"
        ) from error
    return f"server {path.stem}"
