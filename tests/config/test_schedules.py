"""Values that change with the step: what a text means, which texts are none, and the values of single steps.

Does not cover: who takes the values (tests/train/test_schedules.py), combinations that are refused (test_run.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.config.flags import parse_run_config, to_yaml
from megatron_gkd.config.run import DistillationConfig, RunConfig
from megatron_gkd.config.schedules import Schedule, constant, read_schedule
from megatron_gkd.errors import ConfigError
from megatron_gkd.loss.divergence import Divergence, Form
from megatron_gkd.records import StepValues


def test_a_number_is_the_same_in_every_step() -> None:
    for step in (0, 1, 10**6):
        assert constant(0.3).at(step) == read_schedule("lmbda", 0.3).at(step) == 0.3
    assert constant(0.3).is_constant


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0:0,100:0.5", {0: 0.0, 1: 0.005, 50: 0.25, 99: 0.495, 100: 0.5, 101: 0.5, 10**9: 0.5}),
        ("10:1,20:0,40:0,41:1", {1: 1.0, 10: 1.0, 15: 0.5, 20: 0.0, 33: 0.0, 40: 0.0, 41: 1.0, 99: 1.0}),
        ("stepwise,0:0,100:0.5,200:1", {0: 0.0, 99: 0.0, 100: 0.5, 199: 0.5, 200: 1.0, 999: 1.0}),
        (" 0 : 0.25 , 4 : 0.75 ", {2: 0.5}),
    ],
)
def test_values_of_steps(text: str, values: dict[int, float]) -> None:
    schedule = read_schedule("lmbda", text)
    for step, value in values.items():
        assert schedule.at(step) == pytest.approx(value, abs=1e-15)
        assert type(schedule.at(step)) is float
    assert (schedule.least, schedule.most) == (min(values.values()), max(values.values())) or text[0] == " "


def test_points_are_met_exactly() -> None:
    """So that --beta is 0, 1 or 0.5 where it is said to be, and on a level stretch: there the divergence has another
    form, and so another kernel."""
    schedule = read_schedule("beta", "0:0,3:0,7:0.5,9:0.5,13:1,17:1")
    forms = [Divergence(schedule.at(step)).form for step in range(1, 19)]
    assert forms[:3] == [Form.FORWARD_KL] * 3
    assert forms[3:6] == [Form.GENERAL] * 3
    assert forms[6:9] == [Form.SYMMETRIC] * 3
    assert forms[9:12] == [Form.GENERAL] * 3
    assert forms[12:] == [Form.REVERSE_KL] * 6


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("lmbda", "x", "must be a number, or step:value points"),
        ("lmbda", "0:0,100", "100 is not such a point"),
        ("lmbda", "0:0,", "an empty part is not such a point"),
        ("lmbda", "0:0,-5:1", "-5:1 is not such a point"),
        ("lmbda", "0:0,1.5:1", "1.5:1 is not such a point"),
        ("lmbda", "0:0,9:", "9: is not such a point"),
        ("lmbda", "0:0", "two points or more"),
        ("lmbda", "stepwise", "two points or more"),
        ("lmbda", "9:0,9:1", "later step"),
        ("lmbda", "9:0,5:1", "later step"),
        ("lmbda", "0:0,9:1.1", r"range \[0, 1\], and 1.1 is not"),
        ("beta", "0:0,9:nan", "nan is not"),
        ("temperature", "0:0,9:1", "range > 0, and 0 is not"),
        ("max_completion_length", "0:8,9:8.5", "must be a whole number, or step:value points"),
        ("max_completion_length", "1.5", "must be a whole number"),
    ],
)
def test_what_is_none_is_refused_by_name(flag: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_run_config(["--model", "S", f"--{flag}", text])
    assert str(caught.value).startswith(f"--{flag} is {text}; ")


@pytest.mark.parametrize("text", ["0:0,100:0.5", "stepwise,0:1,100:0.5", "1:0,30:1"])
def test_a_file_holds_what_the_command_line_said(text: str, tmp_path: Path) -> None:
    config = parse_run_config(["--model", "S", "--beta", text, "--lmbda", "1e-1"])
    assert config.distillation.beta == text
    assert config.distillation.lmbda == 0.1
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert parse_run_config(["--config", str(tmp_path / "run.yaml")]) == config
    (tmp_path / "short.yaml").write_text(f"model: S\nbeta: {text}\nlmbda: 1e-1\n")
    assert parse_run_config(["--config", str(tmp_path / "short.yaml")]) == config


def test_a_step_has_its_values() -> None:
    flags: dict[str, Any] = dict(
        lmbda="0:0,4:1", beta=1.0, max_completion_length="0:10,3:20", temperature="stepwise,0:1,2:2"
    )
    config = RunConfig.from_flat(dict(model="S") | flags)
    assert config.values_at(1) == StepValues(0.25, 1.0, 1.0, 13)
    assert config.values_at(2) == StepValues(0.5, 1.0, 2.0, 17)
    without = RunConfig.from_flat(dict(model="S", objective="sft") | flags)
    assert without.values_at(2).lmbda == 0
    assert DistillationConfig(lmbda="0:1,5:0", seq_kd=True).samples_teacher
    assert not DistillationConfig(lmbda="0:1,5:1", seq_kd=True).samples_teacher


def test_a_broken_schedule_would_be_seen() -> None:
    """One that is off by a step differs at a point and between points."""
    given, late = Schedule(((0, 0.0), (4, 1.0))), Schedule(((1, 0.0), (5, 1.0)))
    assert all(given.at(step) != late.at(step) for step in (1, 2, 3, 4))
