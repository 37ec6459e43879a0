"""Checks that the teacher teaches, and that the sampler samples the student: in the first step of every start, before
its update, and then every `--health_steps` steps.

    teacher (--on_teacher_fault, stops)     UNIFORM      its most probable token is no more probable than any other
                                            FROZEN       its output is the same at every token of every sample
                                            THE STUDENT  in step 1: it prefers what the student prefers everywhere, and
                                                         the divergence is only rounding
    sampler (warns)                         its log-probabilities differ from the trainer's; more than half of the
                                            completions are truncated, or repeat themselves

The numbers are the step's, reduced over all ranks with its other metrics (token_probe.py, rollouts.py). So no
collective or synchronisation is added, and every rank gets the same result.

Elsewhere: the teacher's weights against those at the checkpoint (teacher_identity.py), tokenizers and templates
(data/chat.py, data/template_differences.py), a server that changes during the run (teacher/servers/servers.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final

from megatron_gkd.config.dtypes import Dtype
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.servers import NoTeacher, SelfTeaching
from megatron_gkd.errors import TrainingError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.observe.metrics import Metrics

logger = get_logger(__name__)

_FEWEST: Final = 4  # probe tokens, before anything is said of them all
_UNIFORM_NATS: Final = 0.01  # of the most probable token above 1 / V, on average
_FROZEN: Final = 0.01  # standard deviation of token id + log-probability
_SAME_AGREEMENT: Final = 0.999
_SAME_NATS: Final = 1e-3
_DIFFERENCE: Final[dict[Dtype, float]] = {"fp32": 0.01, "bf16": 0.3, "fp16": 0.1}  # nats a token, on average
_MOST_SHARE: Final = 0.5


class Health:
    """The checks of one rank of the student."""

    def __init__(self, config: RunConfig, *, vocab_size: int, done_steps: int, tells: bool) -> None:
        """Args:
        done_steps: steps done before this start.
        tells: whether this rank logs warnings.
        """
        self._config, self._vocab_size = config, vocab_size
        self._first, self._tells = done_steps + 1, tells
        self._every, self._stops = config.logging.health_steps, config.logging.on_teacher_fault == "stop"
        self._is_off = not self._every or isinstance(config.teacher.kind, NoTeacher)

    def check(self, step: int, metrics: Metrics, rollout: Mapping[str, float]) -> None:
        """Between the backward pass of a step and its update. Raises TrainingError on all ranks.

        Args:
            metrics: of the step, reduced.
            rollout: metrics of its completions; empty if nothing was sampled from the student.
        """
        if self._is_off or (step != self._first and step % self._every):
            return
        means, counts = metrics.means(), metrics.counts()
        itself = isinstance(self._config.teacher.kind, SelfTeaching) or self._config.base_teaches
        comparable = step == 1 and not itself
        for fault in teacher_faults(means, counts, vocab_size=self._vocab_size, comparable=comparable):
            if self._stops:
                raise TrainingError(
                    f"step {step}, before its update: {fault}. If that is meant, --on_teacher_fault warn goes on"
                )
            self._warn(step, fault)
        for problem in sampler_problems(means, rollout, self._config):
            self._warn(step, problem)

    def _warn(self, step: int, text: str) -> None:
        if self._tells:
            logger.warning("step %d: %s", step, text)


def teacher_faults(
    means: Mapping[str, float], counts: Mapping[str, float], *, vocab_size: int, comparable: bool
) -> Iterator[str]:
    """What is wrong with the teacher, and what to do. NaN is handled in faults.py.

    Args:
        comparable: whether the student is still the initial one, and not its own teacher.
    """
    best, mark, squared = (means.get(f"health/{name}") for name in ("teacher_best", "mark", "mark_squared"))
    if best is not None and mark is not None and squared is not None and counts["health/mark"] >= _FEWEST:
        if best < _UNIFORM_NATS - math.log(vocab_size):
            yield (
                "the teacher is uniform: on average its most probable token is no more probable than the other "
                f"{vocab_size - 1}. Its output layer has no weights, or others than it was trained with: look at its "
                "files"
            )
        elif math.sqrt(max(squared - mark * mark, 0.0)) < _FROZEN:
            yield (
                f"the teacher is frozen: its output is the same at all {counts['health/mark']:.0f} tokens that were "
                "checked, whatever the prompt is. Look at its files, or at what the server is given"
            )
    agreement, divergence = means.get("agreement", 0.0), means.get("divergence", math.inf)
    if comparable and agreement >= _SAME_AGREEMENT and abs(divergence) < _SAME_NATS and counts["loss"] >= _FEWEST:
        yield (
            f"the teacher is the student: both prefer the same token at {agreement:.1%} of the tokens, and the "
            f"divergence is {divergence:.1e} nats, so there is nothing to learn. Give another teacher or --model"
        )


def sampler_problems(means: Mapping[str, float], rollout: Mapping[str, float], config: RunConfig) -> Iterator[str]:
    """Problems of the student's own completions, in words."""
    sampling, difference = config.sampling, means.get("health/logprob_difference")
    is_current = sampling.steps_per_generation == 1 and not sampling.rollout_lag
    most = _DIFFERENCE[config.model.precision]
    if difference is not None and is_current and difference > most:
        yield (
            f"the sampler's log-probabilities differ from the trainer's by {difference:.2g} nats a token, and "
            f"{config.model.precision} explains {most:g}: the engine computes another model; --verify_sync_every 1 "
            "compares the weights"
        )
    for name, told in (
        ("truncated", "were cut at their limit: raise --max_completion_length, or let the student learn to stop"),
        ("repeated", "of 4 tokens each had been in the same completion before: the student repeats itself"),
    ):
        share = rollout.get(f"rollout/{name}", 0.0)
        if share > _MOST_SHARE:
            what = "completions" if name == "truncated" else "runs"
            yield f"{share:.0%} of the sampled {what} {told}"
