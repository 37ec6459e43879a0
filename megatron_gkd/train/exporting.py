"""The end of a run: the student is written to SAVE/hf, read back, and measured on the run's held-out rows. For a
student with adapters it is the adapter, in SAVE/adapter (and with --merge_lora the merged weights in SAVE/hf, which are
rounded once and not read back).

Weights are written in the dtype of the training, `--dtype`, whatever the dtype of the source's files. A bf16 number has
8 bits, and most updates of a short run at a learning rate of 1e-5 are below half of the last one. `--save_hf_dtype`
selects another dtype. The written files are read into the run's student, in the run's layout and dtype, and evaluated.
The result stands beside that of the trained student, in the log, in the record (export_record.py) and in the report.

Not covered: the fp32 main weights of a bf16 or fp16 run, which no forward pass has used. The checkpoint has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_gkd.config.dtypes import LONG_NAMES
from megatron_gkd.config.run import RunConfig
from megatron_gkd.model.build import DTYPES
from megatron_gkd.observe.compare import differing, side_by_side
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.train.adapting import read_adapter, write_adapter
from megatron_gkd.train.evaluate import evaluate
from megatron_gkd.train.export_record import check_replaceable, describe, is_seen_by_all, write_record
from megatron_gkd.train.faults import check_finite_weights
from megatron_gkd.train.setup import Run
from megatron_gkd.weights.export import save_hf
from megatron_gkd.weights.source import ModelSource

logger = get_logger(__name__)


def warn_of_rounding(config: RunConfig) -> None:
    """Warn at the start if the exported dtype cannot hold the trained weights."""
    chosen, held = config.checkpoint.save_hf_dtype, config.model.precision
    if config.checkpoint.save_hf and chosen not in (None, "fp32", held):
        what = "the type of the files of --model" if chosen == "source" else chosen
        logger.warning(
            "--save_hf_dtype %s: the student is trained in %s and exported in %s; updates that it cannot hold are lost",
            chosen,
            held,
            what,
        )


def export(run: Run, run_dir: Path) -> dict[str, Any]:
    """Write the directories of `RunConfig.exports` and the record, which is returned. Collective over the student's
    ranks.

    Raises:
        TrainingError: a weight is not finite.
        CheckpointError: it cannot be written.
    """
    check_finite_weights(run, run_dir)
    if run.is_writer:
        check_replaceable(run_dir, run.config.exports)  # once more: hours have passed
    chosen = run.config.checkpoint.save_hf_dtype or run.config.model.precision
    record: dict[str, Any] = {"step": run.train_iters, "dtype": chosen}
    if "hf" in run.config.exports:
        save_hf(
            run.student.chunks,
            run.architecture,
            run.student.groups,
            source_dir=run.config.model.model,
            out_dir=run_dir / "hf",
            dtype=None if chosen == "source" else DTYPES[chosen],
            stop_ids=run.stop_ids,
            replace=True,
        )
        record |= describe(run_dir / "hf") if run.is_writer else {}
    if "adapter" in run.config.exports:
        write_adapter(
            run.student.models,
            run.config,
            run.architecture,
            run.student.groups,
            run_dir / "adapter",
            base=run.base,
            dtype=run.config.model.precision if chosen == "source" else chosen,
            is_writer=run.is_writer,
        )
        record |= {"adapter": describe(run_dir / "adapter")} if run.is_writer else {}
    if run.is_writer:
        write_record(run_dir, record)
    return record


def measure_export(run: Run, run_dir: Path, record: Mapping[str, Any], *, trained: Mapping[str, float]) -> None:
    """Read the first exported directory back into the student, evaluate it, and add both results to the record.
    Collective over all ranks.

    Args:
        trained: the evaluation of the student as trained.

    Raises CheckpointError if it cannot be read back.
    """
    out_dir = run_dir / run.config.exports[0]
    if not is_seen_by_all(out_dir):
        return
    assert run.eval_rows is not None
    if run.config.tuner.is_lora:
        read_adapter(run.student.models, run.config, run.architecture, run.student.groups, out_dir)
    else:
        ModelSource(out_dir, run.architecture).load(run.student.models, run.student.groups)
    exported = evaluate(run, run.eval_rows)
    if run.is_writer:
        write_record(run_dir, {**record, "trained": dict(trained), "exported": exported})
        _say(record["dtype"], trained, exported)


def _say(dtype: str, trained: Mapping[str, float], exported: Mapping[str, float]) -> None:
    text = side_by_side(trained, exported)
    if differing(trained, exported):
        logger.warning(
            "THE EXPORTED STUDENT (%s) IS NOT THE TRAINED ONE: held-out %s. --save_hf_dtype chooses the type; the "
            "checkpoint holds all that was trained (megatron-gkd convert --to hf)",
            dtype,
            text,
        )
    else:
        logger.info("exported in %s; held-out, of the written files: %s", LONG_NAMES.get(dtype, dtype), text)
