"""Prompts with images over HTTP, against a server without vLLM: what is sent, what is read, and what is not believed.

A real vLLM: tests/train/test_vision_engines.py.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_gkd.data.image_tokens import ImageTokens
from megatron_gkd.data.pictures import load, striped_picture
from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.image_wire import PATH, image_completion_body, read_image_completion
from megatron_gkd.rollout.protocol import Request, SamplingSettings
from megatron_gkd.rollout.wire import completion_body
from megatron_gkd.teacher.completion_cache import completion_key
from megatron_gkd.teacher.servers.servers import Seen, TeacherServers
from tests.support.fake_teacher_server import FakeServer, FakeSwift, behind_urls, random_teacher
from tests.teacher.servers.test_servers import NEEDS, SEQUENCES, assert_right

PLACEHOLDER = 250
IMAGES = ImageTokens("llava", PLACEHOLDER, (), (), 3, None, "{}")  # three tokens an image
SETTINGS = SamplingSettings(0.5, stop_token_ids=(4,), banned_token_ids=(PLACEHOLDER,))


class Seeing(FakeServer):
    """Expands each placeholder into as many as it is told."""

    def __init__(self, *, per_image: int = 3) -> None:
        super().__init__()
        self.per_image, self.enabled = per_image, True

    def respond(self, path: str, body: Any, key: str | None = None) -> tuple[int, Any]:
        if path != PATH:
            return super().respond(path, body, key)
        if not self.enabled:
            return 403, {"error": {"message": "Scale-out endpoints are disabled."}}
        assert len(body["content_parts"]) == body["token_ids"].count(PLACEHOLDER)
        ids = [t for token in body["token_ids"] for t in [token] * (self.per_image if token == PLACEHOLDER else 1)]
        sampling = body["sampling_params"]
        answer: dict[str, Any] = {"prompt_token_ids": ids, "choices": [{}]}
        if "seed" in sampling:
            assert sampling["logit_bias"] == {str(PLACEHOLDER): -100.0}
            found = self._sample(sampling | {"prompt": ids})
            logprobs = [{"token_id": 0, "logprob": value} for value in found["logprobs"]["token_logprobs"]]
            answer["choices"] = [found | {"logprobs": {"content": logprobs}}]
        else:
            rows = [self._row(ids[:i], ids[i], sampling["prompt_logprobs"]) for i in range(1, len(ids))]
            answer["prompt_logprobs"] = [None, *rows]
        return 200, self.spoil(body, answer)


def seen_request(key: int = 1, *, seed: int = 5) -> Request:
    bare = (1, PLACEHOLDER, 2)
    ids, placed = IMAGES.expand(bare, [striped_picture()])
    return Request(key, ids, 6, seed, placed, bare)


def test_a_request_has_the_bare_prompt_and_the_pixels_as_they_are() -> None:
    body = image_completion_body(seen_request(), SETTINGS, 100)
    assert body["token_ids"] == [1, PLACEHOLDER, 2]
    (part,) = body["content_parts"]
    sent = Image.open(io.BytesIO(base64.b64decode(part["url"].removeprefix("data:image/png;base64,"))))
    assert np.array_equal(np.asarray(sent), np.asarray(load(striped_picture())))
    text = completion_body(seen_request(), SETTINGS, 100)
    assert body["sampling_params"].items() >= {n: text[n] for n in ("seed", "temperature", "logit_bias")}.items()
    assert "prompt" not in body["sampling_params"]
    assert "logit_bias" not in completion_body(seen_request(), SamplingSettings(0.5), 100)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda answer: answer | {"prompt_token_ids": [1, 250, 250, 2]}, "makes 4 tokens .* and 5 are needed"),
        (lambda answer: answer | {"prompt_token_ids": None}, "does not say how it expanded"),
        (lambda answer: answer | {"choices": [answer["choices"][0] | {"logprobs": None}]}, "without its token ids"),
        (lambda answer: answer | {"choices": [answer["choices"][0] | {"finish_reason": "abort"}]}, "with 'abort'"),
    ],
)
def test_an_answer_that_cannot_be_is_refused(spoil: Callable[[Any], Any], message: str) -> None:
    request = seen_request()
    _, answer = Seeing().respond(PATH, image_completion_body(request, SETTINGS, 100))
    assert read_image_completion(request, answer, 3, "it").version == 3
    with pytest.raises(RolloutError, match=message):
        read_image_completion(request, spoil(answer), 0, "it")


def connected(*fakes: FakeServer) -> TeacherServers:
    urls, transport = behind_urls(*fakes)
    return TeacherServers(urls, NEEDS, timeout_s=20.0, retry_s=1.0, transport=transport)


def test_a_teacher_is_asked_about_sequences_with_images_and_without() -> None:
    bare = (1, PLACEHOLDER, 2)
    ids, placed = IMAGES.expand(bare, [striped_picture()])
    sequences = [*SEQUENCES[:2], (ids, (3, 5)), *SEQUENCES[2:], (ids, (9,))]
    seen = [None, None, Seen(bare, placed), *[None] * len(SEQUENCES[2:]), Seen(bare, placed)]
    with connected(Seeing(), Seeing()) as servers:
        servers.check_images(IMAGES)
        assert_right(servers.start(sequences, None, seen).result(), sequences)
        requests = [seen_request(), Request(2, (1, 2), 6, 5), seen_request(3, seed=9)]
        found = servers.generate(requests, SETTINGS)
        assert [completion.key for completion in found] == [1, 2, 3]
        values = random_teacher()(requests[0].prompt_ids)
        assert found[0].logprobs[0] == pytest.approx(values[found[0].token_ids[0]])
    assert random_teacher()(ids)[3] != random_teacher()(bare)[3], "another prompt has another distribution"


def test_servers_that_cannot_see_are_found_at_the_start() -> None:
    off = Seeing()
    off.enabled = False
    with connected(off) as servers, pytest.raises(RolloutError, match=r"403 .* start it with --enable-scale-out"):
        servers.check_images(IMAGES)
    other = r"makes 36 tokens .* and 35 are needed"
    with connected(Seeing(), Seeing(per_image=4)) as servers, pytest.raises(RolloutError, match=other):
        servers.check_images(IMAGES)
    with connected(FakeSwift()) as servers, pytest.raises(RolloutError, match="takes text only"):
        servers.check_images(IMAGES)


def test_completions_of_other_images_are_kept_apart() -> None:
    one, other = seen_request(), seen_request()
    other = replace(other, pictures=tuple(replace(p, digest="another") for p in other.pictures))
    of_text = replace(one, pictures=(), bare_ids=())
    keys = {completion_key("teacher", request, SETTINGS) for request in (one, other, of_text)}
    assert len(keys) == 3
