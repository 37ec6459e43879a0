"""The numbers of a report, and their text.

`summarise` gives a plain dictionary (summary.json as it stands); `to_text` lays it out. Divergences are means over
completion tokens, in nats; agreement is the share of tokens for which teacher and student have the same most probable
token.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_gkd.commands.report.run_record import RunRecord
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.servers import NoTeacher
from megatron_gkd.observe.compare import differing
from megatron_gkd.observe.progress import describe_phases
from megatron_gkd.observe.timers import PHASES

QUANTITIES = {  # key in evaluation.jsonl -> how the table calls it
    "forward_kl": "forward KL, nats/token",
    "reverse_kl": "reverse KL, nats/token",
    "jsd": "JSD, nats/token",
    "nll": "NLL of the text, nats/token",
    "agreement": "top-1 agreement",
}
WIDTH = 100


def summarise(run: RunRecord) -> dict[str, Any]:
    """Everything but the sample answers."""
    time_s = sum(row.get("step_time_s") or 0.0 for row in run.metrics)
    num_tokens = sum(row.get("num_tokens") or 0 for row in run.metrics)
    # --logging_steps n logs every n-th step: what was logged stands for the others
    scale = run.last_step / len(run.metrics) if run.metrics else 0.0
    return {
        "run": str(run.directory),
        "finished": run.finished,
        "steps": run.last_step,
        "planned_steps": run.config.training.train_iters,
        "teacher_model": run.config.teacher.teacher_model or run.config.teacher.teacher_model_server,
        "model": run.config.model.model,
        "exported_model": str(run.exported) if run.exported else None,
        "loss": describe_loss(run.config),
        "layout": describe_layout(run),
        "training_s": round(time_s * scale, 3) if time_s else None,
        "num_tokens": round(num_tokens * scale) if num_tokens else None,
        "phases": {name: _total(run, f"{name}_s") / time_s for name in PHASES} if time_s else {},
        "tokens_per_s": round(num_tokens / time_s, 3) if time_s else None,
        "first_loss": run.metrics[0].get("loss") if run.metrics else None,
        "last_loss": run.metrics[-1].get("loss") if run.metrics else None,
        "eval_dataset": list(run.config.data.eval_dataset),
        "supervised": supervised_part(run),
        "before": run.evaluations[0] if run.evaluations and run.evaluations[0]["step"] == 0 else None,
        "after": run.evaluations[-1] if run.evaluations and run.evaluations[-1]["step"] > 0 else None,
        "exported": run.export.get("exported"),
        "export_differs_in": _differences(run),
        "export_dtype": run.export.get("dtype"),
    }


def supervised_part(run: RunRecord) -> dict[str, Any] | None:
    """The last evaluation before the student's own samples came in, of a run that began without them."""
    first = first_sampled_step(run) or 0
    earlier = [row for row in run.evaluations if 0 < row["step"] < first]
    return dict(earlier[-1]) if earlier else None


def first_sampled_step(run: RunRecord) -> int | None:
    """The first step that trained on samples of the student."""
    return next((row["step"] for row in run.metrics if row.get("source/student/num_samples")), None)


def _total(run: RunRecord, name: str) -> float:
    return sum(row.get(name) or 0.0 for row in run.metrics)


def _differences(run: RunRecord) -> list[str]:
    """In which numbers the files of the export are not the student that was trained."""
    trained, exported = run.export.get("trained"), run.export.get("exported")
    return differing(trained, exported) if trained and exported else []


def describe_loss(config: RunConfig) -> str:
    """What was minimised, in words."""
    if isinstance(config.teacher.kind, NoTeacher):
        return "cross entropy (SFT); completions: the data set's"
    loss = config.distillation
    names = {0.0: "forward KL (beta 0)", 1.0: "reverse KL (beta 1)"}
    text = f"generalized JSD (beta {loss.beta})"
    if not isinstance(loss.beta, str):
        text = names.get(loss.beta, f"generalized JSD (beta {loss.beta:g})")
    text += f", teacher's top {loss.gkd_logits_topk}" if loss.gkd_logits_topk else ", full vocabulary"
    if loss.sft_alpha:
        text += f", + {loss.sft_alpha:g} x cross entropy"
    rest = "the teacher's samples" if loss.seq_kd else "the data set's"
    sources = {0.0: f"completions: {rest}", 1.0: "completions: the student's samples"}
    if isinstance(loss.lmbda, str):
        return f"{text}; completions: student samples (lambda {loss.lmbda}), else {rest}"
    return f"{text}; {sources.get(loss.lmbda, f'completions: {loss.lmbda:.0%} student samples, else {rest}')}"


def describe_layout(run: RunRecord) -> str:
    """Of both models, and the precision."""
    student, teacher = run.config.parallel, run.config.teacher
    sizes = student.tensor_model_parallel_size, student.context_parallel_size, student.pipeline_model_parallel_size
    if isinstance(teacher.kind, NoTeacher):
        return f"student {_sizes(*sizes)}, {run.config.model.dtype}"
    asked = (
        teacher.teacher_tensor_model_parallel_size,
        teacher.teacher_context_parallel_size,
        teacher.teacher_pipeline_model_parallel_size,
    )
    of_teacher = (own or size for own, size in zip(asked, sizes, strict=True))
    return f"student {_sizes(*sizes)}, teacher {_sizes(*of_teacher)}, {run.config.model.dtype}"


def _sizes(tensor: int, context: int, pipeline: int) -> str:
    return f"TP {tensor}{f' x CP {context}' if context > 1 else ''} x PP {pipeline}"


def to_text(summary: Mapping[str, Any]) -> str:
    """summary.txt."""
    return "\n".join([*_head(summary), "", *_table(summary), *_answers(summary)])


def _head(summary: Mapping[str, Any]) -> Iterator[str]:
    planned = f" of {summary['planned_steps']}" if summary["planned_steps"] else ""
    states = {True: "finished", False: "NOT FINISHED (still training, or interrupted)", None: "no export asked for"}
    state = states[summary["finished"]]
    yield f"Run {summary['run']}: {state}, {summary['steps']}{planned} steps"
    yield f"  teacher   {summary['teacher_model'] or 'none'}"
    yield f"  student   {summary['model']}  ->  {summary['exported_model'] or '(not exported)'}"
    yield f"  loss      {summary['loss']}"
    yield f"  layout    {summary['layout']}"
    if summary["training_s"]:
        yield (
            f"  training  {_duration(summary['training_s'])}, {summary['num_tokens'] or 0:,} completion tokens, "
            f"{summary['tokens_per_s'] or 0:,.1f} tokens/s"
        )
    if any(summary["phases"].values()):
        yield f"            of it {describe_phases(summary['phases'])}"
    if summary["first_loss"] is not None and summary["last_loss"] is not None:
        yield f"            loss {summary['first_loss']:.4f} at first, {summary['last_loss']:.4f} at last"


def _table(summary: Mapping[str, Any]) -> Iterator[str]:
    before, after = summary["before"], summary["after"]
    if not before and not after:
        yield "No evaluation: the run had no --eval_dataset, or has not reached its first evaluation."
        return
    num_tokens = (after or before).get("num_tokens")
    tokens = f"{num_tokens:,.0f} completion tokens of " if num_tokens else ""
    yield f"Held-out text: {tokens}{', '.join(summary['eval_dataset'])}"
    supervised = summary.get("supervised")
    columns = {"before": before or {}}
    if supervised:
        columns[f"step {supervised['step']}"] = supervised
    columns["after"] = after or {}
    if summary.get("exported"):
        columns["exported"] = summary["exported"]
    yield f"  {'':<30}{''.join(f'{name:>12}' for name in columns)}   change"
    for key, name in QUANTITIES.items():
        old, new = columns["before"].get(key), columns["after"].get(key)
        if old is not None or new is not None:
            cells = "".join(f"{_cell(key, values.get(key)):>12}" for values in columns.values())
            yield f"  {name:<30}{cells}   {_change(key, old, new)}".rstrip()
    if supervised:
        yield f"  step {supervised['step']}: taught on the data's completions; after: on the student's own too"
    yield from _export(summary)


def _export(summary: Mapping[str, Any]) -> Iterator[str]:
    if not summary.get("exported"):
        return
    if summary["export_differs_in"]:
        yield (
            f"  THE EXPORTED STUDENT, in {summary['export_dtype']}, IS NOT THE TRAINED ONE: its files were read back "
            "and give other numbers"
        )
    else:
        yield f"  exported: the files of hf/ ({summary['export_dtype']}), read back: the numbers of the trained student"


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if key == "agreement" else f"{value:.4f}"


def _change(key: str, old: float | None, new: float | None) -> str:
    if old is None or new is None:
        return ""
    if key == "agreement":
        return f"{(new - old) * 100:+.1f} points"
    return f"x {new / old:.2f}" if old > 0 else ""


def _answers(summary: Mapping[str, Any]) -> Iterator[str]:
    for number, answer in enumerate(summary.get("answers", ()), start=1):
        yield ""
        yield f"Sample {number}, greedy, at most {summary['max_new_tokens']} tokens"
        for who in ("prompt", "reference", "teacher", "student before", "student after"):
            if who in answer:
                yield from _labelled(who, answer[who])
    for note in summary.get("answer_notes", ()):
        yield f"  note: {note}"


def _labelled(label: str, text: str) -> Iterator[str]:
    text = "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text.strip())
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, WIDTH - 18) or [""]]
    for i, line in enumerate(lines):
        yield f"  {label if i == 0 else '':<16}{line}".rstrip()


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
