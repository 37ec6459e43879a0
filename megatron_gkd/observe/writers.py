"""Where a run's numbers go: a JSONL file always, TensorBoard and wandb on request.

Every writer takes a step number and a flat mapping of names to numbers, one call per logged step, from one rank. Names
carry their unit (`step_time_s`, `tokens_per_s`, `num_tokens`).

Resume: `first_step` is the first step that the resumed run will write. The interrupted run's rows from that step on are
removed, so that a resumed run leaves the same record as one that was never interrupted. Without `first_step` the run is
new, and an existing record is an error.
"""

from __future__ import annotations

import contextlib
import html
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_gkd.errors import ConfigError, DataError, TrainingError
from megatron_gkd.observe.advice import go_on
from megatron_gkd.observe.logging import get_logger

logger = get_logger(__name__)


class MetricsWriter(Protocol):
    """A destination of metrics."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record one step."""

    def close(self) -> None:
        """Flush and release."""


class Tracker(MetricsWriter, Protocol):
    """A destination that also shows tables of text."""

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a table of one step; all rows have the same columns."""


def open_trackers(
    report_to: Sequence[str], run_dir: Path, *, first_step: int | None = None, config: Mapping[str, Any] | None = None
) -> list[Tracker]:
    """The destinations in --report_to."""
    writers: list[Tracker] = []
    if "tensorboard" in report_to:
        writers.append(TensorBoardWriter(run_dir / "tensorboard", first_step=first_step))
    if "wandb" in report_to:
        writers.append(WandbWriter(run_dir, first_step=first_step, config=config))
    return writers


class JsonlWriter:
    """One JSON object a line, `{"step": 1, "loss": 2.3}`, on disk when `write` returns. NaN and infinities are null."""

    def __init__(self, path: Path, *, first_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if first_step is not None:
            _take_back(path, first_step)
        elif path.exists() and path.stat().st_size > 0:
            raise ConfigError(f"{path} holds an earlier run; give another --save, or --load it to resume")
        # Unbuffered: what a full disk did not take is not tried again when the file is closed.
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.append({"step": step} | {name: _finite(value) for name, value in values.items()})

    def append(self, row: Mapping[str, Any]) -> None:
        """Record a row unchanged. Raises ValueError for a number that JSON cannot represent."""
        rest = (json.dumps(row, allow_nan=False) + "\n").encode()
        with explain_write_errors(self._path):
            while rest:  # a nearly full disk takes a part, then nothing
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """TensorBoard event files, one scalar per name."""

    def __init__(self, directory: Path, *, first_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._directory = directory
        with explain_write_errors(directory):
            self._writer: Any = SummaryWriter(str(directory), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with explain_write_errors(self._directory):
            for name, value in values.items():
                self._writer.add_scalar(name, float(value), step)
            self._writer.flush()

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        with explain_write_errors(self._directory):
            self._writer.add_text(name, _markdown(rows), step)
            self._writer.flush()

    def close(self) -> None:
        with explain_write_errors(self._directory):
            self._writer.close()


class WandbWriter:
    """Weights & Biases. A resumed run continues the wandb run whose id is in `wandb_id.txt` of the run directory."""

    def __init__(
        self, run_dir: Path, *, first_step: int | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("--report_to wandb needs the package wandb; install it, or leave wandb out") from error
        id_file = run_dir / "wandb_id.txt"
        run_id = id_file.read_text().strip() if first_step is not None and id_file.exists() else uuid.uuid4().hex[:12]
        run_dir.mkdir(parents=True, exist_ok=True)
        id_file.write_text(run_id + "\n")
        self._run: Any = wandb.init(
            id=run_id, name=run_dir.name, dir=str(run_dir), config=dict(config or {}), resume="allow"
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._run.log({name: table}, step=step)

    def close(self) -> None:
        self._run.finish()


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turns errors of a full disk or a removed directory into a TrainingError with the file and what to do."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written ({error.strerror or error}), so the record of the run would have a gap: make "
            f"room, and {go_on(path.parent)}"
        ) from error


def read_rows(path: Path, *, strict: bool = False) -> list[dict[str, Any]]:
    """The rows of a JSONL record; [] where there is no file. Other lines are left out, with a warning.

    Args:
        strict: DataError for another line, unless it is the last one without its line break: the run is writing it, or
            was killed while it did.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode(errors="strict" if strict else "replace"))
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif strict and line.strip() and number < len(lines):
            raise DataError(f"{path}:{number} is not a row of metrics: the file is damaged, or of another program")
        elif line.strip() and not strict:
            logger.warning("%s:%d is not a row of metrics and is left out", path, number)
    return rows


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table in TensorBoard's Markdown, with the texts escaped."""

    def cell(value: Any) -> str:
        text = "" if value is None else html.escape(str(value))
        return text.replace("\\", "&#92;").replace("|", "&#124;").replace("`", "&#96;").replace("\n", "<br>")

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _take_back(path: Path, first_step: int) -> None:
    """Keep only the rows before `first_step`; the file is replaced atomically."""
    kept = [row for row in read_rows(path) if row["step"] < first_step]
    beside = path.with_name(path.name + ".new")
    beside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(beside, path)


def _finite(value: float) -> float | int | None:
    """The value as a number that JSON can represent; a scalar tensor is converted."""
    number: float = value.item() if hasattr(value, "item") else value
    return number if math.isfinite(number) else None
