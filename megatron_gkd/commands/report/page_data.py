"""What the page shows of one run, as JSON has it: page.js draws it, and nothing of it is computed there but means.

metrics, evaluations   columns by name, as in the run's files; more than MOST_POINTS rows are means of equal groups
positions, tables      of tokens.jsonl: divergence by place, and samples token by token, of the first evaluation,
                       the last, and some between
checks                 what is well and what is not, in words
memory                 peak of each rank as seen, and as `megatron-gkd plan --output json` has foreseen it
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from megatron_gkd.commands.report.run_record import Record, RunRecord
from megatron_gkd.commands.report.summary import QUANTITIES
from megatron_gkd.config.run import RunConfig
from megatron_gkd.observe.timers import PHASES

MOST_POINTS: Final = 1500
_MOST_TABLES: Final = 6
_ALIVE_S: Final = 60.0  # a run touches its lock every 10 s
_HALF: Final = 0.5  # of completions: above it, train/health.py warns
_GENERATED: Final = {
    "generate/accuracy": "accuracy of greedy completions",
    "generate/mean_length": "length of greedy completions, tokens",
    "generate/truncated": "greedy completions cut at their limit",
    "generate/repeated": "repeated in greedy completions",
}
_SHARES: Final = ("agreement", "generate/accuracy", "generate/truncated", "generate/repeated")


def run_data(run: RunRecord, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Args: summary: of the run, with sample answers where they were asked for."""
    state, why = state_of(run)
    return {
        "name": run.directory.resolve().name,
        "state": state,
        "state_text": why,
        "summary": dict(summary),
        "table": list(_table(summary)),
        "metrics": columns(run.metrics),
        "evaluations": columns(run.evaluations),
        "phases": list(PHASES),
        "positions": _some([row for row in run.tokens if "by_position" in row], ("step", "by_position")),
        "tables": [
            *_some(_samples_of(run, "evaluation"), ("step", "of", "texts", "samples")),
            *_some(_samples_of(run, "step"), ("step", "of", "texts", "samples")),
        ],
        "memory": _memory(run),
        "checks": list(checks(run, summary)),
        "events": list(run.events),
        "bad_steps": list(run.bad_steps),
        "config": changed(run.config),
    }


def state_of(run: RunRecord) -> tuple[str, str]:
    """(finished, running, failed or stopped; in words)."""
    planned, last = run.config.training.train_iters, run.events[-1] if run.events else {}
    done = f"{run.last_step}{f' of {planned}' if planned else ''} steps"
    if run.finished or (run.finished is None and last.get("kind") == "done"):
        return "finished", done
    if run.lock_age_s is not None and run.lock_age_s < _ALIVE_S:
        return "running", done
    if last.get("kind") in ("failed", "stopped"):
        return str(last["kind"]), f"{done}; {last.get('text', '')}"
    if run.lock_age_s is not None:
        return "stopped", f"{done}; no sign of life for {run.lock_age_s / 60:.0f} min: it was killed, or stands still"
    return "stopped", f"{done}; it has not ended as a run ends"


def columns(rows: Sequence[Record]) -> dict[str, Any]:
    """`{"each": 1, "columns": {"step": [1, 2], "loss": [2.5, None]}}`. None: not a number, or not in that row.

    `each` rows make one point: a mean of what is a number, at the last step of the group.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    each = -(-len(rows) // MOST_POINTS) or 1
    groups = [rows[i : i + each] for i in range(0, len(rows), each)]
    found: dict[str, list[Any]] = {}
    for name in names:
        found[name] = [
            group[-1]["step"] if name == "step" else _mean([row.get(name) for row in group]) for group in groups
        ]
    return {"each": each, "columns": found}


def _mean(values: Sequence[Any]) -> Any:
    numbers = [value for value in values if isinstance(value, (int, float))]
    if len(numbers) < 2:
        return numbers[0] if numbers else None
    return sum(numbers) / len(numbers)


def _samples_of(run: RunRecord, kind: str) -> list[Record]:
    return [row for row in run.tokens if row.get("of") == kind and row.get("samples") and "texts" in row]


def _some(rows: Sequence[Record], names: Sequence[str]) -> list[Record]:
    """The first, the last, and some between, evenly."""
    last = len(rows) - 1
    chosen = sorted({round(i * last / (_MOST_TABLES - 1)) for i in range(_MOST_TABLES)}) if rows else []
    return [{name: rows[i][name] for name in names} for i in chosen]


def _table(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    before, after, exported = (summary.get(name) or {} for name in ("before", "after", "exported"))
    for key, name in (QUANTITIES | _GENERATED).items():
        if key in before or key in after:
            values = {"before": before.get(key), "after": after.get(key), "exported": exported.get(key)}
            yield {"key": key, "name": name, "share": key in _SHARES, **values}


def _memory(run: RunRecord) -> dict[str, Any]:
    """Bytes; `seen` by rank, the most that any evaluation found."""
    rows = [row for row in run.tokens if row.get("memory_bytes")]
    seen = [max(ranks) for ranks in zip(*(row["memory_bytes"] for row in rows), strict=False)]
    kind = rows[-1].get("memory_kind", "") if rows else ""
    keys = ("rank", "student_stage", "teacher_stage", "peak_bytes", "needed_bytes")
    return {"seen": seen, "kind": kind, "planned": [{key: plan.get(key) for key in keys} for plan in run.plan]}


def checks(run: RunRecord, summary: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """`{"name", "status": ok, warn or "", "text"}` of everything that a run knows of its health."""
    last = run.metrics[-1] if run.metrics else {}
    if run.metrics:
        bad = last.get("bad_steps") or 0
        yield _check(
            "steps without an update", not bad, f"{bad:.0f}: loss or gradient was not finite" if bad else "none"
        )
        lost = sum(row.get("loss") is None for row in run.metrics)
        yield _check("loss", not lost, f"not finite in {lost} logged steps" if lost else "finite in every logged step")
    if run.events:
        count = {kind: sum(row.get("kind") == kind for row in run.events) for kind in ("warning", "resumed", "failed")}
        yield _check("warnings", not count["warning"], f"{count['warning']}, below" if count["warning"] else "none")
        yield _check(
            "starts that failed", not count["failed"], f"{count['failed']}, below" if count["failed"] else "none"
        )
        yield _check("resumes", None, str(count["resumed"]) if count["resumed"] else "none")
    for key, name in (("rollout/truncated", "completions cut at their limit"), ("rollout/repeated", "repeated text")):
        if (share := last.get(key)) is not None:
            yield _check(name, share <= _HALF, f"{share:.0%} in the last step")
    if (nats := last.get("health/logprob_difference")) is not None:
        yield _check("sampler against trainer", None, f"{nats:.2g} nats a token in the last step")
    if (overlap := last.get("health/top_overlap")) is not None:
        first = run.metrics[0].get("health/top_overlap")
        rises = "" if first is None else f", {first:.0%} at first"
        yield _check("teacher's 8 most probable tokens", None, f"{overlap:.0%} are the student's{rises}")
    if summary.get("exported"):
        differs = ", ".join(summary["export_differs_in"])
        text = f"read back, it differs in {differs}" if differs else "read back, it is the trained student"
        yield _check("exported student", not differs, text)


def _check(name: str, is_well: bool | None, text: str) -> dict[str, str]:
    return {"name": name, "status": "" if is_well is None else "ok" if is_well else "warn", "text": text}


def changed(config: RunConfig) -> dict[str, Any]:
    """Flags that are not at their defaults."""
    default = RunConfig.from_flat(
        {"model": config.model.model, "teacher_model": config.teacher.teacher_model}
    ).to_flat()
    flat = config.to_flat()
    return {
        name: value for name, value in flat.items() if value != default.get(name) or name in ("model", "teacher_model")
    }


def now() -> str:
    """When a page was made."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
