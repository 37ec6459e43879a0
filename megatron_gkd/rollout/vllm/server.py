"""A vLLM server as a sampling engine: protocol.Engine over HTTP.

An update of the weights, as calls of the server (worker methods are in worker.py, called through /collective_rpc):

    begin    /pause?mode=wait, /update_weight_version "...-incomplete", gkd_begin
    bucket   the tensors by a Transfer (shared memory, or a process group), gkd_bucket_file or gkd_bucket_group
    end      gkd_end, /reset_prefix_cache, /update_weight_version, /resume, /weight_info
    abort    gkd_abort; the server stays paused, so that nobody samples from a mixture of weights

Ownership of the weights: every engine object stamps its updates with its own random name and the policy version. Before
and after each `generate` and `score` the server's stamp is compared with the last one set here. This detects a server
that was restarted, that another trainer pushed to, or whose update was left open, before a sample is used. A change
under the same stamp is detected by the number of updates that the workers have begun.

Sampling is one request per completion (wire.py), all in parallel. A completion is a function of weights, settings and
request, so a request is retried if the connection failed; calls that change the server are not.

The endpoints for weights need VLLM_SERVER_DEV_MODE=1 and the worker extension, as launch/rollout_server.sh and
LocalServer start it. With `read_weights` a plain `vllm serve` is enough, but cannot be updated. Supported: vllm 0.28 to
0.32. Not supported: data-parallel servers (start several).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx
import torch

from megatron_gkd.architecture import read_architecture
from megatron_gkd.config.dtypes import LONG_NAMES, Dtype
from megatron_gkd.config.secret import Secret
from megatron_gkd.errors import RolloutError
from megatron_gkd.records import SeenSequence
from megatron_gkd.rollout.client import UNIX, ServerAnswerError, ServerClient
from megatron_gkd.rollout.gate import read_secret, rollout_secret
from megatron_gkd.rollout.image_wire import (
    FLAGS,
    PATH,
    image_completion_body,
    image_topk_body,
    read_image_completion,
    read_image_scores,
)
from megatron_gkd.rollout.protocol import DEFAULT_TIMEOUT_S, Completion, Request, SamplingSettings
from megatron_gkd.rollout.state import EngineState
from megatron_gkd.rollout.vllm.local_server import SECRET_NAME, LocalServer, as_flags
from megatron_gkd.rollout.weight_transfer import GroupTransfer, ShmTransfer, Transfer, can_be_read_by
from megatron_gkd.rollout.wire import (
    completion_body,
    probe_body,
    read_cached_tokens,
    read_completion,
    read_scores,
    score_body,
)

Result = TypeVar("Result")
WeightTransfer = Literal["auto", "shm", "group"]
UNTOUCHED = "default"  # what vLLM says of weights that nobody updated
_START = "start the server with launch/rollout_server.sh"


class ServerEngine(AbstractContextManager["ServerEngine"]):
    """protocol.Engine for the server at a URL, driven by one rank."""

    def __init__(
        self,
        base_url: str,
        *,
        model_path: str,
        dtype: Dtype,
        read_weights: bool = False,
        sleep_level: int = 0,
        weight_transfer: WeightTransfer = "auto",
        api_key_env: str = "VLLM_API_KEY",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry_s: float = 20.0,
        connect_s: float | None = None,
        max_concurrency: int = 256,
        transport: httpx.AsyncBaseTransport | None = None,
        secret: Secret | None = None,
    ) -> None:
        """Connect, and check that this engine can drive the server and that it has the right model.

        Args:
            model_path: the Hugging Face directory of the model that is pushed, or that the server was started with.
            read_weights: sample from the weights that the server was started with (version 0).
            weight_transfer: "auto" is "shm" if the server's workers see this machine's shared memory, else "group".
            api_key_env: environment variable with the server's API key, if it has one.
            secret: the server's secret (gate.py); None: the one beside its socket, or this user's.
            timeout_s: of each call; retry_s: how long an unreachable server is retried.
            connect_s: the same for the first connection, when it may still be starting; None: retry_s.
        """
        self._client = ServerClient(
            base_url,
            api_key=os.environ.get(api_key_env),
            api_key_env=api_key_env,
            timeout_s=timeout_s,
            retry_s=retry_s if connect_s is None else connect_s,
            max_concurrency=max_concurrency,
            transport=transport,
            secret=secret or _secret_of(base_url),
        )
        self._timeout_s = timeout_s
        self._sleep_level = sleep_level
        self._weight_transfer: WeightTransfer = weight_transfer
        self._transfer: Transfer | None = None
        self._num_sent = 0
        self._sees_images = "vision_config" in _config(model_path)
        self._token = secrets.token_hex(6)
        self._stamp: str | None = UNTOUCHED  # what the server has to say of its weights; None: it says nothing
        self._updates: list[int] | None = None  # begun since the server was started, by worker, as this object left it
        self._state = EngineState(self._client.name, version=0 if read_weights else None, sleep_level=sleep_level)
        try:
            self.max_model_len = self._connect()
            self._client.retry_s = retry_s
            self._workers = self._workers_info(required=not read_weights)
            _check_workers(self._client.name, self._workers, model_path, dtype)
            if read_weights:
                self._expect_untouched()
                self._updates = [worker["updates"] for worker in self._workers] or None
        except BaseException:
            self._client.close()
            raise

    @property
    def version(self) -> int | None:
        """Policy version of the weights; None where they are not a complete update's."""
        return self._state.version

    # ---- weights ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        if not self._workers:
            raise RolloutError(f"{self._client.name} cannot be updated: it lacks the worker extension; {_START}")
        with self._state.begin():
            self._client.post("/pause?mode=wait", "finish its requests and pause")
            self._updates = None
            self._set_stamp(f"gkd-{self._token}-incomplete")
            if any(worker["updating"] for worker in self._workers_info(required=True)):  # its pusher is gone
                self._call("gkd_abort", [], "leave an update that was never finished", list)
            self._call("gkd_begin", [], "begin an update", list)
            self._transfer = self._transfer or self._make_transfer()
            self._num_sent = 0

    def bucket(self, tensors: Sequence[tuple[str, torch.Tensor]], sums: Mapping[str, tuple[int, int]]) -> None:
        """Returns while the workers still load it; their errors are raised by the next `bucket` or by `end`."""
        with self._state.bucket():
            assert self._transfer is not None
            if tensors:
                self._transfer.send(tensors, sums)
                self._num_sent += len(tensors)

    def end(self, version: int) -> None:
        with self._state.end(version):
            assert self._transfer is not None
            self._transfer.finish()
            loaded = self._call("gkd_end", [], f"end the update to version {version}", _read_texts)
            if set(loaded) != {str(self._num_sent)}:
                raise RolloutError(
                    f"{self._client.name} took {loaded} tensors (by worker), and {self._num_sent} were sent"
                )
            if not self._client.post("/reset_prefix_cache", "drop its cached prefixes", read=itemgetter("success")):
                raise RolloutError(f"{self._client.name} did not drop its cached prefixes: requests are still running")
            if self._sees_images:  # else the rows of images that were seen before are the old tower's
                self._client.post("/reset_encoder_cache", "drop what it made of images")
            self._set_stamp(f"gkd-{self._token}-{version}")
            self._updates = [worker["updates"] for worker in self._workers_info(required=True)]
            if self._state.memory == "awake":
                self._client.post("/resume", "resume")
            self._check_stamp("after the update")

    def received(self) -> dict[str, tuple[tuple[int, int], float]]:
        def read(results: list[Any]) -> dict[str, tuple[tuple[int, int], float]]:
            return {name: ((sums[0], sums[1]), norm) for name, (sums, norm) in results[0].items()}

        most = 2**20 + len(self._workers) * self._num_sent * 1024
        return self._call("gkd_received", [], "say which tensors it received", read, most)

    def abort(self) -> None:
        with self._state.abort() as unfinished:
            if unfinished:
                if self._transfer is not None:
                    self._transfer.cancel()
                if any(worker["updating"] for worker in self._workers_info(required=True)):
                    self._call("gkd_abort", [], "abort an update", list)

    # ---- sampling --------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], settings: SamplingSettings) -> list[Completion]:
        for request in requests:
            self._check_length(request.prompt_ids, f"the prompt of request {request.key}")
        with_images = [index for index, request in enumerate(requests) if request.pictures]
        of_text = [index for index, request in enumerate(requests) if not request.pictures]
        found: dict[int, Completion] = {}
        if of_text or not with_images:
            found |= zip(of_text, self._sample([requests[i] for i in of_text], settings), strict=True)
        if with_images:
            found |= zip(with_images, self._sample_seeing([requests[i] for i in with_images], settings), strict=True)
        return [found[index] for index in range(len(requests))]

    def _sample(self, requests: Sequence[Request], settings: SamplingSettings) -> list[Completion]:
        bodies = [completion_body(request, settings, self.max_model_len) for request in requests]

        def read(index: int, answer: Any, version: int) -> Completion:
            return read_completion(requests[index], answer, version, self._client.name)

        return self._complete(f"sample {len(requests)} completions", bodies, read)

    def _sample_seeing(self, requests: Sequence[Request], settings: SamplingSettings) -> list[Completion]:
        """For prompts with images."""
        bodies = [image_completion_body(request, settings, self.max_model_len) for request in requests]

        def read(index: int, answer: Any, version: int) -> Completion:
            return read_image_completion(requests[index], answer, version, self._client.name)

        try:
            return self._complete(f"sample {len(requests)} completions of prompts with images", bodies, read, PATH)
        except ServerAnswerError as error:
            if error.status not in (403, 404):
                raise
            raise RolloutError(f"{error}: it does not take images; start it with {FLAGS}") from None

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        for index, ids in enumerate(sequences):
            self._check_length(ids, f"sequence {index}")

        of_text = [ids for ids in sequences if not isinstance(ids, SeenSequence)]
        seen = [ids for ids in sequences if isinstance(ids, SeenSequence)]

        def read(index: int, answer: Any, _: int) -> list[float]:
            return read_scores(of_text[index], answer, self._client.name)

        def read_seen(index: int, answer: Any, _: int) -> list[float]:
            return read_image_scores(seen[index], answer, self._client.name)

        what = f"score {len(sequences)} sequences"
        scores = self._complete(what, [score_body(ids) for ids in of_text], read)
        of_seen: list[list[float]] = []
        if seen:
            bodies = [image_topk_body(ids.bare_ids, ids.pictures, 0) for ids in seen]
            of_seen = self._complete(f"score {len(seen)} sequences with images", bodies, read_seen, PATH)
        in_order = {False: iter(scores), True: iter(of_seen)}
        return [next(in_order[isinstance(ids, SeenSequence)]) for ids in sequences]

    def cached_tokens(self, prompt: Sequence[int]) -> int:
        self._check_length(prompt, "the prompt")

        def read(_: int, answer: Any, __: int) -> int:
            return read_cached_tokens(answer, self._client.name)

        (cached,) = self._complete("sample a token", [probe_body(prompt)], read)
        return cached

    def _complete(
        self,
        what: str,
        bodies: list[dict[str, Any]],
        read: Callable[[int, Any, int], Result],
        path: str = "/v1/completions",
    ) -> list[Result]:
        """The results of `read(index, answer, version of the weights)` for the server's answers."""
        with self._state.sampling(what) as version:
            self._check_stamp("before it sampled")
            paused = self._stamp is not None and self._client.get(
                "/is_paused", "say whether it is paused", read=itemgetter("is_paused")
            )
            if paused:
                raise RolloutError(f"{self._client.name} is paused, by another process, and would not {what}")
            results: list[Result] = self._client.post_all(
                path, what, bodies, lambda index, answer: read(index, answer, version)
            )
            self._check_stamp("while it sampled")
        return results

    # ---- life ------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        if self._sleep_level > 0:
            with self._state.sleep():
                self._client.post(f"/sleep?level={self._sleep_level}&mode=wait", "sleep")

    def wake_weights(self) -> None:
        if self._state.memory == "asleep":
            with self._state.wake_weights():
                self._client.post("/wake_up?tags=weights", "wake its weights")

    def wake_kv(self) -> None:
        if self._state.memory != "awake":
            with self._state.wake_kv():
                self._client.post("/wake_up?tags=kv_cache", "wake its KV cache")
                self._client.post("/resume", "resume")

    def close(self) -> None:
        """Disconnect; the server keeps running with its weights."""
        if self._state.close():
            if self._transfer is not None:
                self._transfer.close()
            self._client.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- connection ------------------------------------------------------------------------------------------------

    def _connect(self) -> int:
        """The server's max_model_len."""
        self._client.get("/health", "say whether it is well")

        def read(answer: Any) -> list[int]:
            return [int(model["max_model_len"]) for model in answer["data"] if model.get("max_model_len")]

        lengths = self._client.get("/v1/models", "name its model", read=read)
        if not lengths:
            raise RolloutError(f"{self._client.name} lists no model with a max_model_len; start a vLLM server")
        return int(lengths[0])

    def _workers_info(self, *, required: bool) -> list[dict[str, Any]]:
        """Each worker's description; empty if the server has no worker extension and none is required."""
        try:
            return self._call("gkd_info", [], "describe its workers", _read_workers)
        except ServerAnswerError as error:
            if error.status not in (404, 405) and "gkd_info" not in str(error):
                raise
            if not required:
                return []
            lacks = (
                "the development endpoints (VLLM_SERVER_DEV_MODE=1)"
                if error.status in (404, 405)
                else "the worker extension (--worker-extension-cls megatron_gkd.rollout.vllm.worker.RolloutWorker)"
            )
            raise RolloutError(
                f"{self._client.name} lacks {lacks}, so no weights can be pushed to it; {_START}"
            ) from None

    def _expect_untouched(self) -> None:
        """For `read_weights`: check that nobody has pushed weights. A server without the endpoint cannot be pushed
        to."""
        try:
            found = self._stamp_now()
        except ServerAnswerError as error:
            if error.status != 404:
                raise
            self._stamp = None
            return
        if found != UNTOUCHED:
            raise RolloutError(
                f"{self._client.name} holds weights that were pushed to it ({found}), not those that it was started "
                "with; start it again"
            )

    def _make_transfer(self) -> Transfer:
        way = self._weight_transfer
        if way == "auto":
            way = "shm" if can_be_read_by(self._start_call) else "group"
        if way == "shm":
            return ShmTransfer(self._start_call)
        on_gpus = torch.cuda.is_available() and all(worker["device"] == "cuda" for worker in self._workers)
        return GroupTransfer(
            self._start_call,
            server_host=self._client.host,
            num_workers=len(self._workers),
            backend="nccl" if on_gpus else "gloo",
            device=torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu"),
            timeout_s=self._timeout_s,
        )

    def _call(
        self, method: str, arguments: list[Any], what: str, read: Callable[[Any], Result], most: int | None = None
    ) -> Result:
        """What `read` extracts from the workers' answers, of at most `most` bytes, to a method of worker.py."""
        body = {"method": method, "args": arguments}
        result: Result = self._client.post(
            "/collective_rpc", what, body, read=lambda answer: read(answer["results"]), most=most
        )
        return result

    def _start_call(self, method: str, arguments: list[Any], what: str) -> Any:
        return self._client.start("/collective_rpc", what, {"method": method, "args": arguments})

    # ---- versions --------------------------------------------------------------------------------------------------

    def _stamp_now(self) -> str:
        what = "name the version of its weights"
        return str(self._client.get("/weight_info", what, read=itemgetter("weight_version")))

    def _set_stamp(self, stamp: str) -> None:
        self._client.post("/update_weight_version", f"take the version {stamp}", {"new_version": stamp})
        self._stamp = stamp

    def _check_stamp(self, when: str) -> None:
        if self._stamp is not None and (found := self._stamp_now()) != self._stamp:
            self._state.lose_weights()
            raise RolloutError(
                f"{self._client.name} held other weights {when}: version {found}, and {self._stamp} is needed; it was "
                "restarted, or another process pushes to it. Give every run a server of its own; a complete update "
                "sets it right"
            )
        if self._updates is None:
            return
        workers = self._workers_info(required=True)
        if [w["updates"] for w in workers] != self._updates or any(w["updating"] for w in workers):
            self._state.lose_weights()
            raise RolloutError(
                f"{self._client.name} has begun an update {when} that this run has not asked for, under the version "
                f"{self._stamp}: another process pushes to it. Give every run a server of its own"
            )

    def _check_length(self, ids: Sequence[int], which: str) -> None:
        if not 1 <= len(ids) < self.max_model_len:
            raise RolloutError(
                f"{which} has {len(ids)} tokens; {self._client.name} takes 1 to {self.max_model_len - 1}, one less "
                "than its max_model_len (--max-model-len of the server)"
            )


class SubprocessEngine(ServerEngine):
    """An engine with its own server, which this process starts (local_server.py) and which ends with the engine."""

    def __init__(
        self,
        model_path: str,
        *,
        dtype: Dtype,
        max_model_len: int | None = None,
        read_weights: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        engine_options: Mapping[str, Any] | None = None,
        **of_server: Any,
    ) -> None:
        """`max_model_len` is limited to the model's own; a server takes prompts of one token less. `engine_options`:
        further arguments of vLLM, by its names. `of_server`: other arguments of LocalServer."""
        longest = read_architecture(model_path).max_position_embeddings
        self._server = LocalServer(
            model_path,
            dtype=dtype,
            max_model_len=min(max_model_len or longest, longest),
            read_weights=read_weights,
            extra=as_flags(engine_options or {}),
            **of_server,
        )
        try:
            super().__init__(
                self._server.url,
                model_path=model_path,
                dtype=dtype,
                read_weights=read_weights,
                timeout_s=timeout_s,
                secret=read_secret(self._server.secret_file),
            )
        except BaseException:
            self._server.close()
            raise

    def close(self) -> None:
        """End the server too."""
        super().close()
        self._server.close()


_SHORT_NAMES = {long: short for short, long in LONG_NAMES.items()}


def _read_workers(results: Any) -> list[dict[str, Any]]:
    """`gkd_info` of each worker (worker.py)."""
    names = ("rank", "device", "dtype", "model", "updating", "updates")
    return [{name: worker[name] for name in names} | {"config": dict(worker["config"])} for worker in results]


def _secret_of(base_url: str) -> Secret | None:
    if not base_url.startswith(UNIX):
        return rollout_secret()
    beside = Path(base_url.removeprefix(UNIX)).with_name(SECRET_NAME)
    return read_secret(beside) if beside.exists() else None


def _config(model_path: str) -> dict[str, Any]:
    """config.json as written; empty if there is none."""
    file = Path(model_path) / "config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _read_texts(results: Any) -> list[str]:
    return [str(result) for result in results]


def _check_workers(name: str, workers: Sequence[dict[str, Any]], model_path: str, dtype: str) -> None:
    """Check that it is one model replica with this dtype and these shapes."""
    ranks = sorted(worker["rank"] for worker in workers)
    if ranks != list(range(len(workers))):
        raise RolloutError(f"{name} has workers of ranks {ranks}: it is data parallel; start several servers instead")
    config = _config(model_path) if workers else {}
    if "vision_config" in config:  # what workers say is of the decoder; the top level says whether its head is tied
        config = {**config.get("text_config", {**config, "model_type": None}), "tie_word_embeddings": None}
    for worker in workers[:1]:
        if worker["dtype"] != LONG_NAMES[dtype]:
            raise RolloutError(
                f"{name} computes in {worker['dtype']}, and {LONG_NAMES[dtype]} is needed: start it with DTYPE={dtype} "
                f"launch/rollout_server.sh (vllm serve --dtype {LONG_NAMES[dtype]}), or give --dtype "
                f"{_SHORT_NAMES.get(worker['dtype'], worker['dtype'])} here"
            )
        for field, value in worker["config"].items():
            if None not in (value, config.get(field)) and config[field] != value:
                raise RolloutError(
                    f"{name} has another model ({worker['model']}): {field} is {value} there and {config[field]} in "
                    f"{model_path}; start it with that model"
                )
