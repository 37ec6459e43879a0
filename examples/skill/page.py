"""The page of the study, in Markdown, and its picture: of the records of run.py, nothing is typed by hand."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from arms import ARMS
from paired import Difference, interval, paired

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
QUESTIONS: Final = (  # asked before the first cell was trained
    ("kd", "sft", "Is KD better than SFT?"),
    ("on_policy", "kd", "Is on-policy better than KD?"),
    ("on_policy", "sft", "Is on-policy better than SFT?"),
    ("mixed", "kd", "Is the mixture better than KD?"),
    ("on_policy", "mixed", "Is on-policy better than the mixture?"),
    ("seq_kd", "sft", "Is SeqKD better than SFT?"),
    ("on_policy_equal_time", "sft_equal_time", "At equal CPU time: is on-policy better than SFT?"),
    ("on_policy_equal_time", "kd", "At equal CPU time: is on-policy better than KD?"),
    ("mixed_equal_time", "kd", "At equal CPU time: is the mixture better than KD?"),
    ("on_policy_jsd", "on_policy", "On-policy: is beta 0.5 better than beta 0?"),
    ("on_policy_reverse", "on_policy", "On-policy: is beta 1 better than beta 0?"),
    ("horizon", "on_policy", "On-policy: are short completions first better?"),
)
BEGIN: Final = "<!-- RESULTS: begin"
END: Final = "<!-- RESULTS: end"
_COLOURS: Final = {"sft": "#7f7f7f", "kd": "#1f77b4", "mixed": "#2ca02c", "on_policy": "#d62728"}


def write_page(records: Sequence[Record], out: Path, models: Mapping[str, Mapping[str, float]]) -> None:
    """`out`/evidence.md and evidence.svg. Arms with less than two seeds have no interval, and are left out.

    Args: models: what was measured of the teacher and of the student that all begin with.
    """
    by_arm = {arm: {r["seed"]: r for r in records if r["arm"] == arm} for arm in ARMS}
    by_arm = {arm: found for arm, found in by_arm.items() if len(found) > 1}
    lines = [*_table(by_arm, models), "", *_answers(by_arm), ""]
    (out / "evidence.md").write_text("\n".join(lines), encoding="utf-8")
    if by_arm:
        draw(by_arm, out / "evidence.svg")


def has_markers(page: Path) -> bool:
    """Whether `put_into` can be called."""
    return page.is_file() and all(page.read_text(encoding="utf-8").count(marker) == 1 for marker in (BEGIN, END))


def put_into(page: Path, out: Path) -> None:
    """Replace what stands between the markers of a page by `out`/evidence.md, with the picture beside the page."""
    text = page.read_text(encoding="utf-8")
    (before, rest), (_, after) = text.split(BEGIN), text.split(END)
    note, rest = rest.split("\n", 1)
    results = (out / "evidence.md").read_text(encoding="utf-8")
    picture = page.with_suffix(".svg")
    shutil.copyfile(out / "evidence.svg", picture)
    shown = f"![Accuracy of every method]({picture.name})"
    page.write_text(f"{before}{BEGIN}{note}\n{results}\n{shown}\n{END}{after}", encoding="utf-8")


def _table(by_arm: dict[str, dict[int, Record]], models: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = [
        "| arm | what it learns from | seeds | steps | CPU s | accuracy, % | NLL | forward KL | agreement, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in models.items():
        lines.append(f"| {name} | | | | | {100 * row['accuracy']:.1f} | {_of_tokens([row])} |")
    for arm, cells in by_arm.items():
        rows = list(cells.values())
        mean, half, n = interval([100 * row["accuracy"] for row in rows])
        cpu_s = sum(row["cpu_s"] for row in rows) / n
        cost = f"{n} | {rows[0]['steps']} | {cpu_s:.0f}"
        lines.append(f"| `{arm}` | {ARMS[arm].text} | {cost} | {mean:.1f} +- {half:.1f} | {_of_tokens(rows)} |")
    return lines


def _of_tokens(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over the rows of what measure.py says of the tokens of the data's completions."""
    nll, forward_kl, agreement = (
        sum(row[name] for row in rows) / len(rows) for name in ("nll", "forward_kl", "agreement")
    )
    return f"{nll:.3f} | {forward_kl:.3f} | {100 * agreement:.1f}"


def _answers(by_arm: dict[str, dict[int, Record]]) -> list[str]:
    lines = ["| question | pairs | difference, points | p | answer |", "|---|---|---|---|---|"]
    for ours, theirs, question in QUESTIONS:
        if (found := compare(by_arm, ours, theirs)) is None:
            lines.append(f"| {question} | | | | not run |")
            continue
        lines.append(
            f"| {question} | {found.n} | {found.mean:+.1f} +- {found.half:.1f} | {found.p:.2g} | {answer(found)} |"
        )
    return lines


def compare(by_arm: dict[str, dict[int, Record]], ours: str, theirs: str) -> Difference | None:
    """Accuracy in points, over the seeds that both have; None: less than two."""
    seeds = sorted(by_arm.get(ours, {}).keys() & by_arm.get(theirs, {}).keys())
    if len(seeds) < 2:
        return None
    values = [[100 * by_arm[arm][seed]["accuracy"] for seed in seeds] for arm in (ours, theirs)]
    return paired(*values)


def answer(found: Difference) -> str:
    if not found.is_significant:
        return "not found"
    return "yes" if found.mean > 0 else "no, worse"


def draw(by_arm: dict[str, dict[int, Record]], path: Path) -> None:
    """Accuracy of every cell, and of every arm over its CPU seconds."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "skill", "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        FigureCanvasSVG(figure)
        cells, seconds = figure.subplots(1, 2)
        _draw_cells(cells, by_arm)
        _draw_seconds(seconds, by_arm)
        figure.savefig(path, metadata={"Date": None})


def _draw_cells(axes: Axes, by_arm: dict[str, dict[int, Record]]) -> None:
    names = list(by_arm)[::-1]
    for place, arm in enumerate(names):
        values = [100 * record["accuracy"] for record in by_arm[arm].values()]
        mean, half, _ = interval(values)
        axes.plot(values, [place + 0.2] * len(values), "o", markersize=3, color=_colour(arm), alpha=0.5)
        axes.errorbar([mean], [place], xerr=[half], fmt="o", color=_colour(arm), capsize=3)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("accuracy, %")
    axes.set_title("each seed (small), mean and 95 % interval", fontsize=10)
    axes.grid(alpha=0.25, axis="x")


def _draw_seconds(axes: Axes, by_arm: dict[str, dict[int, Record]]) -> None:
    for arm, found in by_arm.items():
        rows = list(found.values())
        mean, half, n = interval([100 * row["accuracy"] for row in rows])
        cpu_s = sum(row["cpu_s"] for row in rows) / n
        axes.errorbar([cpu_s], [mean], yerr=[half], fmt="o", color=_colour(arm), capsize=3)
        axes.annotate(arm, (cpu_s, mean), textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.set_xlabel("CPU seconds of its steps")
    axes.set_ylabel("accuracy, %")
    axes.set_title("what it costs", fontsize=10)
    axes.margins(x=0.25)
    axes.grid(alpha=0.25)


def _colour(arm: str) -> str:
    return _COLOURS.get(arm.removesuffix("_equal_time"), "#9467bd")
