"""Checks a teacher server before any training, each time with a real request:

    P0  which API it has (wire.py, swift.py). A server that, unlike vLLM, does not say its model's length is sent an
        empty request to /infer/, which ms-swift answers with an empty list
    P1  it serves one model, and takes the run's longest sequence plus 1 token (it samples one token after each)
    P2  its vocabulary contains the tokenizer's largest token id; if it has /tokenize, that tokenises a text into the
        same ids
    P3  it returns K tokens per position (its --max-logprobs)
    P4  ALIGNMENT: row i of a scored sequence is the distribution after its first i tokens, the same as when sampling
        after those i tokens. Rows that are off by one give another distribution. Compared on average over positions,
        because a server in bf16 rounds the two ways differently.
    P5  the top K token ids lie within the student's vocabulary (every answer is checked for that: wire.py)

The scored probe is kept as the server's CANARY: scoring it again later shows whether the weights are still the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import numpy as np

from megatron_gkd.errors import RolloutError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.rollout.client import ServerAnswerError, ServerClient
from megatron_gkd.rollout.wire import read_int
from megatron_gkd.teacher.servers.swift import INFER, Swift
from megatron_gkd.teacher.servers.wire import VLLM, TopK, distance

logger = get_logger(__name__)

Dialect = VLLM | Swift

PROBE_TOKENS = 48
TOLERANCE = 0.05  # mean total variation, in [0, 1], that is rounding; another position or model is far above it
_NUM_POSITIONS = 8
_TEXT = "Energy: E = m * c^2?\n\tdef f(x1): return x1 + 2.5  # caf\u00e9, na\u00efve, \u4e2d\u6587"
_START = "start it with launch/teacher_server.sh"


@dataclass(frozen=True)
class ServerRequirements:
    """What a run needs from each of its servers."""

    topk: int
    vocab_size: int  # token ids that may come back: 0 .. vocab_size - 1
    largest_id: int  # that may be sent
    longest: int  # tokens of a sequence that may be sent
    probe: tuple[int, ...]  # real tokens, at least two
    encode: Callable[[str], list[int]] | None = None  # the student's tokenizer, without special tokens


@dataclass(frozen=True)
class Probed:
    """The result of the checks."""

    model: str
    canary: TopK
    dialect: Dialect = field(default_factory=VLLM)


def probe_server(client: ServerClient, needs: ServerRequirements) -> Probed:
    """All checks of the module docstring. Raises RolloutError for the first that fails."""
    model, length = _model(client)
    dialect = _dialect(client) if length is None else VLLM()
    _check_length(client, dialect, model, length, needs)
    _check_vocabulary(client, dialect, model, needs)
    canary = _check_topk(client, dialect, model, needs)
    _check_alignment(client, dialect, model, needs, canary)
    logger.info("%s: model %s, top %d, sequences up to %d", client.name, model, needs.topk, needs.longest)
    return Probed(model, canary, dialect)


def ask_canary(
    client: ServerClient, dialect: Dialect, model: str, needs: ServerRequirements, *, again: bool = True
) -> TopK:
    """The probe's top K at all positions except the first, [len(probe) - 1, K]."""

    def read(answer: Any) -> TopK:
        return dialect.read_topk(answer, needs.probe, 1, needs.topk, needs.vocab_size, client.name)

    body = dialect.topk_body(model, needs.probe, needs.topk)
    found: TopK = client.post(dialect.path, "score a probe", body, again=again, read=read)
    return found


def _model(client: ServerClient) -> tuple[str, int | None]:
    """The model's name, which requests must give, and its max_model_len, if the server says it."""

    def read(answer: Any) -> list[tuple[str, int | None]]:
        models = [model for model in answer["data"] if not model.get("parent")]  # adapters have a parent
        lengths = [model.get("max_model_len") for model in models]
        return [
            (str(model["id"]), None if length is None else read_int(length))
            for model, length in zip(models, lengths, strict=True)
        ]

    models = client.get("/v1/models", "name its model", read=read)
    if not models:
        raise RolloutError(f"{client.name} lists no model at /v1/models; {_START}")
    model, length = models[0]
    return model, length


def _dialect(client: ServerClient) -> Dialect:
    """P0."""
    try:
        answer = client.post(INFER, "say whether it is of ms-swift", {"infer_requests": []}, again=True)
    except ServerAnswerError as error:
        if error.status in (403, 404, 405):
            return VLLM()
        raise
    if answer != []:
        raise RolloutError(
            f"{client.name} is not a vLLM server, and does not answer {INFER} as ms-swift 4.6 does; {_START}"
        )
    return Swift()


def _check_length(
    client: ServerClient, dialect: Dialect, model: str, length: int | None, needs: ServerRequirements
) -> None:
    """P1."""

    def refuse(error: ServerAnswerError) -> NoReturn:
        raise RolloutError(f"{error}; start it with {dialect.more_tokens}, or lower --max_length") from error

    if length is None:
        logger.warning("%s does not say its max_model_len: trying a sequence of %d tokens", client.name, needs.longest)
        ids = (needs.probe * (needs.longest // len(needs.probe) + 1))[: needs.longest]
        _ask(client, dialect, model, "score the first two tokens of a probe", needs.probe[:2], needs, _raise)
        _ask(client, dialect, model, f"score the longest sequence, {needs.longest} tokens", ids, needs, refuse)
    elif length <= needs.longest:
        raise RolloutError(
            f"{client.name} takes {length} tokens (max_model_len), and {needs.longest + 1} are needed: the longest "
            f"sequence of this run and one token more; start it with MAX_MODEL_LEN={needs.longest + 1} or more, or "
            "lower --max_length"
        )


def _check_vocabulary(client: ServerClient, dialect: Dialect, model: str, needs: ServerRequirements) -> None:
    """P2."""

    def refuse(error: ServerAnswerError) -> NoReturn:
        raise RolloutError(
            f"{client.name} refuses token id {needs.largest_id}, the largest of the student's tokenizer ({error}): it "
            "serves a model with another vocabulary"
        ) from error

    ids = (needs.probe[0], needs.largest_id)
    _ask(client, dialect, model, "score the largest token id", ids, needs, refuse)
    if needs.encode is None:
        return
    try:
        body = {"model": model, "prompt": _TEXT, "add_special_tokens": False}
        tokens = client.post(
            "/tokenize", "tokenise a text", body, again=True, read=lambda answer: list(answer["tokens"])
        )
    except ServerAnswerError as error:
        logger.warning("%s does not tokenise text, so its tokenizer was not compared (%s)", client.name, error)
        return
    if tokens != needs.encode(_TEXT):
        raise RolloutError(
            f"{client.name} has another tokenizer than the student: the same text becomes {len(tokens)} tokens there, "
            f"{len(needs.encode(_TEXT))} here, or others; distillation needs one tokenizer"
        )


def _check_topk(client: ServerClient, dialect: Dialect, model: str, needs: ServerRequirements) -> TopK:
    """P3, and the canary."""
    try:
        return ask_canary(client, dialect, model, needs, again=dialect.refuses_with < 500)
    except ServerAnswerError as error:
        if error.status != dialect.refuses_with:
            raise
        raise RolloutError(
            f"{client.name} refuses to return {needs.topk} tokens per position ({error}); start it with "
            f"{dialect.more_logprobs.format(needs.topk)}, or lower --gkd_logits_topk"
        ) from error


def _check_alignment(
    client: ServerClient, dialect: Dialect, model: str, needs: ServerRequirements, canary: TopK
) -> None:
    """P4."""
    positions = np.unique(np.linspace(1, len(needs.probe) - 1, _NUM_POSITIONS).astype(int)).tolist()
    scored, sampled = list[TopK](), list[TopK]()
    for position in positions:
        ids, at = needs.probe[:position], slice(position - 1, position)  # the canary begins with row 1
        scored.append(TopK(canary.logprobs[at], canary.ids[at]))
        body = dialect.next_token_body(model, ids, needs.topk)
        read = partial(dialect.read_next_token, ids=ids, row=scored[-1], server=client.name)
        sampled.append(client.post(dialect.path, "sample a token after a probe", body, again=True, read=read))
    apart = distance(_joined(sampled), _joined(scored))
    if not apart <= TOLERANCE:
        raise RolloutError(
            f"{client.name} gives log-probabilities of a sequence that are not those of its positions: they differ by "
            f"{apart:.2g} (mean total variation over {len(positions)} positions, at most {TOLERANCE} is rounding) from "
            f"what it samples from there. Its rows are off, or it changes its logits; {_START}"
        )


def _joined(parts: Sequence[TopK]) -> TopK:
    return TopK(np.concatenate([part.logprobs for part in parts]), np.concatenate([part.ids for part in parts]))


def _ask(
    client: ServerClient,
    dialect: Dialect,
    model: str,
    what: str,
    ids: Sequence[int],
    needs: ServerRequirements,
    refuse: Callable[[ServerAnswerError], NoReturn],
) -> None:
    """Score a sequence; `refuse` raises the error for a refusal. A refusal that looks like a failure is not retried."""

    def read(answer: Any) -> None:
        dialect.read_topk(answer, ids, len(ids), 1, needs.vocab_size, client.name)

    try:
        client.post(dialect.path, what, dialect.topk_body(model, ids, 1), again=dialect.refuses_with < 500, read=read)
    except ServerAnswerError as error:
        if error.status == 422:  # another server whose `prompt` is a string
            raise RolloutError(
                f"{client.name} does not take token ids as the prompt ({error}), and text would be cut into tokens a "
                "second time; serve the model with launch/teacher_server.sh or `vllm serve`"
            ) from error
        if error.status != dialect.refuses_with:
            raise
        refuse(error)


def _raise(error: ServerAnswerError) -> NoReturn:
    raise error


def probe_tokens(sequences: Sequence[Sequence[int]], largest_id: int) -> tuple[int, ...]:
    """A probe of real tokens: the beginnings of the sequences, concatenated; at least two tokens."""
    ids: list[int] = []
    for sequence in sequences:
        ids += sequence[: PROBE_TOKENS - len(ids)]
    return tuple(ids) if len(ids) > 1 else (*ids, 0, largest_id)
