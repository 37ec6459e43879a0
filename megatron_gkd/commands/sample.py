"""`megatron-gkd sample`: completions of a data set's prompts from one model, to a JSONL file that `--dataset` reads.

The prompts are read twice: once to check everything that can be wrong before the model is loaded (rows, lengths, what
is in the result file), and once in batches of `write_batch_size`, each sampled at once, checked, and written. Tokens of
a completion depend on the model, the settings and (seed, record, number of the completion) alone: not on batches, on
the engine's mode or on where an interrupted run was taken up again (result_file.py).

A row of the result is read back as the token ids that were sampled, or it says that it is not (data/prompts.py):

    stopped    the completion ended by itself: written
    truncated  cut at max_new_tokens. Read back it would end its turn there, and teach the student to stop in the
               middle: dropped, or kept with `--truncated keep` and finish_reason "length"
    respelled  read back as other tokens of the same text: kept with exact_tokens false, or dropped
    changed    read back as another text: dropped

Everything that is dropped is counted, and so are completions without text, which are written as they are. The counts
are in the progress file and in the last line of the log. A result without a row is an error that says why, with exit
code 1.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from megatron_gkd import platform
from megatron_gkd.architecture import Architecture, read_architecture
from megatron_gkd.config.dtypes import chosen
from megatron_gkd.config.sample import SampleConfig
from megatron_gkd.data.chat import ChatEncoder, load_tokenizer
from megatron_gkd.data.clock import Clock
from megatron_gkd.data.image_tokens import ImageTokens, read_image_tokens
from megatron_gkd.data.policy import RowSummary, Tokenised, check_variables
from megatron_gkd.data.prompts import Prompt, completion_text, make_row, read_back, read_prompts
from megatron_gkd.data.result_file import ResultFile, progress_path
from megatron_gkd.errors import CheckFailedError, ConfigError, DataError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.observe.progress import Progress
from megatron_gkd.rollout.engines import engine_image_options, server_urls
from megatron_gkd.rollout.protocol import Completion, Engine, Request, SamplingSettings
from megatron_gkd.rollout.requests import seed_of
from megatron_gkd.train.hub_files import with_local_files
from megatron_gkd.weights.stop_tokens import stop_tokens

logger = get_logger(__name__)

# What a completion, or its being written, depends on: a run with others of these cannot go on with a result.
_DECIDE = (
    *("model", "max_new_tokens", "num_return_sequences", "temperature", "top_p", "top_k", "seed", "dtype"),
    *("truncated", "respelled", "on_bad_row", "overlong", "chat_template_kwargs", "enable_thinking"),
    *("max_image_tiles", "image_url_dir"),
)


def run_sample(config: SampleConfig) -> None:
    """Carry out the command. Raises GKDError for what the user can act on."""
    start_s = time.monotonic()
    if unused := config.without_effect():
        names = ", ".join(f"--{name}" for name in unused)
        logger.warning(
            "without effect with --vllm_mode %s --temperature %g: %s", config.vllm_mode, config.temperature, names
        )
    config = with_local_files(_with_dtype(config))
    encoder = ChatEncoder(load_tokenizer(config.model), earlier_clock(config.result_path))
    check_variables(json.loads(config.template_kwargs), encoder)
    arch = read_architecture(config.model)
    images = _image_tokens(config, arch, encoder)
    longest_of_model = arch.max_position_embeddings
    longest = min(config.vllm_max_model_len or longest_of_model, longest_of_model)
    if config.max_new_tokens >= longest:
        raise ConfigError(
            f"--max_new_tokens {config.max_new_tokens} leaves no room for a prompt in sequences of {longest} tokens "
            "(the model's length, or --vllm_max_model_len); give a smaller one"
        )
    stop_ids = stop_tokens(config.model, encoder)
    survey = _Survey(config, encoder, longest, images)
    result = ResultFile(config.result_path, _fingerprint(config, survey, encoder.clock))
    if result.complete:
        logger.info("%s is complete: %s", config.result_path, _account(result.counts))
        _require_rows(config, result.counts)
        return
    if result.resumed:
        logger.info("%s: going on after %d of %d records", config.result_path, result.records_done, survey.num_records)
    length = longest if config.vllm_max_model_len else survey.longest_needed
    options = engine_image_options(images, survey.most_images, in_server=config.vllm_mode != "colocate")
    engine = open_engine(config, length, options)
    try:
        counts = _sample_all(config, encoder, survey, result, engine, stop_ids)
    finally:
        engine.close()
    logger.info("%s: %s, in %.0f s", config.result_path, _account(counts), time.monotonic() - start_s)
    _require_rows(config, counts)


class _Survey:
    """The first reading: what there is, before any work is done."""

    def __init__(self, config: SampleConfig, encoder: ChatEncoder, longest: int, images: ImageTokens | None) -> None:
        self.num_records = self.num_prompts = self.longest_needed = self.most_images = 0
        self.images = images
        self._room = longest - config.max_new_tokens
        self._stop_at_bad, self._stop_at_overlong = config.on_bad_row == "stop", config.overlong == "stop"
        digest, found = hashlib.sha256(), RowSummary()
        variables = json.loads(config.template_kwargs)
        for item in read_prompts(config.dataset, encoder, variables=variables, images=images):
            self.num_records += 1
            prompt = self.usable(item, Counter())
            digest.update(json.dumps(prompt and prompt.ids).encode())
            digest.update("".join(picture.digest for picture in prompt.pictures).encode() if prompt else b"")
            if prompt is not None:
                self.num_prompts += 1
                own = {name: value for name, value in prompt.options.items() if name not in prompt.variables}
                found.note(Tokenised((), (), tuple(encoder.left_out.of([(prompt.text, None)], prompt.options, own))))
                self.most_images = max(self.most_images, len(prompt.pictures))
                self.longest_needed = max(self.longest_needed, len(prompt.ids) + config.max_new_tokens)
        for warning in found.warnings():
            logger.warning("%s: %s", ", ".join(config.dataset), warning)
        if not self.num_prompts:
            raise DataError(f"no usable prompt in {', '.join(config.dataset)} ({self.num_records} records)")
        self.fingerprint = digest.hexdigest()[:16]

    def usable(self, item: Prompt | tuple[int, str, str], counts: Counter[str]) -> Prompt | None:
        """The prompt, or None where it is dropped, by the policies; raises where they say stop."""
        if not isinstance(item, Prompt):
            _, place, problem = item
            if self._stop_at_bad:
                raise DataError(f"{place}: {problem}; correct the row, or pass --on_bad_row skip")
            counts["malformed"] += 1
            return None
        if len(item.ids) > self._room:
            if self._stop_at_overlong:
                raise DataError(
                    f"{item.place}: a prompt of {len(item.ids)} tokens, and the engine's length leaves {self._room} "
                    "beside --max_new_tokens; lower that, raise --vllm_max_model_len, or pass --overlong drop"
                )
            counts["overlong"] += 1
            return None
        return item


def _sample_all(
    config: SampleConfig,
    encoder: ChatEncoder,
    survey: _Survey,
    result: ResultFile,
    engine: Engine,
    stop_ids: tuple[int, ...],
) -> Counter[str]:
    banned = () if survey.images is None else (survey.images.image_token_id,)
    settings = SamplingSettings(config.temperature, config.top_p, config.top_k, stop_ids, banned)
    counts = Counter(result.counts)
    variables = json.loads(config.template_kwargs)
    records = read_prompts(
        config.dataset, encoder, start=result.records_done, variables=variables, images=survey.images
    )
    with Progress(survey.num_records, done_steps=result.records_done, unit="record") as progress:
        for batch in _batches(records, config.write_batch_size):
            prompts = [prompt for item in batch if (prompt := survey.usable(item, counts)) is not None]
            completions = engine.generate(_requests(config, prompts), settings) if prompts else []
            rows = _rows(config, encoder, prompts, completions, stop_ids, counts)
            done = result.records_done + len(batch)
            result.append(rows, records_done=done, counts=counts)
            num_tokens = sum(len(completion.token_ids) for completion in completions)
            progress.update(done, tokens_per_step=num_tokens / max(done, 1))
    result.finish()
    return counts


def _batches(
    records: Iterator[Prompt | tuple[int, str, str]], size: int
) -> Iterator[list[Prompt | tuple[int, str, str]]]:
    while batch := list(islice(records, size)):
        yield batch


def _requests(config: SampleConfig, prompts: list[Prompt]) -> list[Request]:
    """All completions of all prompts, prompt by prompt."""
    n = config.num_return_sequences
    return [
        Request(
            *(prompt.index * n + k, prompt.ids, config.max_new_tokens, seed_of(config.seed, prompt.index, k)),
            *(prompt.pictures, prompt.bare),
        )
        for prompt in prompts
        for k in range(n)
    ]


def _rows(
    config: SampleConfig,
    encoder: ChatEncoder,
    prompts: list[Prompt],
    completions: list[Completion],
    stop_ids: tuple[int, ...],
    counts: Counter[str],
) -> list[dict[str, Any]]:
    """What is written of a batch; the rest is counted."""
    n = config.num_return_sequences
    rows = []
    for i, completion in enumerate(completions):
        prompt, tokens = prompts[i // n], completion.token_ids
        counts["sampled"] += 1
        counts["tokens"] += len(tokens)
        text = completion_text(encoder, tokens, stop_ids)
        found = read_back(encoder, prompt, tokens, stop_ids)
        counts["empty"] += not text
        if completion.finish_reason == "length":
            counts["truncated"] += 1
            if config.truncated == "drop":
                continue
        if found == "changed":
            counts["changed"] += 1
            continue
        if found == "respelled" and completion.finish_reason == "stop":
            counts["respelled"] += 1
            if config.respelled == "drop":
                continue
        counts["written"] += 1
        notes = {
            "record": prompt.index,
            "number": i % n,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(tokens),
            "logprob": round(sum(completion.logprobs), 4),
            "exact_tokens": found == "exact",
        }
        rows.append(make_row(prompt, text, notes))
    return rows


def _require_rows(config: SampleConfig, counts: Mapping[str, int]) -> None:
    """Raise CheckFailedError, with each reason and what to do about it, where nothing at all was written."""
    if counts.get("written"):
        return
    reasons = {
        "truncated": f"were cut at --max_new_tokens {config.max_new_tokens}, and would teach the student to stop in "
        "the middle: raise it, or pass --truncated keep",
        "changed": "would be read back as another text (bytes that are no text, or blanks and tags that the chat "
        "template removes): is the model trained?",
        "respelled": "would be read back as other tokens of the same text: pass --respelled keep",
    }
    keeps = {"truncated": config.truncated == "keep", "respelled": config.respelled == "keep"}
    said = [f"{counts[name]:,} {why}" for name, why in reasons.items() if counts.get(name) and not keeps.get(name)]
    raise CheckFailedError(
        f"nothing was written to {config.result_path}: of {counts.get('sampled', 0):,} completions {'; '.join(said)}"
    )


def _with_dtype(config: SampleConfig) -> SampleConfig:
    """With `--dtype auto` decided, and said."""
    if config.dtype != "auto":
        return config
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    logger.info("--dtype is not given: %s, on %s", chosen(config.dtype, kind), kind)
    return replace(config, dtype=chosen(config.dtype, kind))


def _image_tokens(config: SampleConfig, arch: Architecture, encoder: ChatEncoder) -> ImageTokens | None:
    """How the model sees images; None for one of text alone. Raises ConfigError."""
    if arch.vision is None:
        for flag in ("max_image_tiles", "image_url_dir"):
            if getattr(config, flag) is not None:
                raise ConfigError(f"--{flag} is for a model with a vision tower, and {config.model} has none")
        return None
    family, token_id, tiles = arch.vision.family, arch.vision.image_token_id, config.max_image_tiles
    found = read_image_tokens(config.model, family, token_id, encoder.tokenizer, max_tiles=tiles)
    return replace(found, url_dir=config.image_url_dir)


def open_engine(config: SampleConfig, max_model_len: int, options: Mapping[str, Any] = MappingProxyType({})) -> Engine:
    """The engine that `--vllm_mode` names, with the weights of the model's directory. `options`: of one that is made
    here."""
    if config.vllm_mode == "colocate":
        from megatron_gkd.rollout.vllm.colocate import ColocatedEngine

        platform.init_distributed(platform.setup())
        return ColocatedEngine(
            config.model,
            dtype=config.precision,
            max_model_len=max_model_len,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            read_weights=True,
            engine_options=options,
        )
    from megatron_gkd.rollout.vllm.server import ServerEngine, SubprocessEngine

    timeout_s = 60 * config.timeout_minutes
    if config.vllm_mode == "subprocess":
        return SubprocessEngine(
            config.model,
            dtype=config.precision,
            max_model_len=max_model_len,
            tensor_parallel_size=config.vllm_tensor_parallel_size,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            read_weights=True,
            timeout_s=timeout_s,
            engine_options=options,
        )
    assert config.vllm_server_host is not None
    (url,) = server_urls(config.vllm_server_host, config.vllm_server_port)
    engine = ServerEngine(url, model_path=config.model, dtype=config.precision, read_weights=True, timeout_s=timeout_s)
    if engine.max_model_len < max_model_len:
        engine.close()
        raise ConfigError(
            f"{url} takes {engine.max_model_len} tokens of prompt and completion, and {max_model_len} are needed; "
            "start it with a larger --max-model-len, or give --vllm_max_model_len or a smaller --max_new_tokens"
        )
    return engine


def earlier_clock(result_path: str) -> Clock | None:
    """The time that an earlier start told the chat template, where the result goes on from it; what is wrong with its
    progress file `ResultFile` says."""
    try:
        asked = json.loads(progress_path(Path(result_path)).read_text(encoding="utf-8"))["asked"]
        return Clock(asked["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fingerprint(config: SampleConfig, survey: _Survey, clock: Clock) -> dict[str, Any]:
    """What the result depends on. The model is its directory and the date of its newest file."""
    values = {name: asdict(config)[name] for name in _DECIDE}
    values["model"] = str(Path(config.model).resolve())
    files = [path for path in Path(config.model).iterdir() if path.is_file()]
    values["model files"] = [
        max(int(path.stat().st_mtime) for path in files),
        sum(path.stat().st_size for path in files),
    ]
    return values | {"prompts": survey.fingerprint, "records": survey.num_records, "time": clock.time}


def _account(counts: dict[str, int]) -> str:
    """`12 of 14 completions written (3,100 tokens sampled); 2 truncated`."""
    parts = [
        f"{counts.get('written', 0):,} of {counts.get('sampled', 0):,} completions written "
        f"({counts.get('tokens', 0):,} tokens sampled)"
    ]
    parts += [f"{counts[name]:,} {name}" for name in ("truncated", "respelled", "changed", "empty") if counts.get(name)]
    parts += [f"{counts[name]:,} rows left out as {name}" for name in ("malformed", "overlong") if counts.get(name)]
    return "; ".join(parts)
