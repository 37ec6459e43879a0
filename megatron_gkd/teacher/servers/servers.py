"""The servers of one or several teachers: requests the top K of sequences in parallel, with balanced load.

    servers = TeacherServers(urls, needs, timeout_s=480)         # probes each (probes.py)
    servers.topk([(prompt_ids, completion_ids), ...])            # -> [TopK [C, K], ...], in order
    pending = servers.start(sequences, tags)                     # the same without waiting
    pending.result()
    servers.generate(requests, settings)                         # completions of one teacher, in order

With `tags` a sequence goes to the servers of its tag, else to those without tags. Servers with the same tag (or without
tags) are one teacher; others may be different models. The sequences of a tag are dealt to its servers by length
(rollout/requests.py, `assign`). Every server has at most `max_concurrency` requests in flight, and each answer is
checked and reduced to its [C, K] arrays when it arrives. A request is retried after a connection error or a status of
500 and above, with growing pauses, for up to `retry_s`. Each call ends within `timeout_s`. A refusal or a wrong answer
ends the call at once, because a retry would get the same answer.

The weights must be the same at all times and on all servers of a teacher. At the start the servers' canaries are
compared with each other. After every call each server's canary is compared with its first one, BEFORE the result is
returned. So answers of a server that was restarted with another model are never used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx

from megatron_gkd.data.image_tokens import ImageTokens
from megatron_gkd.data.pictures import striped_picture
from megatron_gkd.errors import RolloutError
from megatron_gkd.records import Picture
from megatron_gkd.rollout import image_wire
from megatron_gkd.rollout.answers import most_bytes
from megatron_gkd.rollout.client import ServerAnswerError, ServerClient
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.rollout.requests import assign
from megatron_gkd.teacher.servers.probes import TOLERANCE, Probed, ServerRequirements, ask_canary, probe_server
from megatron_gkd.teacher.servers.wire import VLLM, TopK, distance, empty_topk

API_KEY_ENV = "TEACHER_API_KEY"
RETRY_S = 60.0
MAX_CONCURRENCY = 16

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]  # prompt ids, completion ids


class Seen(NamedTuple):
    """The images of a sequence's prompt."""

    bare_ids: Sequence[int]  # the prompt with one placeholder for each
    pictures: Sequence[Picture]


@dataclass(frozen=True, eq=False)
class _Server:
    client: ServerClient
    probed: Probed
    tags: tuple[str, ...]


class _Part(NamedTuple):
    """What one server was asked."""

    server: _Server
    indices: list[int]  # into the call's sequences
    future: Future[list[TopK]]


@dataclass(frozen=True)
class PendingAnswers:
    """A call in flight on the connections' threads."""

    found: list[TopK]  # of sequences without loss tokens already
    parts: tuple[_Part, ...]
    check_unchanged: Callable[[_Server], None]

    def result(self) -> list[TopK]:
        """Wait for all answers, and check that the teachers are still the same. Raises RolloutError."""
        found = list(self.found)
        try:
            for part in self.parts:
                for index, topk in zip(part.indices, part.future.result(), strict=True):
                    found[index] = topk
        finally:
            self.cancel()
        for part in self.parts:
            self.check_unchanged(part.server)
        return found

    def cancel(self) -> None:
        """Cancel the requests that are not answered yet."""
        for part in self.parts:
            part.future.cancel()


class TeacherServers(AbstractContextManager["TeacherServers"]):
    """One rank's connections to all servers of the teacher, or teachers."""

    def __init__(
        self,
        urls: Sequence[str],
        needs: ServerRequirements,
        *,
        timeout_s: float,
        retry_s: float = RETRY_S,
        max_concurrency: int = MAX_CONCURRENCY,
        first: int = 0,
        transport: httpx.AsyncBaseTransport | None = None,
        tags: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Connect and probe.

        Args:
            tags: URL -> the tags whose sequences it scores, () for the rest; None: all servers are one teacher.
            timeout_s: of each call of this class; retry_s: how long a server that fails is tried again.
            first: the server that is dealt the first and longest sequence; ranks that differ in it load them evenly.
        """
        self.needs, self._first, self._has_tags = needs, first, bool(tags)
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
            for url in urls
        ]
        try:
            self._servers = [
                _Server(client, probe_server(client, needs), (tags or {}).get(url, ()))
                for url, client in zip(urls, self._clients, strict=True)
            ]
            for tag in dict.fromkeys(tag for server in self._servers for tag in server.tags or (None,)):
                self._check_one_teacher(self._of_tag(tag))
        except BaseException:
            self.close()
            raise

    def topk(self, sequences: Sequences, tags: Sequence[str | None] | None = None) -> list[TopK]:
        """The teacher's top K at the loss tokens of (prompt, completion) sequences: [C, K] each, in order.

        Args:
            tags: of each sequence; None where the servers have none.
        """
        return self.start(sequences, tags).result()

    def start(
        self,
        sequences: Sequences,
        tags: Sequence[str | None] | None = None,
        seen: Sequence[Seen | None] | None = None,
    ) -> PendingAnswers:
        """`topk` without waiting. Each answer is kept in its [C, K] form. `seen`: each sequence's images; None for text
        alone."""
        found = [empty_topk(self.needs.topk) for _ in sequences]
        by_tag: dict[str | None, list[int]] = {}
        for index, (_, completion) in enumerate(sequences):
            if len(completion):
                by_tag.setdefault(None if tags is None else tags[index], []).append(index)
        mine: list[list[int]] = [[] for _ in self._servers]
        for tag, asked in by_tag.items():
            servers = self._of_tag(tag)
            costs = [len(sequences[index][0]) + len(sequences[index][1]) for index in asked]
            for server, dealt in zip(servers, assign(costs, len(servers)), strict=True):
                mine[self._servers.index(server)] += [asked[i] for i in dealt]
        parts: list[_Part] = []
        try:
            for server, indices in zip(self._servers, mine, strict=True):
                images = {i: of_i for i in indices if seen is not None and (of_i := seen[i]) is not None}
                if of_text := [i for i in indices if i not in images]:
                    parts.append(_Part(server, of_text, self._start(server, [sequences[i] for i in of_text])))
                if images:
                    asked_of = [sequences[i] for i in images]
                    future = self._start_seeing(server, asked_of, list(images.values()))
                    parts.append(_Part(server, list(images), future))
        except BaseException:
            for part in parts:
                part.future.cancel()
            raise
        return PendingAnswers(found, tuple(parts), self._check_unchanged)

    def generate(self, requests: Sequence[Request], settings: SamplingSettings) -> list[Completion]:
        """Completions that the teacher without tags samples, in the order of the requests. They end only at the stop
        tokens of the settings and at the longest sequence checked at the start."""
        servers, found = self._of_tag(None), dict[int, Completion]()
        costs = [len(request.prompt_ids) + request.max_tokens for request in requests]
        work: list[tuple[_Server, list[int], Future[list[Completion]]]] = []
        try:
            for server, dealt in zip(servers, assign(costs, len(servers)), strict=True):
                for has_images in (False, True):
                    if part := [i for i in dealt if bool(requests[i].pictures) is has_images]:
                        sampling = self._sample(server, [requests[i] for i in part], settings)
                        work.append((server, part, sampling))
            for _, dealt, future in work:
                found.update(zip(dealt, future.result(), strict=True))
        finally:
            for *_, future in work:
                future.cancel()
        for server, *_ in work:
            self._check_unchanged(server)
        return [found[index] for index in range(len(requests))]

    @property
    def probed(self) -> Probed:
        """The probe's result for the first server without tags; the others are the same teacher."""
        return self._of_tag(None)[0].probed

    def canaries(self) -> dict[str, TopK]:
        """Tags of a teacher ("" for none) -> its first server's answer to the probe at the start."""
        found: dict[str, TopK] = {}
        for server in self._servers:
            found.setdefault(",".join(sorted(server.tags)), server.probed.canary)
        return found

    def close(self) -> None:
        """Close the connections; the servers keep running. Idempotent."""
        for client in self._clients:
            client.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _of_tag(self, tag: str | None) -> list[_Server]:
        """The servers for a tag's sequences, starting with the one that gets the first of them."""
        servers = [server for server in self._servers if tag in server.tags]
        servers = servers or [server for server in self._servers if not server.tags]
        if not servers:
            raise RolloutError(f"no teacher server has the tag {tag!r}, and none is without tags, for the other rows")
        first = self._first % len(servers)
        return servers[first:] + servers[:first]

    def _sample(
        self, server: _Server, requests: Sequence[Request], settings: SamplingSettings
    ) -> Future[list[Completion]]:
        client, dialect, model = server.client, server.probed.dialect, server.probed.model
        for request in requests:
            self._check_length(client, len(request.prompt_ids) + 1)
        if any(request.pictures for request in requests):
            return self._sample_seeing(server, requests, settings)
        bodies = [dialect.completion_body(model, request, settings, self.needs.longest) for request in requests]

        def read(index: int, answer: Any) -> Completion:
            return dialect.read_completion(requests[index], settings, answer, client.name)

        return client.start_all(dialect.path, f"sample {len(bodies)} completions", bodies, read)

    def _sample_seeing(
        self, server: _Server, requests: Sequence[Request], settings: SamplingSettings
    ) -> Future[list[Completion]]:
        """For prompts that all have images."""
        client, dialect, model = server.client, _which_sees(server), server.probed.model
        bodies = [dialect.image_completion_body(model, request, settings, self.needs.longest) for request in requests]

        def read(index: int, answer: Any) -> Completion:
            return dialect.read_image_completion(requests[index], settings, answer, client.name)

        return client.start_all(image_wire.PATH, f"sample {len(bodies)} completions (with images)", bodies, read)

    def _check_length(self, client: ServerClient, num_tokens: int) -> None:
        if num_tokens > self.needs.longest:
            raise RolloutError(
                f"a sequence of {num_tokens} tokens is longer than the {self.needs.longest} that {client.name} was "
                "asked about at the start"
            )

    def _start(self, server: _Server, sequences: Sequences) -> Future[list[TopK]]:
        client, dialect = server.client, server.probed.dialect
        whole = [[*prompt, *completion] for prompt, completion in sequences]
        for ids in whole:
            self._check_length(client, len(ids))
        bodies = [dialect.topk_body(server.probed.model, ids, self.needs.topk) for ids in whole]

        def read(index: int, answer: Any) -> TopK:
            num_prompt, needs = len(sequences[index][0]), self.needs
            return dialect.read_topk(answer, whole[index], num_prompt, needs.topk, needs.vocab_size, client.name)

        return client.start_all(dialect.path, f"score {len(bodies)} sequences", bodies, read)

    def _start_seeing(self, server: _Server, sequences: Sequences, seen: Sequence[Seen]) -> Future[list[TopK]]:
        """For sequences that all have images."""
        client, needs, dialect = server.client, self.needs, _which_sees(server)
        whole = [[*prompt, *completion] for prompt, completion in sequences]
        for ids in whole:
            self._check_length(client, len(ids))
        bodies = [
            dialect.image_topk_body(server.probed.model, [*one.bare_ids, *completion], one.pictures, needs.topk)
            for one, (_, completion) in zip(seen, sequences, strict=True)
        ]
        most = [most_bytes({"ids": ids, "prompt_logprobs": needs.topk}) for ids in whole]

        def read(index: int, answer: Any) -> TopK:
            num_prompt = len(sequences[index][0])
            return dialect.read_image_topk(answer, whole[index], num_prompt, needs.topk, needs.vocab_size, client.name)

        return client.start_all(image_wire.PATH, f"score {len(bodies)} sequences with images", bodies, read, most)

    def check_images(self, images: ImageTokens) -> None:
        """Check with one image that every server takes images and expands them to the same tokens. Raises
        RolloutError."""
        picture = striped_picture()
        *probe, last = (token for token in self.needs.probe if token != images.image_token_id)
        bare = (images.image_token_id, *probe)
        ids, placed = images.expand(bare, [picture])
        for server in self._servers:
            try:
                self._start_seeing(server, [(ids, (last,))], [Seen(bare, placed)]).result()
            except ServerAnswerError as error:
                raise RolloutError(
                    f"{error}: the rows have images, and it does not take them; start it with {image_wire.FLAGS}"
                ) from None

    def _check_one_teacher(self, servers: Sequence[_Server]) -> None:
        """For servers that share a tag."""
        for other in servers[1:]:
            apart = distance(servers[0].probed.canary, other.probed.canary)
            if not apart <= TOLERANCE:
                same = "one model" if not self._has_tags else "one model, or give them different tags"
                raise RolloutError(
                    f"{servers[0].client.name} and {other.client.name} are different teachers: their distributions of "
                    f"a probe differ by {apart:.2g} (mean total variation); start all servers of a teacher with {same}"
                )

    def _check_unchanged(self, server: _Server) -> None:
        client, probed = server.client, server.probed
        apart = distance(probed.canary, ask_canary(client, probed.dialect, probed.model, self.needs))
        if not apart <= TOLERANCE:
            raise RolloutError(
                f"{client.name} is another teacher than at the start of the run: its distribution of a probe has moved "
                f"by {apart:.2g} (mean total variation); its answers were not used. Start it with the model of the run "
                "and resume"
            )


def _which_sees(server: _Server) -> VLLM:
    """The server's API for images. Raises RolloutError if it takes none."""
    dialect = server.probed.dialect
    if not isinstance(dialect, VLLM):
        raise RolloutError(
            f"{server.client.name} (swift deploy) takes text only, and rows have images; serve the teacher with vLLM "
            "(launch/teacher_server.sh)"
        )
    return dialect
