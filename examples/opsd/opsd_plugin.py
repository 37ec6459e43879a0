"""Rows for on-policy self-distillation: the student is told a problem, its teacher the problem and a worked solution.

    torchrun ... -m megatron_gkd train --model M --external_plugins examples/opsd/opsd_plugin.py --lmbda 1 ...

For data with the columns `problem` and `solution`, such as open-r1/OpenThoughts-114k-math; where a column `correct`
says that the solution is wrong, the row is left out.
"""

from __future__ import annotations

from typing import Any

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
TOLD = """{problem}

Here is a reference solution:
{solution}

Now that you have understood it, write your own reasoning, step by step, up to the final answer."""


def make_row(row: dict[str, Any]) -> dict[str, Any] | None:
    """The columns of a record in, those of a row out."""
    if row.get("correct") is False:
        return None
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["problem"]}]
    told = TOLD.replace("{problem}", row["problem"]).replace("{solution}", row["solution"])
    return {"messages": turns, "teacher_prompt": told}  # text stands in place of the user's last turn
