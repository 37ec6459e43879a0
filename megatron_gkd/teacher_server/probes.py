"""What is found out about a teacher server before any training, each with a real request, and what it says otherwise.

    P1  it names one model, and takes sequences of the run's longest + 1 tokens (it samples one token after each)
    P2  its vocabulary holds the largest token id of the tokenizer; where it has /tokenize, it cuts a text into the
        same ids
    P3  it tells K tokens per position (its --max-logprobs)
    P4  ALIGNMENT: row i of a scored sequence is the distribution after its first i tokens, as sampling after those i
        tokens gives it. Rows off by one give another distribution. On average over the positions, because a server in
        bf16 computes the two ways with different rounding.
    P5  the top K it names lie within the student's vocabulary (every answer is checked for that: wire.py)

The scored probe stays as the server's CANARY: asked again later, it tells whether the same weights answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from megatron_gkd.errors import RolloutError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.rollout.client import ServerAnswerError, ServerClient
from megatron_gkd.rollout.wire import read_int
from megatron_gkd.teacher_server.wire import TopK, distance, next_token_body, read_next_token, read_topk, topk_body

logger = get_logger(__name__)

COMPLETIONS = "/v1/completions"
PROBE_TOKENS = 48
TOLERANCE = 0.05  # mean total variation, in [0, 1], that is rounding; another position or model is far above it
_NUM_POSITIONS = 8
_TEXT = "Energy: E = m * c^2?\n\tdef f(x1): return x1 + 2.5  # caf\u00e9, na\u00efve, \u4e2d\u6587"
_START = "start it with launch/teacher_server.sh"


@dataclass(frozen=True)
class Needs:
    """What a run needs of each of its servers."""

    topk: int
    vocab_size: int  # token ids that may come back: 0 .. vocab_size - 1
    largest_id: int  # that may be sent
    longest: int  # tokens of a sequence that may be sent
    probe: tuple[int, ...]  # real tokens, at least two
    encode: Callable[[str], list[int]] | None = None  # the student's tokenizer, without special tokens


@dataclass(frozen=True)
class Probed:
    """What a server was found to be."""

    model: str
    canary: TopK


def probe_server(client: ServerClient, needs: Needs) -> Probed:
    """All checks of the module docstring. Raises RolloutError with the first that fails."""
    model = _model(client, needs)
    _check_vocabulary(client, model, needs)
    canary = _check_topk(client, model, needs)
    _check_alignment(client, model, needs, canary)
    logger.info("%s: model %s, top %d, sequences up to %d", client.name, model, needs.topk, needs.longest)
    return Probed(model, canary)


def ask_canary(client: ServerClient, model: str, needs: Needs) -> TopK:
    """The probe's top K at all positions but the first, [len(probe) - 1, K]."""

    def read(answer: Any) -> TopK:
        return read_topk(answer, needs.probe, 1, needs.topk, needs.vocab_size, client.name)

    body = topk_body(model, needs.probe, needs.topk)
    found: TopK = client.post(COMPLETIONS, "score a probe", body, again=True, read=read)
    return found


def _model(client: ServerClient, needs: Needs) -> str:
    """P1. The name that requests have to give."""

    def read(answer: Any) -> list[tuple[str, int | None]]:
        models = [model for model in answer["data"] if not model.get("parent")]  # adapters have a parent
        lengths = [model.get("max_model_len") for model in models]
        return [
            (str(model["id"]), None if length is None else read_int(length))
            for model, length in zip(models, lengths, strict=True)
        ]

    models = client.get("/v1/models", "name its model", read=read)
    if not models:
        raise RolloutError(f"{client.name} names no model at /v1/models; {_START}")
    model, length = models[0]
    if length is None:
        logger.warning("%s does not say its max_model_len: a sequence of %d tokens tells", client.name, needs.longest)
        ids = (needs.probe * (needs.longest // len(needs.probe) + 1))[: needs.longest]
        _ask(client, f"score the longest sequence, {needs.longest} tokens", topk_body(model, ids, 1), _too_long)
    elif length <= needs.longest:
        raise RolloutError(
            f"{client.name} takes {length} tokens (max_model_len), and {needs.longest + 1} are needed: the longest "
            f"sequence of this run and one token more; start it with MAX_MODEL_LEN={needs.longest + 1} or more, or "
            "lower --max_length"
        )
    return str(model)


def _check_vocabulary(client: ServerClient, model: str, needs: Needs) -> None:
    """P2."""

    def refuse(error: ServerAnswerError) -> NoReturn:
        raise RolloutError(
            f"{client.name} refuses token id {needs.largest_id}, the largest of the student's tokenizer ({error}): it "
            "serves a model with another vocabulary"
        ) from error

    _ask(client, "score the largest token id", topk_body(model, [needs.probe[0], needs.largest_id], 1), refuse)
    if needs.encode is None:
        return
    try:
        body = {"model": model, "prompt": _TEXT, "add_special_tokens": False}
        tokens = client.post(
            "/tokenize", "cut a text into tokens", body, again=True, read=lambda answer: list(answer["tokens"])
        )
    except ServerAnswerError as error:
        logger.warning("%s does not cut text into tokens, so its tokenizer was not compared (%s)", client.name, error)
        return
    if tokens != needs.encode(_TEXT):
        raise RolloutError(
            f"{client.name} has another tokenizer than the student: the same text becomes {len(tokens)} tokens there, "
            f"{len(needs.encode(_TEXT))} here, or others; distillation needs one tokenizer"
        )


def _check_topk(client: ServerClient, model: str, needs: Needs) -> TopK:
    """P3, and the canary."""
    try:
        return ask_canary(client, model, needs)
    except ServerAnswerError as error:
        if error.status != 400:
            raise
        raise RolloutError(
            f"{client.name} refuses to tell {needs.topk} tokens per position ({error}); start it with "
            f"MAX_LOGPROBS={needs.topk} (--max-logprobs of vLLM), or lower --gkd_logits_topk"
        ) from error


def _check_alignment(client: ServerClient, model: str, needs: Needs, canary: TopK) -> None:
    """P4."""

    def read(answer: Any) -> TopK:
        return read_next_token(answer, needs.topk, client.name)

    positions = np.unique(np.linspace(1, len(needs.probe) - 1, _NUM_POSITIONS).astype(int)).tolist()
    found = []
    for position in positions:
        body = next_token_body(model, needs.probe[:position], needs.topk)
        found.append(client.post(COMPLETIONS, "sample a token after a probe", body, again=True, read=read))
    sampled = TopK(np.concatenate([row.logprobs for row in found]), np.concatenate([row.ids for row in found]))
    rows = [position - 1 for position in positions]  # the canary begins with row 1
    apart = distance(sampled, TopK(canary.logprobs[rows], canary.ids[rows]))
    if not apart <= TOLERANCE:
        raise RolloutError(
            f"{client.name} gives log-probabilities of a sequence that are not those of its positions: they differ by "
            f"{apart:.2g} (mean total variation over {len(positions)} positions, at most {TOLERANCE} is rounding) from "
            f"what it samples from there. Its rows are off, or it changes its logits; {_START}"
        )


def _ask(
    client: ServerClient, what: str, body: dict[str, Any], refuse: Callable[[ServerAnswerError], NoReturn]
) -> None:
    try:
        client.post(COMPLETIONS, what, body, again=True)
    except ServerAnswerError as error:
        if error.status == 422:  # `swift deploy`, whose `prompt` is a string
            raise RolloutError(
                f"{client.name} does not take token ids as the prompt ({error}), and text would be cut into tokens a "
                "second time; serve the model with launch/teacher_server.sh or `vllm serve`"
            ) from error
        if error.status != 400:
            raise
        refuse(error)


def _too_long(error: ServerAnswerError) -> NoReturn:
    raise RolloutError(f"{error}; start it with a larger --max-model-len, or lower --max_length") from error


def probe_tokens(sequences: Sequence[Sequence[int]], largest_id: int) -> tuple[int, ...]:
    """A probe of real tokens: the beginning of the sequences, end to end; at least two tokens."""
    ids: list[int] = []
    for sequence in sequences:
        ids += sequence[: PROBE_TOKENS - len(ids)]
    return tuple(ids) if len(ids) > 1 else (*ids, 0, largest_id)
