"""Flags that transform a data set's records before they are read as rows (data/row_maker.py), for all commands."""

from __future__ import annotations

from typing import Any

from megatron_gkd.config.schema import setting


def plugins_setting() -> Any:
    """The field of --external_plugins."""
    return setting(
        (),
        "Python files of yours whose function make_row(row) makes the columns of every record of --dataset and "
        "--eval_dataset, or leaves it out (None), one after the other. They are executed on every rank.",
        path=True,
    )


def prompt_template_setting() -> Any:
    """The field of --prompt_template."""
    return setting(
        None,
        "The prompt of every row, as text with {column} where a column of the row stands, in place of its own turns; "
        "{{ and }} are braces. null: the row's own.",
    )


def teacher_prompt_template_setting() -> Any:
    """The field of --teacher_prompt_template."""
    return setting(
        None,
        "What the teacher is given in place of the user's last turn, in the same form; {prompt} is that turn, "
        "{completion} the row's completion. null: the column teacher_prompt.",
    )
