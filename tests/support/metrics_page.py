"""docs/metrics.md as data: which names it has, under which heading. Tests hold rows of real runs against it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent.parent / "docs/metrics.md"
SOURCES = ("student", "teacher", "dataset")
EVERY_STEP, HEALTH, EVALUATION = "Every step", "Health", "Evaluation"
ROLLOUT, TEACHER_SAMPLES = "With `--lmbda` above 0", "With `--seq_kd true`"
GENERATION = "With `--eval_generate`"
TOPK, CROSS_ENTROPY = "With `--gkd_logits_topk`", "With `--sft_alpha` or `--objective sft`"
EXPERTS = "With a mixture of experts"
OF_A_STEP = (EVERY_STEP, HEALTH, EXPERTS, CROSS_ENTROPY, TOPK, ROLLOUT, TEACHER_SAMPLES)
EVERYTHING = (*OF_A_STEP, EVALUATION, GENERATION)


@cache
def documented() -> dict[str, frozenset[str]]:
    """Heading -> the names in the first column of its table, with each source in place of the S."""
    found = {}
    for part in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        heading, _, text = part.partition("\n")
        cells = re.findall(r"^\| (`[^|]*`) \|", text, flags=re.M)
        names = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
        spelt = {name.replace("/S/", f"/{source}/") for name in names for source in SOURCES}
        found[heading] = frozenset(spelt)
    assert found.keys() >= {*EVERYTHING}
    return found


def names_under(*headings: str) -> set[str]:
    return set().union(*(documented()[heading] for heading in headings))


def names_of_a_step(row: dict[str, float], *headings: str) -> set[str]:
    """What the row of a step is to have: all names of every step, but the means of sources without a sample in it, and
    of tokens that are looked at, where there are none."""
    absent = {source for source in SOURCES if not row[f"source/{source}/num_samples"]}
    means = {f"source/{source}/{what}" for source in absent for what in ("loss", "agreement")}
    means |= {"health/logprob_difference"} - row.keys()
    probed = [HEALTH] if "health/teacher_best" in row else []
    return names_under(EVERY_STEP, *probed, *headings) - means


def undocumented(rows: Iterable[dict[str, float]]) -> set[str]:
    """Names of these rows, of steps or of evaluations, that the page lacks; it has L for the number of a layer."""
    return {re.sub(r"/\d+$", "/L", name) for row in rows for name in row} - names_under(*EVERYTHING)
