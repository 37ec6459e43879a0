"""Errors that a user can act on.

Every message says what was given, what is needed and what to do. `GKDError` is the root, so that the command line can
print the message alone (no traceback) for all of them; each also derives from the built-in type that a library caller
would expect. Violations of our own invariants are `assert`s, not these.
"""

from __future__ import annotations


class GKDError(Exception):
    """Root of all errors that are the input's fault, not the program's.

    `reported_elsewhere` is set on an error that another rank reports too: then one rank per machine prints it.
    """

    reported_elsewhere = False


class ConfigError(GKDError, ValueError):
    """A flag, a configuration file, or a combination of flags is out of range or contradictory."""


class NotBuiltError(GKDError, NotImplementedError):
    """A documented feature that this version does not have yet; raised before any work begins."""


class ShapeError(GKDError, ValueError):
    """A tensor's shape, dtype or device does not fit the others."""


class DataError(GKDError, ValueError):
    """A data set file or row cannot be used; the message names file and line."""


class CheckpointError(GKDError, ValueError):
    """A checkpoint (Hugging Face or Megatron) is missing, damaged, belongs to another model or would be overwritten."""


class LayoutError(ConfigError):
    """A parallel layout does not fit the world size or the model."""


class RolloutError(GKDError, RuntimeError):
    """A sampling engine or a teacher server failed, cannot be reached, gave a wrong answer, holds the wrong weights, or
    was called in the wrong order."""


class TrainingError(GKDError, RuntimeError):
    """A run cannot continue: its numbers are not finite, a rank is lost, or its record cannot be written."""


class RunStoppedError(GKDError):
    """A run was asked to stop and has saved a checkpoint. Not a failure; the command ends with exit code 75."""


class CheckFailedError(GKDError):
    """`megatron-gkd check` found a difference beyond its tolerance, or `sample` has no row to write; the command ends
    with exit code 1, not 2."""
