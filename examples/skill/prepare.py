"""Prepare the study: problems, tokenizer, a teacher that can add, and the student that every method starts from.

    python examples/skill/prepare.py --out cache/skill

    cache/skill/data/           train.jsonl (500 problems), valid.jsonl (500), test.jsonl (1,000), teacher.jsonl
    cache/skill/random/         teacher and student, random: Llamas of 3 x 128 and 2 x 96, one token a character
    cache/skill/teacher/hf      the teacher, of supervised training on teacher.jsonl
    cache/skill/start/hf        the student, of a short supervised training on train.jsonl
    cache/skill/samples.jsonl   the teacher's own completions of train.jsonl

Models are trained by `megatron-gkd train --objective sft`, samples drawn by `megatron-gkd sample`. The same seed gives
the same files. About ten minutes of one core; a second run does what is missing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from forked import run
from problems import COMPLETION_TOKENS, PROMPT_TOKENS, make_tokenizer, split

SEED: Final = 7
SIZES: Final = {"train": 500, "valid": 500, "test": 1000, "teacher": 40_000}
SHAPES: Final[dict[str, dict[str, int]]] = {
    "teacher": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4),
    "student": dict(hidden_size=96, intermediate_size=288, num_hidden_layers=2, num_attention_heads=3),
}
BATCH: Final = 64
COMMON: Final[dict[str, Any]] = dict(
    device="cpu",
    dtype="fp32",
    max_length=PROMPT_TOKENS + COMPLETION_TOKENS,
    global_batch_size=BATCH,
    micro_batch_size=BATCH,
    adam_beta2=0.98,
    weight_decay=0.01,
    report_to="none",
    save_steps=1_000_000,
    data_cache_dir="none",
)
SMALL: Final = dict(global_batch_size=16, micro_batch_size=16)
TEACHER: Final[dict[str, Any]] = dict(train_iters=1500, lr=2e-3, min_lr=1e-4, lr_warmup_iters=50, **SMALL)
START: Final[dict[str, Any]] = dict(train_iters=600, lr=2e-3, min_lr=1e-4, lr_warmup_iters=50, **SMALL)

Command = Callable[[Sequence[str], Path], int]


def as_words(**flags: Any) -> list[str]:
    """`--name value` of each."""
    texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in flags.items()}
    return [word for name, text in texts.items() for word in (f"--{name}", text)]


def carry_out(command: Command, argv: Sequence[str], log: Path) -> None:
    """Raises SystemExit with the last line of the log where the command fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"skill: {' '.join(argv)}", flush=True)
    if code := command(argv, log):
        last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
        raise SystemExit(f"skill: it ended with exit code {code}; see {log}: {' '.join(last)}")


def write_rows(out: Path, sizes: dict[str, int], seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in split(sizes, seed).items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_random_model(out: Path, shape: dict[str, Any], seed: int) -> None:
    """A Llama with random weights, and the tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **shape,
        head_dim=32,  # the smallest that vLLM's attention on CPUs takes
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)


def prepare(out: Path, sizes: dict[str, int], settings: dict[str, dict[str, Any]], command: Command = run) -> None:
    """All of the module docstring, without what is there.

    Args:
        settings: flags of the two trainings, by "teacher" and "start".
    """
    source = {"seed": SEED, "sizes": sizes, "shapes": SHAPES, "common": COMMON, **settings}
    note = out / "SOURCE.json"
    if note.exists() and json.loads(note.read_text()) != source:
        raise SystemExit(f"skill: {out} was prepared with other settings; delete it or choose another --out")
    if not note.exists():
        write_rows(out / "data", sizes, SEED)
        for number, (name, shape) in enumerate(SHAPES.items()):
            write_random_model(out / "random" / name, shape, SEED + number)
        note.write_text(json.dumps(source, indent=2) + "\n")
    for name, model, rows in (("teacher", "teacher", "teacher"), ("start", "student", "train")):
        run_dir = out / name
        if (run_dir / "export.json").exists():
            continue
        shutil.rmtree(run_dir, ignore_errors=True)
        flags = dict(model=out / "random" / model, objective="sft", dataset=out / f"data/{rows}.jsonl", save=run_dir)
        argv = ["train", *as_words(**{**COMMON, **flags, "seed": SEED, **settings[name]})]
        carry_out(command, argv, out / f"logs/{name}.txt")
    if not (out / "samples.jsonl").exists():
        flags = dict(model=out / "teacher/hf", dataset=out / "data/train.jsonl", result_path=out / "samples.jsonl")
        flags |= dict(temperature=1, max_new_tokens=COMPLETION_TOKENS, dtype="fp32", seed=SEED)
        carry_out(command, ["sample", *as_words(**flags)], out / "logs/samples.txt")
    print(f"skill: {out} is ready", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cache/skill"), help="default: %(default)s")
    args = parser.parse_args(argv)
    prepare(args.out, SIZES, {"teacher": TEACHER, "start": START})
    return 0


if __name__ == "__main__":
    sys.exit(main())
