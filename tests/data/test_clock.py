"""The time that chat templates are told stands still, for every rendering of an encoder, and tells what of it is seen.

That all ranks of a run have one, and a resumed run the first one's: train/test_run_clock.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_gkd.commands.check_data import run_check_data
from megatron_gkd.config.checks import CheckDataConfig
from megatron_gkd.data import clock as clock_module
from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.data.clock import Clock
from tests.support.tiny_tokenizers import CHATML, chat_tokenizer

TIME = "2026-11-27T23:59:58"
LLAMA = (  # as Llama 3.2 asks
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}'
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "<|im_start|>system\nToday Date: {{ date_string }}<|im_end|>\n"
)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (None, []),
        (CHATML, []),
        (LLAMA + CHATML, ["27 Nov 2026"]),
        ("{{ strftime_now('%H') }}{{ strftime_now( \"%M\" ) }}{{ strftime_now('%H') }}", ["23", "59"]),
        ("{{ strftime_now('%' ~ 'd') }}", [TIME]),
        ("{% set now = strftime_now %}{{ now('%d') }}", [TIME]),
        ("{{ strftime_now('%d') }}{{ strftime_now(form) }}", [TIME, "27"]),
        ({"default": CHATML, "tool_use": LLAMA}, ["27 Nov 2026"]),
    ],
)
def test_what_of_the_time_a_template_sees(template: str | dict[str, str] | None, told: list[str]) -> None:
    assert Clock(TIME).time_variables(template) == told
    assert bool(Clock(TIME).options(template)) == bool(told)


def test_a_time_that_is_none() -> None:
    with pytest.raises(ValueError, match="yesterday"):
        Clock("yesterday")
    assert Clock(Clock.now().time) is not None


def test_the_encoder_tells_the_template_its_own_time() -> None:
    encoder = ChatEncoder(chat_tokenizer(LLAMA + CHATML), Clock(TIME))
    ids, completion = encoder.encode("Hello", "I am well.")
    assert "Today Date: 27 Nov 2026<|im_end|>" in encoder.decode(ids)
    assert completion is not None


def test_check_data_has_one_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of its readings, with a machine's clock that is another at every look."""
    times = iter(f"2026-11-27T23:{minute:02}:{second:02}" for minute in range(60) for second in range(60))
    monkeypatch.setattr(clock_module.Clock, "now", staticmethod(lambda: Clock(next(times))))
    chat_tokenizer("{{ strftime_now('%H:%M:%S') }}" + CHATML).save_pretrained(tmp_path)
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "Hello", "completion": "I am well."}\n' * 3)
    run_check_data(CheckDataConfig(model=str(tmp_path), dataset=[str(data)]))
    assert next(times) == "2026-11-27T23:00:01", "the clock was looked at once"
