"""Saving: everything is written to a hidden directory, flushed, hashed, listed in a manifest, and renamed; then the
pointer is set.

    begin    removes leftovers, makes the hidden directory, plans the shards     collective over WORLD
    write    each rank its own shards, then their checksums                      at once, or in a thread (--async_save)
    finish   results to the first rank: metadata, state, random states,          collective over WORLD, after all have
             manifest, rename, pointer, then deletion by --save_total_limit      written

A failure on one rank is a CheckpointError on all; the hidden directory is removed, and earlier checkpoints are
unchanged. A rank that is killed at any time leaves at most the hidden directory.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_gkd.errors import CheckpointError
from megatron_gkd.observe.advice import go_on
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.together import all_true, first_problem, gathered_first, on_first
from megatron_gkd.train.checkpoint import files
from megatron_gkd.train.checkpoint.rng import pack, rng_states
from megatron_gkd.train.checkpoint.scales import SCALES_FILE, own_scales, pack_scales
from megatron_gkd.train.checkpoint.sharded import sharded_state
from megatron_gkd.train.checkpoint.state import (
    RNG_FILE,
    ROLLOUTS_FILE,
    RUN_FILE,
    STATE_FILE,
    RunDescription,
    TrainerState,
    to_json,
)
from megatron_gkd.train.checkpoint.writing import ShardWriter
from megatron_gkd.train.student import Student

logger = get_logger(__name__)


@dataclass
class _Outcome:
    """The result of a rank's writing."""

    results: list[Any] = field(default_factory=list)
    entries: dict[str, files.Entry] = field(default_factory=dict)
    problem: str | None = None


class Save:
    """One save under way: a checkpoint of `state.step`, then the pointer; then all but the `keep` newest are deleted.
    Created and finished by all ranks of WORLD together. Raises CheckpointError on all ranks.

    `student` is None on a rank without one; `rollouts` are sampled completions that are not yet trained on
    (train/rollouts.py).
    """

    def __init__(
        self,
        run_dir: str | Path,
        student: Student | None,
        state: TrainerState,
        *,
        description: RunDescription,
        keep: int | None = None,
        rollouts: Mapping[str, Any] | None = None,
        in_background: bool = False,
        with_optimizer: bool = True,
        with_rng: bool = True,
    ) -> None:
        self._root = Path(run_dir).absolute() / "checkpoints"
        self._begun_s = time.monotonic()
        self._keep = keep
        self._final = files.checkpoint_path(self._root, state.step)
        self._directory = files.writing_path(self._root, state.step)
        self._texts = {STATE_FILE: to_json(state), RUN_FILE: to_json(description)}
        if rollouts:
            self._texts[ROLLOUTS_FILE] = json.dumps(rollouts)
        self._of_ranks = gathered_first((rng_states() if with_rng else {}, own_scales(student)))
        self._outcome = _Outcome()
        self._check(on_first(self._prepare))
        self._shards = ShardWriter(
            sharded_state(student, is_loading=False, with_optimizer=with_optimizer),
            self._directory,
            copy=in_background,
        )
        self._thread: threading.Thread | None = None
        if in_background:
            # A daemon: a rank that ends by an error does not wait, and leaves the hidden directory.
            self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write()

    def is_written(self) -> bool:
        """Whether `finish` would not wait. Collective: one all_reduce."""
        return all_true(self._thread is None or not self._thread.is_alive())

    def finish(self) -> Path:
        """Wait for all ranks and publish; returns the checkpoint's directory. Collective."""
        if self._thread is not None:
            self._thread.join()
        self._check(first_problem(self._outcome.problem))
        outcomes = gathered_first(self._outcome)
        self._check(on_first(lambda: self._publish(outcomes or [])))
        if dist.get_rank() == 0:
            logger.info("checkpoint %s saved, %.1f s after it was begun", self._final, time.monotonic() - self._begun_s)
        return self._final

    def _prepare(self) -> str | None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            files.remove_unfinished(self._root)
            self._directory.mkdir()
        except OSError as error:
            return files.describe_failure(error, self._root)
        return None

    def _write(self) -> None:
        try:
            results = self._shards.write()
            names = {result.storage_data.relative_path for result in results}
            entries = {name: files.hash_file(self._directory / name) for name in names}
            self._outcome = _Outcome(results, entries)
        except Exception as error:  # in a thread there is nobody to raise to
            self._outcome = _Outcome(problem=files.describe_failure(error, self._root, self._shards.num_bytes))

    def _publish(self, outcomes: list[_Outcome]) -> str | None:
        """On the first rank."""
        assert self._of_ranks is not None
        rng, scales = zip(*self._of_ranks, strict=True)
        try:
            self._shards.finish([outcome.results for outcome in outcomes])
            for name, text in self._texts.items():
                files.write_durably(self._directory / name, text)
            if any(rng):
                files.write_durably(self._directory / RNG_FILE, pack(rng))
            if packed := pack_scales(scales):
                files.write_durably(self._directory / SCALES_FILE, packed)
            entries = {name: entry for outcome in outcomes for name, entry in outcome.entries.items()}
            for path in self._directory.iterdir():
                if path.name not in entries:
                    files.sync(path)
                    entries[path.name] = files.hash_file(path)
            files.write_manifest(self._directory, entries)
            files.publish(self._directory, self._final)
        except Exception as error:
            return files.describe_failure(error, self._root)
        try:
            files.keep_newest(self._root, self._keep)
        except OSError as error:
            logger.warning("%s: an older checkpoint could not be deleted: %s", self._root, error)
        return None

    def _check(self, problem: str | None) -> None:
        """Raise on all ranks, after removing the hidden directory, so that a full disk does not stay full."""
        if problem is None:
            return
        dist.barrier()  # nobody writes any more
        if dist.get_rank() == 0:
            shutil.rmtree(self._directory, ignore_errors=True)
        raise CheckpointError(
            f"{self._final} could not be saved: {problem}. It was removed; {go_on(self._root.parent)}"
        )


class Checkpoints:
    """The saves of a run, one at a time; in the background if requested. Every method is collective."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        description: RunDescription,
        keep: int | None,
        in_background: bool,
        with_optimizer: bool = True,
        with_rng: bool = True,
    ) -> None:
        self._options: dict[str, Any] = dict(
            description=description,
            keep=keep,
            in_background=in_background,
            with_optimizer=with_optimizer,
            with_rng=with_rng,
        )
        self._run_dir = run_dir
        self._pending: Save | None = None

    def save(self, student: Student | None, state: TrainerState, *, rollouts: Mapping[str, Any] | None = None) -> None:
        """Start a save, after finishing one under way. Complete on return, unless in the background."""
        self.finish()
        self._pending = Save(self._run_dir, student, state, rollouts=rollouts, **self._options)
        if not self._options["in_background"]:
            self.finish()

    def poll(self) -> None:
        """Between two steps: publish a save that all ranks have written."""
        if self._pending is not None and self._pending.is_written():
            self.finish()

    def finish(self) -> None:
        """Wait for a save under way, and publish it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.finish()
