"""The rules of an engine's life: what is allowed in which state, and what a refusal says.

Pure Python. That the adapters keep to it, and what a real engine would do otherwise, is tested with the engines.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.state import EngineState

Step = Callable[[EngineState], AbstractContextManager[object]]
STEPS: dict[str, Step] = {
    "begin": EngineState.begin,
    "bucket": EngineState.bucket,
    "end": lambda state: state.end(7),
    "abort": EngineState.abort,
    "generate": lambda state: state.sampling("generate"),
    "score": lambda state: state.sampling("score"),
    "sleep": EngineState.sleep,
    "wake_weights": EngineState.wake_weights,
    "wake_kv": EngineState.wake_kv,
}


def after(*steps: str, version: int | None = 3, sleep_level: int = 0) -> EngineState:
    """A state that has gone through steps; `bucket!` is one whose work fails."""
    state = EngineState("the engine", version=version, sleep_level=sleep_level)
    for step in steps:
        if step == "close":
            state.close()
        elif step.endswith("!"):
            with pytest.raises(ZeroDivisionError), STEPS[step[:-1]](state):
                raise ZeroDivisionError
        else:
            with STEPS[step](state):
                pass
    return state


UPDATE = ("begin", "bucket", "bucket", "end")
FULL_NIGHT = ("sleep", "wake_weights", "wake_kv")
ALLOWED = {  # state -> the steps that it allows
    (): {"begin", "abort", "generate", "score", "sleep"},
    ("begin",): {"bucket", "end", "abort"},
    ("begin", "bucket"): {"bucket", "end", "abort"},
    ("begin!",): {"abort"},
    ("begin", "bucket!"): {"abort"},
    ("begin", "bucket", "end!"): {"abort"},
    ("begin", "bucket!", "abort!"): {"abort"},
    ("begin", "abort"): {"begin", "abort", "sleep"},
    ("begin", "bucket!", "abort"): {"begin", "abort", "sleep"},
    ("begin", "bucket!", "abort", "begin", "bucket"): {"bucket", "end", "abort"},
    ("begin", "bucket!", "abort", *UPDATE): {"begin", "abort", "generate", "score", "sleep"},
    ("sleep",): {"wake_weights", "abort"},
    ("sleep", "wake_weights"): {"begin", "abort", "wake_kv", "sleep"},
    ("sleep", "wake_weights", *UPDATE): {"begin", "abort", "wake_kv", "sleep"},
    ("sleep", "wake_weights", "begin"): {"bucket", "end", "abort"},
    FULL_NIGHT: {"begin", "abort", "generate", "score", "sleep"},
    ("generate!",): {"begin", "abort", "generate", "score", "sleep"},
    ("sleep!",): set(),
    ("sleep", "wake_weights!"): set(),
    ("sleep", "wake_weights", "wake_kv!"): set(),
    ("close",): set(),
}


@pytest.mark.parametrize("steps", ALLOWED, ids=lambda steps: " ".join(steps) or "fresh")
@pytest.mark.parametrize("step", STEPS)
def test_every_step_in_every_state(steps: tuple[str, ...], step: str) -> None:
    state = after(*steps)
    if step in ALLOWED[steps]:
        with STEPS[step](state):
            pass
        return
    before = str(state)
    with pytest.raises(RolloutError, match=r"^the engine was asked to .*, and it is ") as refused, STEPS[step](state):
        pytest.fail("the work was begun")
    assert f"and it is {before}; " in str(refused.value)
    assert str(state) == before, "a refusal changes nothing"


def test_a_version_is_there_exactly_while_the_weights_are_whole() -> None:
    assert after(version=None).version is None
    assert after().version == 3
    assert after("begin").version is None
    assert after("begin", "bucket").version is None
    assert after(*UPDATE).version == 7
    assert after("begin", "end!").version is None
    assert after("begin", "abort").version is None
    assert after("abort").version == 3, "nothing to leave, nothing lost"


@pytest.mark.parametrize(("level", "version"), [(0, 3), (1, 3), (2, None)])
def test_level_2_drops_the_weights(level: int, version: int | None) -> None:
    state = after(*FULL_NIGHT, sleep_level=level)
    assert state.version == version
    with after(*FULL_NIGHT, *UPDATE, sleep_level=level).sampling("generate") as sampled:
        assert sampled == 7


def test_without_weights_nothing_is_sampled() -> None:
    with pytest.raises(RolloutError, match="no complete weights; a complete update comes first"):
        after("generate", version=None)


def test_abort_says_whether_there_is_something_to_leave() -> None:
    with after("begin").abort() as needed:
        assert needed
    with after().abort() as needed:
        assert not needed


def test_an_update_waits_for_the_samplers() -> None:
    state = after()
    with state.sampling("generate"):
        for step in ("begin", "sleep"):
            with pytest.raises(RolloutError, match=r"1 call\(s\) are still sampling"), STEPS[step](state):
                pass
        with state.sampling("score") as version:
            assert version == 3
    with state.begin():
        pass


def test_messages_say_what_was_asked_in_which_state_and_what_to_do() -> None:
    def message(step: str, *steps: str) -> str:
        with pytest.raises(RolloutError) as error, STEPS[step](after(*steps)):
            pass
        return str(error.value)

    assert message("generate", "sleep") == (
        "the engine was asked to generate, and it is asleep, weights of version 3; wake_weights and wake_kv come first"
    )
    assert message("score", "begin") == (
        "the engine was asked to score, and it is awake, in an unfinished update, no complete weights; "
        "the weights are not whole; end the update, or abort it and make a complete one"
    )
    assert message("bucket") == (
        "the engine was asked to take a bucket of weights, and it is awake, weights of version 3; begin comes first"
    )
    assert message("end", *UPDATE) == (
        "the engine was asked to end an update as version 7, and it is awake, weights of version 7; begin comes first"
    )
    assert message("end", "begin", "bucket!") == (
        "the engine was asked to end an update as version 7, and it is awake, in a failed update, no complete "
        "weights; abort it, then make a complete update"
    )
    assert message("sleep", "sleep").endswith("it is asleep, weights of version 3; it sleeps already")
    assert message("generate", "close") == "the engine was asked to generate, and it is closed; make a new engine"


def test_close_is_needed_once() -> None:
    state = after()
    assert state.close()
    assert not state.close()
