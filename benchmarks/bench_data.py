"""Tokenising a data set, and starting from the file that keeps its rows, against the tokenizer's own batch call.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_data --json benchmarks/results/data_cpu.json
    python -m benchmarks.bench_data --quick                    # seconds; says only that everything runs

One process, no GPU. A JSONL file of chat messages (--rows of about 120 words, generated) and a byte-level BPE tokenizer
trained on it, with a ChatML template, are written to a temporary directory (--dir). The methods run in turn, round by
round, so that a change of the machine's load meets all of them:

    render     the chat template alone: prompt and conversation of every row, as text
    library    the tokenizer's own batch call on all these texts at once, on one core
    one        rows as they were made before: a call of the tokenizer for every text
    batch      data/rows.py, tokenise: reading, parsing, rendering, tokenising, on one core
    batch_all  the same on all cores
    hash       reading the files for their name, data/row_key.py
    first      the start of the rank that tokenises, one core: name, tokenise, write the file, map it
    later      the same start when the file is there: name, checksum, map
    map        what every other rank of the machine does: map

`of_one` is the median time of `one` over that of the method: how many times faster it is. Wall clock and CPU seconds;
on a machine that does other work too, `of_one_cpu` is the steadier number (`batch_all` says something on an idle
machine alone). Peak memory is anonymous memory, of a call of its own; the mapped file is not in it, since ranks share
it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.bench_convert import peak_bytes
from benchmarks.measure import Seconds, environment, on_one_rank, quantiles, timed, versions

CPU = torch.device("cpu")
TABLE = ("method", "rows/s", "p20", "p80", "cpu s", "of one", "of one, cpu", "peak MB")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    return on_one_rank(measure, table, options)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="OUT", help="write all rows to this file")
    parser.add_argument("--quick", action="store_true", help="few rows, two rounds: a test that everything runs")
    parser.add_argument("--rounds", type=int, default=5, help="measured calls of each method (5)")
    parser.add_argument("--rows", type=int, default=3000, help="rows of the data set (3000)")
    parser.add_argument("--dir", help="directory for the files, on the disk to be measured")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.rows = 2, 40
    return options


def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The report: environment, case, rows."""
    path = make_data(root / "data.jsonl", options.rows)
    tokenizer = make_tokenizer(path)
    actions = methods(path, tokenizer, root / "cache")
    report: dict[str, Any] = {
        "environment": environment(CPU) | {"libraries": versions("transformers", "tokenizers", "numpy")},
        "case": {"rows": options.rows, "bytes": path.stat().st_size, "vocabulary": len(tokenizer)},
        "rows": [],
    }
    peaks = {}
    for name, action in actions.items():
        action()  # imports, page cache, and the file that `later` and `map` find
        peaks[name] = peak_bytes(action)
    seconds: dict[str, list[Seconds]] = {name: [] for name in actions}
    for _ in range(options.rounds):
        for name, action in actions.items():
            seconds[name].append(timed(action, CPU))
    report["case"]["file_bytes"] = sum(file.stat().st_size for file in (root / "cache").iterdir())
    report["load_average_1min_at_end"] = round(os.getloadavg()[0], 1)
    one = seconds["one"]
    for name, of in seconds.items():
        wall, cpu = (quantiles([s[clock] for s in of]) for clock in (0, 1))
        report["rows"].append(
            {
                "method": name, "rounds": options.rounds, "wall_s": wall, "cpu_s": cpu,
                "rows_per_s": quantiles([options.rows / s.wall_s for s in of]),
                "rows_per_cpu_s": quantiles([options.rows / max(s.cpu_s, 1e-9) for s in of]),
                "of_one": quantiles([s.wall_s for s in one])["median"] / wall["median"],
                "of_one_cpu": quantiles([s.cpu_s for s in one])["median"] / max(cpu["median"], 1e-9),
                "peak_bytes": peaks[name],
            }
        )  # fmt: skip
    return report


def methods(path: Path, tokenizer: Any, cache: Path) -> dict[str, Callable[[], object]]:
    """Name -> what is measured."""
    from megatron_gkd.data import rows as rows_module
    from megatron_gkd.data.chat import ChatEncoder
    from megatron_gkd.data.policy import RowPolicy
    from megatron_gkd.data.row_file import read_rows
    from megatron_gkd.data.row_key import read_content
    from megatron_gkd.train.shared_rows import shared_rows

    policy, group = RowPolicy(4096), dist.group.WORLD
    assert group is not None
    conversations = [json.loads(line)["messages"] for line in path.open()]

    def render() -> list[str]:
        apply = tokenizer.apply_chat_template
        prompts = [apply(turns[:-1], tokenize=False, add_generation_prompt=True) for turns in conversations]
        return prompts + [apply(turns, tokenize=False) for turns in conversations]

    texts = render()

    def on_cores(action: Callable[[], object], *, several: bool = False) -> Callable[[], object]:
        def run() -> object:
            os.environ["TOKENIZERS_PARALLELISM"] = "true" if several else "false"
            return action()

        return run

    class OneByOne(ChatEncoder):
        def _answer(self, questions: Any) -> Any:
            return [
                tuple(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
                for text, special in questions
            ]

    def one() -> object:
        batch_rows, encoder = rows_module.BATCH_ROWS, rows_module.ChatEncoder
        rows_module.BATCH_ROWS, rows_module.ChatEncoder = 1, OneByOne  # type: ignore[misc]
        try:
            return tokenise()
        finally:
            rows_module.BATCH_ROWS, rows_module.ChatEncoder = batch_rows, encoder  # type: ignore[misc]

    def tokenise() -> rows_module.RowDataset:
        return rows_module.tokenise([path], tokenizer, policy)

    def start() -> rows_module.RowDataset:
        return shared_rows([str(path)], tokenizer, policy, cache_dir=str(cache), group=group)

    def first() -> object:
        shutil.rmtree(cache, ignore_errors=True)
        return start()

    def kept() -> Path:
        (file,) = cache.iterdir()
        return file

    found = start().fingerprint()
    assert found == tokenise().fingerprint() == one().fingerprint()  # type: ignore[attr-defined]
    return {
        "render": render,
        "library": on_cores(lambda: tokenizer(texts, add_special_tokens=False, verbose=False)),
        "one": on_cores(one),
        "batch": on_cores(tokenise),
        "batch_all": on_cores(tokenise, several=True),
        "hash": lambda: read_content(path),
        "first": on_cores(first),
        "later": start,
        "map": lambda: read_rows(kept(), [str(path)], verify=False),
    }


def make_data(path: Path, num_rows: int) -> Path:
    """Chat messages of made-up words, frequent ones more often, as words are."""
    generator = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(4000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]

    def text(most: int) -> str:
        return " ".join(generator.choices(words, weights, k=generator.randint(most // 3, most))) + "."

    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            turns = [{"role": "user", "content": text(60)}, {"role": "assistant", "content": text(120)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def make_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    texts = (turn["content"] for line in path.open() for turn in json.loads(line)["messages"])
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(TABLE) + " |", "|" + "---|" * len(TABLE)]
    for row in rows:
        rate = row["rows_per_s"]
        cells = [
            row["method"], *(f"{rate[name]:,.0f}" for name in ("median", "p20", "p80")),
            f"{row['cpu_s']['median']:.3f}", f"{row['of_one']:.1f}", f"{row['of_one_cpu']:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
