"""`megatron-gkd report RUN`: what a run did, as text, JSON and a picture.

    RUN/report/summary.txt      the table before/after, training time and speed, sample answers (also printed)
    RUN/report/summary.json     the same numbers and answers for programs
    RUN/report/curve.png        training loss and held-out divergences over the steps

    run_record.py   reads a run directory             summary.py   numbers and text
    answers.py      greedy answers of three models    curve.py     the picture

Reads a run that still trains, was interrupted, or has no evaluation; it says what is missing. Runs in one process on
the CPU, and says on stderr what it is at; changes nothing in the run directory but `report/`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_gkd.commands.report.run_record import read_run
from megatron_gkd.commands.report.summary import summarise, to_text
from megatron_gkd.observe.logging import get_logger, setup_logging
from megatron_gkd.observe.text import visible

logger = get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Raises GKDError for a directory that is no run."""
    parser = argparse.ArgumentParser(prog="megatron-gkd report", description="Summarise a run directory.")
    parser.add_argument("run", type=Path, help="run directory: the --save of `megatron-gkd train`")
    parser.add_argument("--num_answers", type=int, default=2, help="held-out prompts to answer (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.num_answers < 0 or args.max_new_tokens < 1:
        parser.error("--num_answers must be 0 or more and --max_new_tokens at least 1")
    setup_logging("info")
    write_report(args.run, num_answers=args.num_answers, max_new_tokens=args.max_new_tokens)
    return 0


def write_report(run_dir: Path, *, num_answers: int = 2, max_new_tokens: int = 64) -> Path:
    """Print the report of `run_dir` and write it to `run_dir`/report, whose path is returned."""
    logger.info("reading %s", run_dir)
    run = read_run(run_dir)
    summary = summarise(run)
    if num_answers:
        from megatron_gkd.commands.report.answers import sample_answers

        summary = summary | sample_answers(run, num_answers=num_answers, max_new_tokens=max_new_tokens)
    text = visible(to_text(summary))
    print(text, flush=True)
    out = run.directory / "report"
    out.mkdir(exist_ok=True)
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    (out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    from megatron_gkd.commands.report.curve import draw_curve

    draw_curve(run, out / "curve.png")
    print(f"\nreport: {out / 'summary.txt'}, {out / 'summary.json'}, {out / 'curve.png'}", flush=True)
    return out
