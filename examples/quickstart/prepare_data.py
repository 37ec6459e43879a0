"""Prepare the data of the quick start: grade-school word problems with step-by-step solutions, generated here.

    python examples/quickstart/prepare_data.py --out cache/quickstart/data

Source: the `gsm_symbolic` family of reasoning-gym 0.1.25 (Apache-2.0), a deterministic generator: the same seed and the
same version give the same rows. Each line of `train.jsonl` and `held_out.jsonl` is one row of chat messages:

    {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": SOLUTION}],
     "answer": "48", "generator_index": 17}

Held out by generator index: rows 0 .. train-1 train, the next ones are held out, and a held-out question that also
occurs in the training rows word for word is dropped and replaced. The generator fills about a hundred templates with
names and numbers and does not say which template it used, so TEMPLATES DO RECUR between the two files: held-out numbers
measure the fit to this kind of text, not new reasoning.

Takes a second. A second run finds the work done. SOURCE.json beside the rows names seed, counts, version and licence.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_gkd.errors import DataError, GKDError
from prepared import building, is_prepared

FAMILY = "gsm_symbolic"
SEED = 20240901


def rows(seed: int, size: int) -> Iterator[dict[str, Any]]:
    """The first `size` rows of the generator's stream; a row depends on seed and index alone, not on `size`."""
    dataset = import_reasoning_gym().create_dataset(FAMILY, size=size, seed=seed)
    for index in range(size):
        item = dataset[index]
        messages = [
            {"role": "user", "content": item["question"]},
            {"role": "assistant", "content": item["metadata"]["answer_cot"].strip()},
        ]
        yield {"messages": messages, "answer": item["answer"], "generator_index": index}


def import_reasoning_gym() -> Any:
    """Imported when there is work to do: it takes a second, and it imports every family, used or not.

    One family that is not used here imports pycosat, a C extension without binary packages. Where it is not installed,
    an empty module stands in for it during the import, so that the quick start needs no C compiler.
    """
    if importlib.util.find_spec("pycosat") is not None:
        return importlib.import_module("reasoning_gym")
    sys.modules["pycosat"] = types.ModuleType("pycosat")
    try:
        return importlib.import_module("reasoning_gym")
    finally:
        del sys.modules["pycosat"]


def split(
    stream: Iterator[dict[str, Any]], num_train: int, num_held_out: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first `num_train` rows, and the next `num_held_out` whose question is not among them."""
    train = list(islice(stream, num_train))
    seen = {_question(row) for row in train}
    held_out = list(islice((row for row in stream if _question(row) not in seen), num_held_out))
    if len(train) < num_train or len(held_out) < num_held_out:
        raise DataError(
            f"the generator gave {len(train)} training and {len(held_out)} new held-out rows; "
            f"{num_train} and {num_held_out} are needed"
        )
    return train, held_out


def _question(row: dict[str, Any]) -> str:
    question: str = row["messages"][0]["content"]
    return question


def write_jsonl(path: Path, content: list[dict[str, Any]]) -> None:
    """One JSON object a line, UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("cache/quickstart/data"), help="directory to write (default: %(default)s)"
    )
    parser.add_argument("--num_train", type=int, default=2000, help="training rows (default: %(default)s)")
    parser.add_argument("--num_held_out", type=int, default=64, help="held-out rows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the generator (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.num_train < 1 or args.num_held_out < 1:
        parser.error("--num_train and --num_held_out must be at least 1")
    source = {
        "generator": f"reasoning-gym=={importlib.metadata.version('reasoning-gym')}",
        "family": FAMILY,
        "licence": "Apache-2.0",
        "seed": args.seed,
        "num_train": args.num_train,
        "num_held_out": args.num_held_out,
    }
    out: Path = args.out
    if is_prepared(out, source):
        print(f"prepare_data: {out} is ready ({args.num_train} training rows, {args.num_held_out} held out)")
        return 0
    try:
        with building(out, source) as work:
            spare = args.num_held_out + 100  # for held-out rows that are dropped
            stream = rows(args.seed, args.num_train + args.num_held_out + spare)
            train, held_out = split(stream, args.num_train, args.num_held_out)
            write_jsonl(work / "train.jsonl", train)
            write_jsonl(work / "held_out.jsonl", held_out)
    except GKDError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    print(
        f"prepare_data: wrote {len(train)} training and {len(held_out)} held-out rows to {out} "
        f"({source['generator']}, Apache-2.0)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
