"""curve.png: training loss, held-out divergences and agreement over the steps, side by side.

A panel without data says so instead of staying blank. Drawn without a display.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_gkd.commands.report.run_record import Record, RunRecord
from megatron_gkd.commands.report.summary import describe_loss, first_sampled_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DIVERGENCES = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "jsd": "JSD"}
_COLOURS = {
    "forward_kl": "#1f77b4",
    "reverse_kl": "#d62728",
    "jsd": "#2ca02c",
    "loss": "#1f77b4",
    "agreement": "#9467bd",
}
_WINDOW = 9  # steps in the centred mean that is drawn over a noisy loss


def draw_curve(run: RunRecord, path: Path) -> None:
    """Write the picture of a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, divergences, agreement = figure.subplots(1, 3)
    _draw_loss(loss, run)
    _draw_divergences(divergences, run.evaluations)
    _draw_agreement(agreement, run.evaluations)
    for axes in (loss, divergences, agreement):
        _shade_sampled_steps(axes, run)
    figure.suptitle(f"{run.directory.name}: {describe_loss(run.config)}", fontsize=11)
    figure.savefig(path, dpi=130)


def _draw_loss(axes: Axes, run: RunRecord) -> None:
    steps, values = series(run.metrics, "loss")
    _prepare(axes, "training loss per token", "nats", empty=not steps)
    if not steps:
        return
    if len(values) < 2 * _WINDOW:
        axes.plot(steps, values, color=_COLOURS["loss"], marker="o", markersize=3)
    else:
        axes.plot(steps, values, color=_COLOURS["loss"], alpha=0.35, linewidth=1)
        axes.plot(steps, smooth(values, _WINDOW), color=_COLOURS["loss"], linewidth=2)
    axes.set_ylim(bottom=0)


def _draw_divergences(axes: Axes, evaluations: tuple[Record, ...]) -> None:
    found = {key: series(evaluations, key) for key in _DIVERGENCES}
    _prepare(
        axes, "held-out divergence from the teacher", "nats per token", empty=not any(s for s, _ in found.values())
    )
    for key, (steps, values) in found.items():
        if steps:
            label = f"{_DIVERGENCES[key]}: {values[0]:.2f} to {values[-1]:.2f}"
            axes.plot(steps, values, color=_COLOURS[key], marker="o", markersize=4, label=label)
    if axes.lines:
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))  # below: it covers no curve


def _draw_agreement(axes: Axes, evaluations: tuple[Record, ...]) -> None:
    steps, values = series(evaluations, "agreement")
    _prepare(axes, "held-out top-1 agreement", "% of tokens", empty=not steps)
    if not steps:
        return
    percent = [100 * value for value in values]
    axes.plot(steps, percent, color=_COLOURS["agreement"], marker="o", markersize=4)
    for i in {0, len(steps) - 1}:
        axes.annotate(
            f"{percent[i]:.1f} %", (steps[i], percent[i]), textcoords="offset points", xytext=(0, 9), ha="center"
        )
    axes.margins(x=0.12)
    axes.set_ylim(0, 1.2 * max(*percent, 1.0))  # room for the line and its numbers, also near 100 %


def _shade_sampled_steps(axes: Axes, run: RunRecord) -> None:
    """Where a run that began on the data's completions trains on the student's own."""
    first = first_sampled_step(run)
    if first is None or first == 1 or not axes.lines:
        return
    axes.axvspan(first - 0.5, run.last_step + 0.5, color="#ff7f0e", alpha=0.08, linewidth=0)
    axes.text(
        0.99, 0.02, "the student's own samples", transform=axes.transAxes, ha="right", color="#b35900", fontsize=8
    )


def _prepare(axes: Axes, title: str, unit: str, *, empty: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if empty:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes, color="grey")


def series(records: tuple[Record, ...], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records that have a number under `key`."""
    rows = [(record["step"], record[key]) for record in records if isinstance(record.get(key), (int, float))]
    return [step for step, _ in rows], [value for _, value in rows]


def smooth(values: list[float], window: int) -> list[float]:
    """Centred mean; at the ends over what is there, symmetrically."""
    result = []
    for i in range(len(values)):
        reach = min(window // 2, i, len(values) - 1 - i)
        part = values[i - reach : i + reach + 1]
        result.append(sum(part) / len(part))
    return result
