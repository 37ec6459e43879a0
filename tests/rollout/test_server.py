"""A real vLLM server as an engine: equal to transformers after each update, and right again after everything that can
go wrong in one.

One server, started once, fp32 on a CPU, tiny Qwen3 with its own head (tied heads, experts and the death of a server:
test_server_life.py). Not covered: a GPU, NCCL, tensor parallel servers, another machine.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout import weight_transfer as transfer
from megatron_gkd.rollout.owned import private_directory
from megatron_gkd.rollout.protocol import Request, SamplingSettings
from megatron_gkd.rollout.vllm.local_server import LocalServer
from megatron_gkd.rollout.vllm.server import ServerEngine
from megatron_gkd.weights.checksum import checksum
from tests.support.serving import (
    BLOCK,
    GREEDY,
    MAX_MODEL_LEN,
    Named,
    assert_greedy,
    assert_scores,
    connect,
    push,
    requests,
    send,
    start_server,
    weights,
    write_model,
)

pytestmark = pytest.mark.slow

Connect = Callable[..., ServerEngine]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of one shape, with different weights."""
    root = tmp_path_factory.mktemp("models")
    return [write_model(root / f"m{seed}", seed) for seed in range(4)]


@pytest.fixture(scope="module")
def server(models: list[Path]) -> Iterator[LocalServer]:
    with start_server(models[0]) as server:
        yield server


@pytest.fixture
def new_engine(server: LocalServer, models: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    engines: list[ServerEngine] = []
    made: list[str] = []

    def recording(prefix: str, root: str) -> str:
        made.append(private_directory(prefix, root))
        return made[-1]

    monkeypatch.setattr(transfer, "private_directory", recording)

    def make(**options: Any) -> ServerEngine:
        engines.append(connect(server, options.pop("model", models[0]), **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    assert not [path for path in made if os.path.exists(path)], "files stay in shared memory"


@pytest.mark.parametrize("way", ["shm", "group"])
def test_equal_to_transformers_after_each_of_three_updates(way: str, new_engine: Connect, models: list[Path]) -> None:
    engine = new_engine(weight_transfer=way)
    assert engine.version is None
    assert engine.max_model_len == MAX_MODEL_LEN
    with pytest.raises(RolloutError, match="no complete weights"):
        engine.generate(requests(), GREEDY)
    for version, model in enumerate(models[1:], start=1):
        push(engine, weights(model), version)
        assert engine.version == version
        got = engine.generate(requests(), GREEDY)  # the same prompts each time: old prefixes would show
        assert {completion.version for completion in got} == {version}
        assert_greedy(model, requests(), got)
        sequences = [[*r.prompt_ids, *c.token_ids] for r, c in zip(requests(), got, strict=True)]
        assert_scores(model, sequences, engine.score(sequences))


def test_the_way_is_chosen_by_what_the_workers_see(
    new_engine: Connect, models: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = new_engine()
    push(engine, weights(models[1]), 1)
    assert isinstance(engine._transfer, transfer.ShmTransfer)
    monkeypatch.setattr("megatron_gkd.rollout.vllm.server.can_be_read_by", lambda call: False)
    elsewhere = new_engine()
    push(elsewhere, weights(models[2]), 1)
    assert isinstance(elsewhere._transfer, transfer.GroupTransfer)
    assert_greedy(models[2], requests(2), elsewhere.generate(requests(2), GREEDY))


def test_completions_depend_on_the_request_alone(new_engine: Connect, models: list[Path]) -> None:
    engine = new_engine()
    push(engine, weights(models[1]), 1)
    settings = SamplingSettings(temperature=0.9, top_p=0.95, top_k=40)
    asked = requests()
    together = engine.generate(asked, settings)
    assert engine.generate(asked[::-1], settings) == together[::-1]
    assert [engine.generate([request], settings)[0] for request in asked[:3]] == together[:3]
    other_seed = Request(key=1, prompt_ids=asked[0].prompt_ids, max_tokens=12, seed=99)
    assert engine.generate([other_seed], settings)[0].token_ids != together[0].token_ids
    for request, completion in zip(asked, together, strict=True):
        ids = [*request.prompt_ids, *completion.token_ids]
        scores = engine.score([ids])[0][-len(completion.token_ids) :]
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(completion.logprobs), rtol=0, atol=1e-4)


def test_a_completion_ends_at_the_stop_tokens_and_at_nothing_else(new_engine: Connect, models: list[Path]) -> None:
    engine = new_engine()
    push(engine, weights(models[1]), 1)
    flat = SamplingSettings(temperature=2.0)  # every token comes, the model's end token (258) among them
    many = [Request(key=i, prompt_ids=(1, 2, 3), max_tokens=60, seed=i) for i in range(20)]
    got = engine.generate(many, flat)
    assert {completion.finish_reason for completion in got} == {"length"}
    assert {len(completion.token_ids) for completion in got} == {60}
    assert any(258 in completion.token_ids for completion in got)
    stopped = engine.generate(many, SamplingSettings(temperature=2.0, stop_token_ids=(258, 7)))
    for whole, cut in zip(got, stopped, strict=True):
        ends = [i for i, token in enumerate(whole.token_ids) if token in (258, 7)]
        length = ends[0] + 1 if ends else 60
        assert cut.token_ids == whole.token_ids[:length]
        assert cut.finish_reason == ("stop" if ends else "length")
    assert {completion.finish_reason for completion in stopped} == {"stop", "length"}


def test_max_model_len_cuts_completions_and_refuses_prompts(new_engine: Connect, models: list[Path]) -> None:
    engine = new_engine()
    push(engine, weights(models[1]), 1)
    longest = Request(key=5, prompt_ids=(1,) * (MAX_MODEL_LEN - 1), max_tokens=50, seed=0)
    (cut,) = engine.generate([longest], GREEDY)
    assert (len(cut.token_ids), cut.finish_reason) == (1, "length")
    for length in (0, MAX_MODEL_LEN):
        with pytest.raises(RolloutError, match=f"request 5 has {length} tokens; .* takes 1 to {MAX_MODEL_LEN - 1}"):
            engine.generate([Request(key=5, prompt_ids=(1,) * length, max_tokens=5, seed=0)], GREEDY)
        with pytest.raises(RolloutError, match=f"sequence 1 has {length} tokens"):
            engine.score([(1, 2), (1,) * length])
    with pytest.raises(RolloutError, match=r"400 .*vocabulary"):
        engine.generate([Request(key=5, prompt_ids=(1, 99999), max_tokens=5, seed=0)], GREEDY)
    assert_greedy(models[1], requests(2), engine.generate(requests(2), GREEDY))


# ---- updates that fail ---------------------------------------------------------------------------------------------


def damage_file(engine: ServerEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of the second bucket's file, after it was written."""
    assert isinstance(engine._transfer, transfer.ShmTransfer)
    original = engine._transfer._call

    def call(method: str, arguments: list[Any], what: str) -> Any:
        if arguments[0].endswith("bucket1.safetensors"):
            with open(Path("/dev/shm") / arguments[0], "r+b") as file:
                file.seek(-5, os.SEEK_END)
                byte = file.read(1)[0]
                file.seek(-5, os.SEEK_END)
                file.write(bytes([byte ^ 4]))
        return original(method, arguments, what)

    monkeypatch.setattr(engine._transfer, "_call", call)


def damage_broadcast(engine: ServerEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of the last tensor in every buffer."""
    start = transfer.start_broadcast

    def damaged(group: Any, flat: torch.Tensor) -> Any:
        flat[-64] ^= 4
        return start(group, flat)

    monkeypatch.setattr(transfer, "start_broadcast", damaged)


def test_what_arrived_and_what_is_cached(new_engine: Connect, models: list[Path]) -> None:
    engine = new_engine()
    prompt = tuple(range(2 * BLOCK + 7))
    push(engine, weights(models[1]), 1)
    assert engine.received() == {
        name: (checksum(tensor), pytest.approx(tensor.norm().item())) for name, tensor in weights(models[1])
    }
    assert [engine.cached_tokens(prompt) for _ in range(2)] == [0, 2 * BLOCK]
    push(engine, weights(models[2]), 2)
    assert [engine.cached_tokens(prompt) for _ in range(2)] == [0, 2 * BLOCK]
    assert engine.received()["lm_head.weight"][0] == checksum(dict(weights(models[2]))["lm_head.weight"])


def send_until_it_fails(engine: ServerEngine, *buckets: Named) -> None:
    """The failure of a bucket shows with the next one or at the end; of a broadcast, also at once, where the worker's
    answer is here before the broadcast is known to be done.
    """
    for bucket in buckets:
        send(engine, bucket)
    engine.end(1)


@pytest.mark.parametrize(("way", "damage"), [("shm", damage_file), ("group", damage_broadcast)])
def test_a_damaged_bucket_is_found_and_a_complete_update_follows(
    way: str,
    damage: Callable[[ServerEngine, pytest.MonkeyPatch], None],
    new_engine: Connect,
    models: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = new_engine(weight_transfer=way)
    tensors = weights(models[1])
    engine.begin()
    with monkeypatch.context() as patch:
        damage(engine, patch)
        with pytest.raises(RolloutError, match=r"was damaged on the way: checksum .* when asked to take 5 ") as error:
            send_until_it_fails(engine, tensors[:5], tensors[5:10], tensors[10:15])
    assert any(name in str(error.value) for name, _ in tensors)
    with pytest.raises(RolloutError, match="in a failed update, no complete weights; abort it"):
        engine.end(1)
    for sample in (lambda: engine.generate(requests(), GREEDY), lambda: engine.score([[1, 2]])):
        with pytest.raises(RolloutError, match="the weights are not whole"):
            sample()
    engine.abort()
    engine.abort()
    assert engine.version is None
    with pytest.raises(RolloutError, match="a complete update comes first"):
        engine.generate(requests(), GREEDY)
    push(engine, weights(models[2]), 2)
    assert_greedy(models[2], requests(), engine.generate(requests(), GREEDY))


@pytest.mark.parametrize("way", ["shm", "group"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("model.layers.0.mlp.no_proj.weight", torch.ones(4, 4)), "no_proj"),
        (("model.norm.weight", torch.ones(3)), "when asked to take 2 tensors"),
    ],
    ids=["unknown", "wrong shape"],
)
def test_a_tensor_that_does_not_belong(
    way: str, bad: tuple[str, torch.Tensor], message: str, new_engine: Connect, models: list[Path]
) -> None:
    engine = new_engine(weight_transfer=way)
    push(engine, weights(models[1]), 1)
    engine.begin()
    send(engine, weights(models[2])[:7])
    with pytest.raises(RolloutError, match=message):
        send_until_it_fails(engine, [weights(models[2])[7], bad])
    engine.abort()
    push(engine, weights(models[3]), 3)
    assert_greedy(models[3], requests(), engine.generate(requests(), GREEDY))


def test_an_update_that_its_pusher_left_open(new_engine: Connect, models: list[Path]) -> None:
    first = new_engine()
    push(first, weights(models[1]), 1)
    first.begin()
    send(first, weights(models[2])[:5])
    first.close()
    with pytest.raises(RolloutError, match="pushed to it"):
        new_engine(read_weights=True)
    second = new_engine()
    push(second, weights(models[3]), 1)
    assert_greedy(models[3], requests(), second.generate(requests(), GREEDY))


def test_weights_of_another_pusher_are_found(new_engine: Connect, models: list[Path]) -> None:
    ours, theirs = new_engine(), new_engine()
    push(ours, weights(models[1]), 4)
    push(theirs, weights(models[2]), 4)
    with pytest.raises(RolloutError, match=r"held other weights before it sampled: version gkd-.*-4, and gkd-.*-4 is"):
        ours.generate(requests(), GREEDY)
    assert ours.version is None
    assert_greedy(models[2], requests(), theirs.generate(requests(), GREEDY))
    push(ours, weights(models[3]), 5)
    assert_greedy(models[3], requests(), ours.generate(requests(), GREEDY))


def test_weights_that_change_while_sampling_are_found(
    new_engine: Connect, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = new_engine(), new_engine()
    push(ours, weights(models[1]), 1)
    post_all = ours._client.post_all

    def pushed_meanwhile(*arguments: Any) -> Any:
        answers = post_all(*arguments)
        push(theirs, weights(models[2]), 2)
        return answers

    monkeypatch.setattr(ours._client, "post_all", pushed_meanwhile)
    with pytest.raises(RolloutError, match="held other weights while it sampled"):
        ours.generate(requests(), GREEDY)


def test_a_server_paused_by_somebody_else_is_an_error_and_no_hang(new_engine: Connect, models: list[Path]) -> None:
    engine = new_engine()
    push(engine, weights(models[1]), 1)
    somebody = new_engine()
    somebody._client.post("/pause?mode=wait", "pause")
    with pytest.raises(RolloutError, match="is paused, by another process, and would not sample 6 completions"):
        engine.generate(requests(), GREEDY)
    somebody._client.post("/resume", "resume")
    assert_greedy(models[1], requests(), engine.generate(requests(), GREEDY))


def test_sleep(new_engine: Connect, models: list[Path]) -> None:
    engine = new_engine(sleep_level=2)
    push(engine, weights(models[1]), 1)
    engine.sleep()
    with pytest.raises(RolloutError, match="it is asleep, no complete weights; wake_weights and wake_kv come first"):
        engine.generate(requests(), GREEDY)
    engine.wake_weights()
    push(engine, weights(models[2]), 2)
    with pytest.raises(RolloutError, match="awake but for its KV cache, weights of version 2; wake_kv is due"):
        engine.generate(requests(), GREEDY)
    engine.wake_kv()
    assert_greedy(models[2], requests(), engine.generate(requests(), GREEDY))
    never = new_engine(sleep_level=0)
    push(never, weights(models[3]), 1)
    never.sleep()
    never.wake_weights()
    never.wake_kv()
    assert_greedy(models[3], requests(), never.generate(requests(), GREEDY))


# ---- what is checked at the start, and what is left behind ---------------------------------------------------------


def test_another_model_or_dtype_is_refused(new_engine: Connect, tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match="computes in float32, and bfloat16 is needed: start it with DTYPE=bf16"):
        new_engine(dtype="bf16")
    tied = write_model(tmp_path / "tied", 1, tied=True)
    with pytest.raises(RolloutError, match=r"has another model .*: tie_word_embeddings is False there and True in"):
        new_engine(model=tied)


def test_files_are_private_and_at_most_two(
    new_engine: Connect, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(weight_transfer="shm")
    engine.begin()
    way = engine._transfer
    assert isinstance(way, transfer.ShmTransfer)
    assert stat.S_IMODE(os.stat(way.directory).st_mode) == 0o700
    counts, write = [], transfer.write_safetensors

    def counted(path: str, tensors: Named) -> None:
        write(path, tensors)
        counts.append(len(os.listdir(way.directory)))
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600

    monkeypatch.setattr(transfer, "write_safetensors", counted)
    for item in weights(models[1]):
        send(engine, [item])
    engine.end(1)
    assert len(counts) == len(weights(models[1]))
    assert max(counts) == 2
    assert os.listdir(way.directory) == []
