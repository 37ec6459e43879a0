"""A teacher server without vLLM: its answers in vLLM's form, from any distribution, with faults to order.

`FakeServer.respond` is the whole of it; `transport` puts it behind an httpx client, `serve` behind a real port of the
loopback interface, for ranks in other processes. `FakeSwift` answers the same in the form of `swift deploy`. What the
real ones answer is tested in teacher/servers/test_vllm.py and test_swift.py.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import httpx
import numpy as np

VOCAB = 300
Distribution = Callable[[tuple[int, ...]], np.ndarray]  # tokens so far -> log-probabilities [V]
Spoil = Callable[[dict[str, Any], dict[str, Any]], Any]  # (request, answer) -> answer


def random_teacher(seed: int = 0, *, vocab_size: int = VOCAB) -> Distribution:
    """Another distribution after every prefix."""

    def distribution(prefix: tuple[int, ...]) -> np.ndarray:
        logits = np.random.default_rng([seed, len(prefix), *prefix]).normal(size=vocab_size) * 3
        return logits - np.logaddexp.reduce(logits)

    return distribution


class FakeServer:
    """Attributes to change: `spoil`, `refuse` (status codes of the next answers to completions), `teacher`."""

    def __init__(
        self, teacher: Distribution | None = None, *, max_model_len: int | None = 64, max_logprobs: int = 16
    ) -> None:
        self.teacher = teacher or random_teacher()
        self.max_model_len, self.max_logprobs = max_model_len, max_logprobs
        self.spoil: Spoil = lambda request, answer: answer
        self.refuse: list[int] = []
        self.tokenize: Callable[[str], list[int]] | None = None
        self.scored: list[list[int]] = []
        self.sampled: list[list[int]] = []
        self.keys: set[str | None] = set()
        self._lock = Lock()

    def respond(self, path: str, body: Any, key: str | None = None) -> tuple[int, Any]:
        with self._lock:
            self.keys.add(key)
            if path == "/v1/models":
                return 200, {"data": [{"id": "teacher", "max_model_len": self.max_model_len, "parent": None}]}
            if path == "/tokenize" and self.tokenize is not None:
                return 200, {"tokens": self.tokenize(body["prompt"])}
            if path != "/v1/completions":
                return 404, {"error": {"message": "Not Found"}}
            if self.refuse:
                return self.refuse.pop(0), {"error": {"message": "EngineCore encountered an issue"}}
            return self._complete(body)

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        ids, k = body["prompt"], body.get("prompt_logprobs", body.get("logprobs"))
        vocab_size = len(self.teacher(()))
        if body["model"] != "teacher":
            return 404, {"error": {"message": "The model does not exist."}}
        if max(ids) >= vocab_size:
            return 400, {"error": {"message": f"Token id {max(ids)} is out of vocabulary"}}
        if k > self.max_logprobs:
            return 400, {"error": {"message": f"Requested {k}, which is greater than max allowed: {self.max_logprobs}"}}
        if self.max_model_len and len(ids) >= self.max_model_len:
            return 400, {"error": {"message": f"maximum context length is {self.max_model_len} tokens"}}
        if "stop_token_ids" in body:
            choice: dict[str, Any] = self._sample(body)
        elif "logprobs" in body:
            best = self.teacher(tuple(ids))
            top = {f"token_id:{i}": float(best[i]) for i in np.argsort(-best)[:k]}
            choice = {"logprobs": {"top_logprobs": [top]}}
        else:
            self.scored.append(ids)
            self.teacher(tuple(ids[:-1]))  # first: a model that is asked about this has computed all that is in it
            rows = [None] + [self._row(ids[:i], ids[i], k) for i in range(1, len(ids))]
            choice = {"prompt_logprobs": rows, "prompt_token_ids": ids}
        return 200, self.spoil(body, {"choices": [choice]})

    def _sample(self, body: dict[str, Any]) -> dict[str, Any]:
        """A completion, a function of the prompt and the seed."""
        generator, tokens, logprobs = np.random.default_rng(body["seed"]), [], []
        while len(tokens) < body["max_tokens"] and (not tokens or tokens[-1] not in body["stop_token_ids"]):
            values = self.teacher((*body["prompt"], *tokens))
            tokens.append(int(np.argmax(values / body["temperature"] + generator.gumbel(size=len(values)))))
            logprobs.append(float(values[tokens[-1]]))
        self.sampled.append(body["prompt"])
        reason = "stop" if tokens[-1] in body["stop_token_ids"] else "length"
        return {"finish_reason": reason, "token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}

    def _row(self, prefix: Sequence[int], token: int, k: int) -> dict[str, Any]:
        values = self.teacher(tuple(prefix))
        order = np.argsort(-values, kind="stable")
        rank = int(np.flatnonzero(order == token)[0]) + 1
        entries = [(token, rank)] + [(int(order[r]), r + 1) for r in range(k) if order[r] != token]
        return {
            str(i): {"logprob": max(float(values[i]), -9999.0), "rank": r, "decoded_token": "x"} for i, r in entries
        }

    @property
    def transport(self) -> httpx.MockTransport:
        def handler(request: httpx.Request) -> httpx.Response:
            body = json.loads(request.content) if request.content else None
            status, answer = self.respond(request.url.path, body, request.headers.get("Authorization"))
            return httpx.Response(status, content=json.dumps(answer))

        return httpx.MockTransport(handler)


def behind_urls(*fakes: FakeServer) -> tuple[list[str], httpx.AsyncBaseTransport]:
    """An address for each of them, and the transport that leads there."""
    hosts = {f"h{i}": fake.transport for i, fake in enumerate(fakes)}

    class ByHost(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            return await hosts[request.url.host].handle_async_request(request)

    return [f"http://{host}:1" for host in hosts], ByHost()


class FakeSwift(FakeServer):
    """`swift deploy` of ms-swift 4.6: faults are spoilt into vLLM's form before it is put into this one."""

    def __init__(self, teacher: Distribution | None = None, *, api_key: str | None = None, **limits: Any) -> None:
        super().__init__(teacher, **limits)
        self.api_key = api_key
        self.template: list[int] = []  # tokens that it puts in front
        self.asked: list[str] = []

    def respond(self, path: str, body: Any, key: str | None = None) -> tuple[int, Any]:
        self.asked.append(path)
        if path == "/v1/models":
            return 200, {"data": [{"id": "teacher", "object": "model", "owned_by": "swift"}], "object": "list"}
        if self.api_key and key != f"Bearer {self.api_key}":
            return 400, {"message": "API key error", "object": "error"}
        if path == "/v1/completions":
            return 422, {"detail": [{"loc": ["body", "prompt"], "msg": "Input should be a valid string"}]}
        if path != "/infer/":
            return 404, {"detail": "Not Found"}
        found = []
        for request in body["infer_requests"]:
            asked = self._of_vllm(request, body["request_config"])
            status, answer = super().respond("/v1/completions", asked, key)
            if status != 200:
                return 500, "Internal Server Error"
            found.append(self._of_swift(asked["prompt"], answer["choices"][0]))
        return 200, found

    def _of_vllm(self, request: Any, config: Any) -> dict[str, Any]:
        (message,) = request["messages"]
        assert message["role"] == "assistant"
        assert config["return_details"]
        asked = {"model": "teacher", "prompt": self.template + message["content"]["token_ids"]}
        if "seed" in config:
            asked |= {name: config[name] for name in ("seed", "temperature", "max_tokens")}
            return asked | {"logprobs": 0, "stop_token_ids": [token for (token,) in config["stop"]]}
        if "prompt_logprobs" in config:
            return asked | {"prompt_logprobs": config["prompt_logprobs"]}
        assert config["logprobs"]
        return asked | {"logprobs": config["top_logprobs"]}

    def _of_swift(self, ids: list[int], choice: dict[str, Any]) -> dict[str, Any]:
        tokens, content = choice.get("token_ids", [0]), None
        if "top_logprobs" in choice.get("logprobs", {}):
            (top,) = choice["logprobs"]["top_logprobs"]
            tokens = [int(max(top, key=top.__getitem__).removeprefix("token_id:"))]
            others = [{"token": "x", "logprob": value, "bytes": [120]} for value in top.values()]
            content = [{"token": "x", "logprob": max(top.values()), "bytes": [120], "top_logprobs": others}]
        elif "logprobs" in choice:
            values = choice["logprobs"]["token_logprobs"]
            content = [{"token": "x", "logprob": value, "bytes": [120]} for value in values]
        one = {"index": 0, "message": {"role": "assistant", "content": "x"}, "token_ids": tokens}
        one |= {"finish_reason": choice.get("finish_reason", "length"), "logprobs": content and {"content": content}}
        rows = choice.get("prompt_logprobs")
        return {"model": "teacher", "choices": [one], "prompt_token_ids": ids, "prompt_logprobs": rows}


@contextlib.contextmanager
def serve(fake: FakeServer) -> Iterator[str]:
    """Its URL, on a port of the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, answer = fake.respond(self.path, body, self.headers.get("Authorization"))
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _answer

        def log_message(self, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
