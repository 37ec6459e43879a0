"""One or several servers of one teacher: the top K of sequences, asked for at once and balanced.

    servers = TeacherServers(urls, needs, timeout_s=480)         # probes each (probes.py)
    servers.topk([(prompt_ids, completion_ids), ...])            # -> [TopK [C, K], ...], in order
    servers.generate(requests, settings)                         # -> [Completion, ...], in order

Sequences are dealt to the servers by length (rollout/requests.py, `assign`); every server has at most `max_concurrency`
requests under way, and each answer is checked and reduced to its [C, K] arrays as it comes. A request that fails with
the connection or with 500 and above is repeated, with growing pauses, until `retry_s` have passed; all of a call ends
within `timeout_s`. A refusal or a wrong answer ends the call at once: the same question has the same answer.

The weights are the same at all times and on all servers: at the start the servers' canaries are compared with each
other, and after every `topk` and `generate` each server's canary with what it was, BEFORE the result is handed out. So
what a server answered that was restarted with another model is never used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.client import ServerClient
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.rollout.requests import assign
from megatron_gkd.rollout.wire import completion_body, read_completion
from megatron_gkd.teacher_server.probes import COMPLETIONS, TOLERANCE, Needs, Probed, ask_canary, probe_server
from megatron_gkd.teacher_server.wire import TopK, distance, empty_topk, read_topk, topk_body

Answer = TypeVar("Answer")
API_KEY_ENV = "TEACHER_API_KEY"
RETRY_S = 60.0
MAX_CONCURRENCY = 16


class TeacherServers:
    """One rank's connections to all servers of the teacher."""

    def __init__(
        self,
        urls: Sequence[str],
        needs: Needs,
        *,
        timeout_s: float,
        retry_s: float = RETRY_S,
        max_concurrency: int = MAX_CONCURRENCY,
        first: int = 0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Connect and probe.

        Args:
            timeout_s: of each call of this class; retry_s: how long a server that fails is tried again.
            first: the server that is dealt the first and longest sequence; ranks that differ in it load them evenly.
        """
        self.needs = needs
        self._clients = [
            ServerClient(
                url,
                api_key=os.environ.get(API_KEY_ENV),
                api_key_env=API_KEY_ENV,
                timeout_s=timeout_s,
                retry_s=retry_s,
                max_concurrency=max_concurrency,
                transport=transport,
                role="teacher server",
                script="launch/teacher_server.sh",
            )
            for url in [*urls[first % len(urls) :], *urls[: first % len(urls)]]
        ]
        try:
            self._probed = [probe_server(client, needs) for client in self._clients]
            self._check_one_teacher()
        except BaseException:
            self.close()
            raise

    def topk(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[TopK]:
        """The teacher's top K at the loss tokens of (prompt, completion) sequences: [C, K] each, in order."""
        found: list[TopK] = [empty_topk(self.needs.topk) for _ in sequences]
        asked = [index for index, (_, completion) in enumerate(sequences) if len(completion)]
        costs = [len(sequences[index][0]) + len(sequences[index][1]) for index in asked]

        def start(client: ServerClient, probed: Probed, dealt: Sequence[int]) -> Future[list[TopK]]:
            return self._start(client, probed, [sequences[asked[i]] for i in dealt])

        for index, topk in zip(asked, self._balanced(costs, start), strict=True):
            found[index] = topk
        return found

    def generate(self, requests: Sequence[Request], settings: SamplingSettings) -> list[Completion]:
        """Completions that the teacher samples, in the order of the requests. They end at the stop tokens of the
        settings alone, and at the longest sequence that was asked about at the start.
        """

        def start(client: ServerClient, probed: Probed, dealt: Sequence[int]) -> Future[list[Completion]]:
            mine = [requests[i] for i in dealt]
            for request in mine:
                self._check_length(client, len(request.prompt_ids) + 1)
            bodies = [
                {"model": probed.model} | completion_body(request, settings, self.needs.longest) for request in mine
            ]

            def read(index: int, answer: Any) -> Completion:
                return read_completion(mine[index], answer, 0, client.name)

            return client.start_all(COMPLETIONS, f"sample {len(bodies)} completions", bodies, read)

        return self._balanced([len(request.prompt_ids) + request.max_tokens for request in requests], start)

    @property
    def probed(self) -> Probed:
        """What the first of the servers was found to be; the others are the same teacher."""
        return self._probed[0]

    def close(self) -> None:
        """Let go of the servers; they keep running. Idempotent."""
        for client in self._clients:
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _balanced(
        self, costs: Sequence[int], start: Callable[[ServerClient, Probed, Sequence[int]], Future[list[Answer]]]
    ) -> list[Answer]:
        """One answer per cost, in order. `start` asks a server for the answers of those that are dealt to it."""
        found: dict[int, Answer] = {}
        work: list[tuple[ServerClient, Probed, list[int], Future[list[Answer]]]] = []
        try:
            for client, probed, dealt in zip(
                self._clients, self._probed, assign(costs, len(self._clients)), strict=True
            ):
                if dealt:
                    work.append((client, probed, dealt, start(client, probed, dealt)))
            for _, _, dealt, future in work:
                found.update(zip(dealt, future.result(), strict=True))
        finally:
            for *_, future in work:
                future.cancel()
        for client, probed, _, _ in work:
            self._check_unchanged(client, probed)
        return [found[index] for index in range(len(costs))]

    def _start(
        self, client: ServerClient, probed: Probed, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Future[list[TopK]]:
        whole = [[*prompt, *completion] for prompt, completion in sequences]
        for ids in whole:
            self._check_length(client, len(ids))
        bodies = [topk_body(probed.model, ids, self.needs.topk) for ids in whole]
        read = partial(self._read, client.name, sequences, whole)
        return client.start_all(COMPLETIONS, f"score {len(bodies)} sequences", bodies, read)

    def _read(
        self,
        name: str,
        sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
        whole: Sequence[Sequence[int]],
        index: int,
        answer: Any,
    ) -> TopK:
        return read_topk(answer, whole[index], len(sequences[index][0]), self.needs.topk, self.needs.vocab_size, name)

    def _check_length(self, client: ServerClient, num_tokens: int) -> None:
        if num_tokens > self.needs.longest:
            raise RolloutError(
                f"a sequence of {num_tokens} tokens is longer than the {self.needs.longest} that {client.name} was "
                "asked about at the start"
            )

    def _check_one_teacher(self) -> None:
        for client, probed in zip(self._clients[1:], self._probed[1:], strict=True):
            apart = distance(self._probed[0].canary, probed.canary)
            if not apart <= TOLERANCE:
                raise RolloutError(
                    f"{self._clients[0].name} and {client.name} are different teachers: their distributions of a probe "
                    f"differ by {apart:.2g} (mean total variation); start all servers with one model"
                )

    def _check_unchanged(self, client: ServerClient, probed: Probed) -> None:
        apart = distance(probed.canary, ask_canary(client, probed.model, self.needs))
        if not apart <= TOLERANCE:
            raise RolloutError(
                f"{client.name} is another teacher than at the start of the run: its distribution of a probe has moved "
                f"by {apart:.2g} (mean total variation); its answers were not used. Start it with the model of the run "
                "and resume"
            )
