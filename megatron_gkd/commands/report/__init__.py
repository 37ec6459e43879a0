"""`megatron-gkd report RUN`: what a run did, as a page to look at, text, JSON and a picture.

    RUN/report/report.html      everything to look at, in one file: curves, tokens, phases, health
    RUN/report/summary.txt      the table before/after, training time and speed, sample answers (also printed)
    RUN/report/summary.json     the same numbers and answers for programs
    RUN/report/curve.png        training loss and held-out divergences over the steps

    run_record.py   reads a run directory             summary.py   numbers and text
    answers.py      greedy answers of three models    curve.py     the picture
    page_data.py    what the page shows               page.py      the page, with assets/page.js and page.css

`--compare RUN RUN ...` writes one page with the curves of all runs over each other; `--watch` writes the page again and
again while a run goes on. Reads a run that still trains, was interrupted, or has no evaluation; it says what is
missing. Runs in one process on the CPU, and says on stderr what it is at; changes nothing in the run directory but
`report/`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from megatron_gkd.commands.report.page import write_page
from megatron_gkd.commands.report.page_data import run_data, state_of
from megatron_gkd.commands.report.run_record import read_run
from megatron_gkd.commands.report.summary import summarise, to_text
from megatron_gkd.observe.logging import get_logger, setup_logging
from megatron_gkd.observe.text import visible

logger = get_logger(__name__)

PAGE: Final = "report.html"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Raises GKDError for a directory that is no run."""
    parser = argparse.ArgumentParser(prog="megatron-gkd report", description="Summarise a run directory.")
    parser.add_argument("run", type=Path, nargs="+", help="run directory: the --save of `megatron-gkd train`")
    parser.add_argument("--num_answers", type=int, default=2, help="held-out prompts to answer (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer (default: %(default)s)")
    parser.add_argument("--compare", action="store_true", help="one page with the curves of several runs")
    parser.add_argument(
        "--out", type=Path, help="the page of --compare (default: report/compare.html of the first run)"
    )
    parser.add_argument("--watch", action="store_true", help="write the page again while the run goes on")
    parser.add_argument("--watch_s", type=float, default=10.0, help="seconds between two pages (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.num_answers < 0 or args.max_new_tokens < 1 or args.watch_s <= 0:
        parser.error("--num_answers must be 0 or more, --max_new_tokens at least 1, and --watch_s above 0")
    if args.compare != (len(args.run) > 1):
        parser.error(f"{len(args.run)} runs were given: one, or with --compare two or more")
    if (args.compare and args.watch) or (args.out and not args.compare):
        parser.error("--watch is for one run, --out for --compare")
    setup_logging("info")
    if args.compare:
        compare(args.run, args.out or args.run[0] / "report/compare.html")
    elif args.watch:
        watch(args.run[0], every_s=args.watch_s)
    else:
        write_report(args.run[0], num_answers=args.num_answers, max_new_tokens=args.max_new_tokens)
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
    write_page(out / PAGE, [run_data(run, summary)])
    from megatron_gkd.commands.report.curve import draw_curve

    draw_curve(run, out / "curve.png")
    print(f"\nreport: {out / PAGE}, {out / 'summary.txt'}, {out / 'summary.json'}, {out / 'curve.png'}", flush=True)
    return out


def compare(run_dirs: Sequence[Path], out: Path) -> None:
    """One page of several runs. Raises GKDError where one is no run."""
    runs = [run_data(run, summarise(run)) for run in map(read_run, run_dirs)]
    for run, name in zip(runs, _names(run_dirs), strict=True):
        run["name"] = name
    write_page(out, runs)
    print(f"report: {out}", flush=True)


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """The last parts of the paths that tell them apart."""
    parts = [path.resolve().parts for path in run_dirs]
    depth = next((n for n in range(1, max(map(len, parts))) if len({p[-n:] for p in parts}) == len(parts)), 1)
    return ["/".join(p[-depth:]) for p in parts]


def watch(run_dir: Path, *, every_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Write the page until the run has finished or nobody is at work in it; the last one does not load itself again."""
    out = run_dir / "report" / PAGE
    while True:
        run = read_run(run_dir)
        state, text = state_of(run)
        goes_on = state == "running"
        write_page(out, [run_data(run, summarise(run))], refresh_s=every_s if goes_on else None)
        logger.info("%s: %s, %s", out, state, text)
        if not goes_on:
            return
        sleep(every_s)
