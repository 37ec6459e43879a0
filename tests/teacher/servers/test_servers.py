"""Probes of teacher servers, and several servers as one teacher, against a server without vLLM
(support/fake_teacher_server.py).

Retries, deadlines and messages of the connection itself: tests/rollout/test_client.py. vLLM: test_vllm.py.
"""

from __future__ import annotations

import copy
import gzip
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.protocol import Request, SamplingSettings
from megatron_gkd.teacher.servers.probes import PROBE_TOKENS, ServerRequirements, probe_tokens
from megatron_gkd.teacher.servers.servers import API_KEY_ENV, TeacherServers
from tests.support.effort import LIMIT_S
from tests.support.fake_teacher_server import VOCAB, FakeServer, behind_urls, random_teacher, serve

NEEDS = ServerRequirements(topk=8, vocab_size=VOCAB, largest_id=VOCAB - 1, longest=40, probe=tuple(range(3, 35)))
SEQUENCES = [((1, 2), (3, 4, 5)), ((9,), ()), ((8, 8, 8), (1,)), ((4,), (5,) * 30), ((VOCAB - 1,), (0, 1))]
Connect = Callable[..., TeacherServers]


@pytest.fixture
def connect() -> Iterator[Connect]:
    opened = []

    def make(*fakes: FakeServer, needs: ServerRequirements = NEEDS, **options: Any) -> TeacherServers:
        urls, transport = behind_urls(*fakes)
        settings = {"timeout_s": 20.0, "retry_s": 1.0, "transport": transport} | options
        servers = TeacherServers(urls, needs, **settings)
        opened.append(servers)
        return servers

    yield make
    for servers in opened:
        servers.close()


def assert_right(found: list[Any], sequences: Any = SEQUENCES, k: int = NEEDS.topk) -> None:
    teacher = random_teacher()
    for (prompt, completion), topk in zip(sequences, found, strict=True):
        assert topk.ids.shape == (len(completion), k)
        for t in range(len(completion)):
            values = teacher((*prompt, *completion[:t]))
            best = np.argsort(-values)[:k]
            assert topk.ids[t].tolist() == best.tolist()
            np.testing.assert_allclose(topk.logprobs[t], values[best], atol=1e-6)


@pytest.mark.parametrize("num_servers", [1, 2, 3])
def test_topk_of_sequences_in_order_over_balanced_servers(connect: Connect, num_servers: int) -> None:
    fakes = [FakeServer() for _ in range(num_servers)]
    servers = connect(*fakes)
    for fake in fakes:
        fake.scored.clear()
    assert_right(servers.topk(SEQUENCES))
    asked = [[ids for ids in fake.scored if ids != list(NEEDS.probe)] for fake in fakes]
    assert sorted(ids for part in asked for ids in part) == sorted([*p, *c] for p, c in SEQUENCES if c), (
        "each once; none without loss tokens"
    )
    assert max(map(len, asked)) - min(map(len, asked)) <= 1
    assert servers.topk([]) == []


def test_over_a_real_connection_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_ENV, "secret")
    fake = FakeServer()
    with serve(fake) as url, TeacherServers([url + "/v1"], NEEDS, timeout_s=20) as servers:
        assert_right(servers.topk(SEQUENCES))
    assert fake.keys == {"Bearer secret"}


def test_the_first_server_can_be_chosen(connect: Connect) -> None:
    fakes = [FakeServer(), FakeServer()]
    servers = connect(*fakes, first=1)
    for fake in fakes:
        fake.scored.clear()
    servers.topk(SEQUENCES[:1])
    assert [len(fake.scored) for fake in fakes] == [0, 2], "the sequence, and the canary"


# ---- several teachers ------------------------------------------------------------------------------------------------

TAGGED = {"http://h0:1": ("math",), "http://h1:1": ("code", "logic"), "http://h2:1": ("math",), "http://h3:1": ()}
TAGS = ["math", "code", "math", None, "logic"]
TEACHERS = {"math": 0, "code": 1, "logic": 1, None: 3}


def asked_of(fake: FakeServer) -> list[list[int]]:
    return [ids for ids in fake.scored if ids != list(NEEDS.probe)]


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_every_sequence_goes_to_the_teacher_of_its_tag(connect: Connect, first: int) -> None:
    """Two servers of one teacher share a tag; the last takes the rest. Each is another distribution."""
    fakes = [FakeServer(random_teacher(seed)) for seed in (0, 1, 0, 3)]
    servers = connect(*fakes, tags=TAGGED, first=first)
    for fake in fakes:
        fake.scored.clear()
    found = servers.topk(SEQUENCES, TAGS)
    for (prompt, completion), tag, topk in zip(SEQUENCES, TAGS, found, strict=True):
        teacher = random_teacher(TEACHERS[tag])
        for t in range(len(completion)):
            assert topk.ids[t].tolist() == np.argsort(-teacher((*prompt, *completion[:t])))[:8].tolist()
    math, code, more_math, rest = map(asked_of, fakes)
    assert sorted(map(len, (math, more_math))) == [1, 1], "balanced"
    assert sorted(math + more_math) == sorted([[1, 2, 3, 4, 5], [8, 8, 8, 1]])
    assert code == [[VOCAB - 1, 0, 1]]
    assert rest == [[4, *[5] * 30]]


def test_a_tag_that_no_server_has_goes_to_the_rest_or_is_refused(connect: Connect) -> None:
    fakes = [FakeServer(random_teacher(seed)) for seed in (0, 1)]
    servers = connect(*fakes, tags={"http://h0:1": ("math",), "http://h1:1": ()})
    fakes[1].scored.clear()
    servers.topk(SEQUENCES[:1], ["poetry"])
    assert asked_of(fakes[1]) == [[1, 2, 3, 4, 5]]
    servers = connect(*fakes, tags={"http://h0:1": ("math",), "http://h1:1": ("code",)})
    with pytest.raises(RolloutError, match=r"no teacher server has the tag 'poetry', and none is without tags"):
        servers.topk(SEQUENCES[:1], ["poetry"])


def test_servers_that_share_a_tag_must_be_one_teacher(connect: Connect) -> None:
    fakes = [FakeServer(random_teacher(seed)) for seed in (0, 1, 1)]
    connect(*fakes, tags={"http://h0:1": ("a",), "http://h1:1": ("b",), "http://h2:1": ("c", "b")})
    with pytest.raises(RolloutError, match=r"h0:1 and .*h2:1 are different teachers.* or give them different tags"):
        connect(*fakes, tags={"http://h0:1": ("a",), "http://h1:1": ("b",), "http://h2:1": ("b", "a")})
    with pytest.raises(RolloutError, match=r"h1:1 are different teachers"):
        connect(*fakes[:2], tags={"http://h0:1": (), "http://h1:1": ()})


# ---- while the caller goes on ----------------------------------------------------------------------------------------


def test_a_call_is_under_way_while_the_caller_goes_on() -> None:
    """Every answer is there before the result is asked for; the canaries are asked then."""
    fake = FakeServer()
    with serve(fake) as url, TeacherServers([url], NEEDS, timeout_s=LIMIT_S) as servers:
        fake.scored.clear()
        asked = servers.start(SEQUENCES)
        until = time.monotonic() + LIMIT_S
        while len(fake.scored) < 4 and time.monotonic() < until:
            time.sleep(0.01)
        assert len(fake.scored) == len(asked_of(fake)) == 4
        assert_right(asked.result())
        assert len(fake.scored) == 5, "and the canary"


def test_what_came_early_is_checked_all_the_same(connect: Connect) -> None:
    fake = FakeServer()
    servers = connect(fake)
    asked = servers.start(SEQUENCES)
    for part in asked.parts:
        part.future.result()
    fake.teacher = random_teacher(5)
    with pytest.raises(RolloutError, match=r"is another teacher than at the start of the run.*not used"):
        asked.result()


def test_a_failure_on_the_way_comes_with_the_result(connect: Connect) -> None:
    fake = FakeServer()
    servers = connect(fake)
    fake.refuse = [400]
    asked = servers.start(SEQUENCES[:1])
    with pytest.raises(RolloutError, match=r"answered 400"):
        asked.result()


# ---- completions -----------------------------------------------------------------------------------------------------

SETTINGS = SamplingSettings(temperature=0.9, stop_token_ids=(7, 8))
REQUESTS = [Request(10 + i, tuple(range(1, 2 + 3 * i)), max_tokens=9 - i, seed=i) for i in range(7)]


@pytest.mark.parametrize("num_servers", [1, 3])
def test_completions_in_order_over_balanced_servers(connect: Connect, num_servers: int) -> None:
    """The same whatever the number of servers; up to a stop token or the limit, each asked for once."""
    fakes = [FakeServer() for _ in range(num_servers)]
    found = connect(*fakes).generate(REQUESTS, SETTINGS)
    assert found == connect(FakeServer()).generate(REQUESTS, SETTINGS)
    assert [completion.key for completion in found] == [request.key for request in REQUESTS]
    for request, completion in zip(REQUESTS, found, strict=True):
        stopped = completion.token_ids[-1] in SETTINGS.stop_token_ids
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert len(completion.token_ids) == request.max_tokens or stopped
    counts = [len(fake.sampled) for fake in fakes]
    assert sum(counts) == len(REQUESTS)
    assert max(counts) - min(counts) <= 1


def test_a_server_that_became_another_teacher_is_found_before_its_completions_are_used(connect: Connect) -> None:
    fake = FakeServer()
    servers = connect(fake)
    servers.generate(REQUESTS, SETTINGS)
    fake.teacher = random_teacher(1)
    with pytest.raises(RolloutError, match="is another teacher than at the start"):
        servers.generate(REQUESTS, SETTINGS)


def test_completions_are_asked_for_again_after_a_failure_and_refused_where_they_are_wrong(connect: Connect) -> None:
    fake = FakeServer()
    servers = connect(fake)
    expected = servers.generate(REQUESTS, SETTINGS)
    fake.refuse = [500, 503, 500]
    assert servers.generate(REQUESTS, SETTINGS) == expected
    with pytest.raises(RolloutError, match="a sequence of 41 tokens is longer than the 40"):
        servers.generate([Request(0, (1,) * 40, 1, 0)], SETTINGS)
    fake.spoil = lambda request, answer: (answer["choices"][0].pop("token_ids", None) and answer) or answer
    with pytest.raises(RolloutError, match="without its token ids"):
        servers.generate(REQUESTS, SETTINGS)


# ---- probes ----------------------------------------------------------------------------------------------------------


def shifted(by: int) -> Callable[[dict[str, Any], Any], Any]:
    """Rows of other positions, with the sequence's own tokens put in so that only the values tell."""

    def spoil(request: dict[str, Any], answer: Any) -> Any:
        choice = answer["choices"][0]
        if "prompt_logprobs" not in choice:
            return answer
        ids, rows = request["prompt"], choice["prompt_logprobs"][1:]
        moved = copy.deepcopy(rows[by:] + rows[:by])
        for row, token in zip(moved, ids[1:], strict=True):
            row.setdefault(str(token), {"logprob": -20.0, "rank": 250})
        choice["prompt_logprobs"] = [None, *moved]
        return answer

    return spoil


@pytest.mark.parametrize("by", [1, -1])
def test_rows_off_by_one_are_found_by_their_values(connect: Connect, by: int) -> None:
    fake = FakeServer()
    fake.spoil = shifted(by)
    with pytest.raises(RolloutError, match=r"not those of its positions: they differ by .* from what it samples"):
        connect(fake)


def test_k_above_the_servers_limit(connect: Connect) -> None:
    with pytest.raises(
        RolloutError, match=r"refuses to return 8 tokens .*greater than max allowed: 7.*MAX_LOGPROBS=8.*gkd_logits_topk"
    ):
        connect(FakeServer(max_logprobs=7))
    connect(FakeServer(max_logprobs=8))


def test_sequences_above_the_servers_length(connect: Connect) -> None:
    with pytest.raises(RolloutError, match=r"takes 40 tokens .* and 41 are needed.*MAX_MODEL_LEN=41.*--max_length"):
        connect(FakeServer(max_model_len=40))
    servers = connect(FakeServer(max_model_len=41))
    with pytest.raises(RolloutError, match=r"a sequence of 41 tokens is longer than the 40"):
        servers.topk([((1,), (2,) * 40)])


def test_a_server_that_hides_its_length_is_asked_with_a_long_sequence(connect: Connect) -> None:
    fake = FakeServer(max_model_len=None)
    connect(fake)
    assert NEEDS.longest in map(len, fake.scored)
    short = FakeServer(max_model_len=None)
    inner = short.respond

    def respond(path: str, body: Any, key: str | None = None) -> tuple[int, Any]:
        if body and len(body.get("prompt", ())) == NEEDS.longest:
            return 400, {"error": {"message": "maximum context length"}}
        return inner(path, body, key)

    short.respond = respond  # type: ignore[method-assign]
    with pytest.raises(
        RolloutError, match=r"maximum context length.*score the longest sequence, 40 tokens.*--max_length"
    ):
        connect(short)


def test_a_smaller_vocabulary(connect: Connect) -> None:
    with pytest.raises(RolloutError, match=r"refuses token id 299, the largest .* another vocabulary"):
        connect(FakeServer(random_teacher(vocab_size=299)))


def test_a_larger_vocabulary(connect: Connect) -> None:
    with pytest.raises(RolloutError, match=r"token .* is among .* vocabulary has 300: it serves a model with another"):
        connect(FakeServer(random_teacher(vocab_size=3000)))


def test_another_tokenizer(connect: Connect) -> None:
    fake = FakeServer()
    fake.tokenize = lambda text: list(text.encode())
    connect(fake, needs=replace(NEEDS, encode=lambda text: list(text.encode())))
    with pytest.raises(RolloutError, match=r"another tokenizer than the student"):
        connect(fake, needs=replace(NEEDS, encode=lambda text: [1, 2, 3]))
    connect(FakeServer(), needs=replace(NEEDS, encode=lambda text: [1, 2, 3]))  # no /tokenize: not compared


def test_a_server_that_takes_text_only(connect: Connect) -> None:
    """As `swift deploy` does: its models have no length, and a list of ids is no string."""
    fake = FakeServer(max_model_len=None)
    inner = fake.respond

    def respond(path: str, body: Any, key: str | None = None) -> tuple[int, Any]:
        if path == "/v1/completions" and not isinstance(body["prompt"], str):
            return 422, {"detail": [{"loc": ["body", "prompt"], "msg": "Input should be a valid string"}]}
        return inner(path, body, key)

    fake.respond = respond  # type: ignore[method-assign]
    with pytest.raises(RolloutError, match=r"does not take token ids as the prompt \(.*422.*vllm serve"):
        connect(fake)


def test_no_model(connect: Connect) -> None:
    fake = FakeServer()
    fake.respond = lambda path, body, key=None: (200, {"data": []})  # type: ignore[method-assign]
    with pytest.raises(RolloutError, match=r"lists no model at /v1/models; start it with launch/teacher_server\.sh"):
        connect(fake)


def test_two_teachers(connect: Connect) -> None:
    with pytest.raises(RolloutError, match=r"h0:1 and the teacher server at http://h1:1 are different teachers"):
        connect(FakeServer(), FakeServer(random_teacher(1)))


def test_probe_tokens() -> None:
    assert probe_tokens([(1, 2, 3)] * 40, 9) == (1, 2, 3) * (PROBE_TOKENS // 3)
    assert probe_tokens([(5,)], 9) == (5, 0, 9)
    assert probe_tokens([], 9) == (0, 9)


# ---- faults on the way -----------------------------------------------------------------------------------------------


def test_500_is_repeated_and_then_right(connect: Connect) -> None:
    fake = FakeServer()
    servers = connect(fake)
    fake.refuse = [500, 503]
    assert_right(servers.topk(SEQUENCES))


def test_500_without_end_stops(connect: Connect) -> None:
    fake = FakeServer()
    servers = connect(fake)
    fake.refuse = [500] * 1000
    with pytest.raises(RolloutError, match=r"teacher server at http://h0:1 answered 500 \(EngineCore .*score 4 seq"):
        servers.topk(SEQUENCES)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c["prompt_logprobs"].pop(), "rows of log-probabilities for"),
        (lambda c: next(iter(c["prompt_logprobs"][-1].values())).update(logprob=float("nan"), rank=1), "ranks|numbers"),
    ],
)
def test_wrong_answers_stop_at_once(connect: Connect, spoil: Callable[[Any], Any], message: str) -> None:
    fake = FakeServer()
    servers = connect(fake)

    def spoiled(request: dict[str, Any], answer: Any) -> Any:
        spoil(answer["choices"][0])
        return answer

    fake.spoil = spoiled
    fake.scored.clear()
    with pytest.raises(RolloutError, match=message):
        servers.topk(SEQUENCES[:1])
    assert len(fake.scored) == 1, "the same question has the same answer"


def test_another_model_on_the_way_is_found_before_its_answers_are_used(connect: Connect) -> None:
    fake = FakeServer()
    servers = connect(fake)
    fake.teacher = random_teacher(5)
    with pytest.raises(RolloutError, match=r"is another teacher than at the start of the run.*not used"):
        servers.topk(SEQUENCES)


def test_a_server_that_is_gone(connect: Connect) -> None:
    fake = FakeServer()
    with serve(fake) as url:
        servers = TeacherServers([url], NEEDS, timeout_s=20, retry_s=0.3)
    with servers, pytest.raises(RolloutError, match=r"(cannot be reached|broke the connection).*score 4 sequences"):
        servers.topk(SEQUENCES)


def test_a_slow_server_is_given_up_at_the_deadline() -> None:
    fake = FakeServer()
    with serve(fake) as url, TeacherServers([url], NEEDS, timeout_s=3) as servers:
        fake.spoil = lambda request, answer: time.sleep(6) or answer
        start = time.monotonic()
        with pytest.raises(RolloutError, match=r"did not answer within 3 s, when asked to score 4 sequences"):
            servers.topk(SEQUENCES)
        assert time.monotonic() - start < 6


def test_compressed_answers_are_read() -> None:
    fake = FakeServer()
    plain = fake.transport

    def compressed(request: httpx.Request) -> httpx.Response:
        assert "gzip" in request.headers["Accept-Encoding"]
        answer = plain.handler(request)
        headers = {"Content-Encoding": "gzip"}
        return httpx.Response(answer.status_code, headers=headers, content=gzip.compress(answer.content))

    with TeacherServers(["http://h:1"], NEEDS, timeout_s=20, transport=httpx.MockTransport(compressed)) as servers:
        assert_right(servers.topk(SEQUENCES))
