"""`python -m megatron_gkd.commands.launcher ARGS`: torchrun, but its last line and its exit code are those of a rank.

torchrun ends a run that failed or was stopped with its own traceback and exit code 1. The line that says what to do is
then forty lines further up, and 75 (stopped, with a checkpoint) looks like an error. So the scripts in `launch/` start
this module instead. It takes torchrun's arguments, runs it, and then repeats the last line of a rank.

Each rank writes its line, its exit code and the number of its start to the directory in GKD_LAST_WORDS (cli.py). The
line of the lowest rank of the last start is repeated. Plain torchrun works too: it shows the line in its table of
failed ranks.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_gkd.config.environment import LAST_WORDS


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks, wait for them; returns the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    with tempfile.TemporaryDirectory(prefix="megatron-gkd-") as words:
        os.environ[LAST_WORDS] = words
        try:
            run(parse_args(list(sys.argv[1:] if argv is None else argv)))
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            text = f"megatron-gkd: rank {rank} ended with exit code {failure.exitcode}, without a word; see above"
            return _say(Path(words), text, failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
        except SignalException as stopped:
            text = f"megatron-gkd: {stopped.sigval.name} was received, and the ranks have ended; see above"
            return _say(Path(words), text, 128 + stopped.sigval)
    return 0


def _say(words: Path, otherwise: str, code: int) -> int:
    """Print the line of the lowest rank of the last start, or `otherwise`; returns its exit code, or `code`."""
    found = sorted(words.glob("*.json"), key=lambda path: int(path.stem))
    said = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    last = max((int(one["attempt"]) for one in said), default=0)
    text = otherwise
    for one in said:
        if int(one["attempt"]) == last:
            text, code = str(one["text"]), int(one["code"])
            break
    sys.stderr.write(f"\n{text}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
