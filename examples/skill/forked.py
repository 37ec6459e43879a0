"""`megatron-gkd ...` many times over, each as a process of its own, without importing everything each time.

    run(["train", "--model", ...], Path("log.txt"))         also ["measure", ...], which is measure.py

Importing torch, megatron-core and vLLM takes half a minute of a core, and a cell of the study not much more. So this
process imports them once, does nothing with them, and forks; the child calls what `python -m megatron_gkd` calls. The
command line is the one that a user would type, and the record of the run is the same.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Final

# Read when vLLM and torch are imported.
_ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


_MODULES: Final = (
    *("transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama"),
    *("vllm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"),
    *("megatron_gkd.cli", "megatron_gkd.train.loop", "megatron_gkd.train.evaluate", "megatron_gkd.commands.sample"),
    *("megatron_gkd.rollout.vllm.colocate", "megatron_gkd.rollout.vllm.worker"),
)


@cache
def _import_everything() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from megatron_gkd.platform import import_megatron

    import_megatron()
    for name in _MODULES:
        import_module(name)
    gc.collect()
    gc.freeze()  # else every child walks, and so copies, all that was imported


def run(argv: Sequence[str], log: Path) -> int:
    """Carry out a command line with its output in `log`; returns the exit code."""
    _import_everything()
    child = os.fork()
    if not child:
        _become(argv, log)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except KeyboardInterrupt:  # the child has it too, and saves
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become(argv: Sequence[str], log: Path) -> None:
    """In the child; does not return."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["megatron-gkd", *argv]
        if argv[0] == "measure":
            from measure import main

            code = main(argv[1:])
        else:
            from megatron_gkd.cli import main as command

            code = command(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
