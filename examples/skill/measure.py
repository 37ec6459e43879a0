"""Measure a student on held-out problems, by transformers alone: what the trainer and vLLM have in common with it is
the files of the models.

    python examples/skill/measure.py --model runs/skill/kd/seed_0/hf --teacher_model cache/skill/teacher/hf \
        --dataset cache/skill/data/test.jsonl

    accuracy     share of greedy completions whose last number is that of the answer (megatron_gkd/data/verify.py)
    nll          nats a token of the data's completions
    forward_kl   KL(teacher, student) there, nats a token
    agreement    share of their tokens where both models prefer the same
    num_prompts

Means over tokens, with the token that ends a completion. Rows are {"prompt", "completion", "answer"} or chat messages,
in the template's words.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_gkd.data.verify import load_verifier

BATCH_TOKENS = 16_384  # of a batch, at most, padding included: what bounds the memory
Row = dict[str, Any]


def measure(student: Any, teacher: Any, tokenizer: Any, rows: Sequence[Row], longest: int) -> dict[str, float]:
    """The numbers of the module docstring. Args: longest: tokens of a greedy completion, at most."""
    pairs = [encode(tokenizer, row) for row in rows]
    texts = greedy(student, tokenizer, [prompt for prompt, _ in pairs], longest)
    right = load_verifier("last_number")
    found = {"accuracy": sum(right(text, row) for text, row in zip(texts, rows, strict=True)) / len(rows)}
    return found | compare(student, teacher, tokenizer.pad_token_id, pairs) | {"num_prompts": len(rows)}


def encode(tokenizer: Any, row: Row) -> tuple[list[int], list[int]]:
    """Token ids of prompt and completion."""
    if "messages" not in row:
        prompt, completion = (
            tokenizer.encode(row[name], add_special_tokens=False) for name in ("prompt", "completion")
        )
        return prompt, [*completion, tokenizer.eos_token_id]
    turns, options = row["messages"], dict(return_dict=False)
    prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template(turns, **options)
    return list(prompt), list(whole[len(prompt) :])


@torch.no_grad()
def greedy(student: Any, tokenizer: Any, prompts: Sequence[list[int]], longest: int) -> list[str]:
    """Completions as text."""
    texts: list[str] = []
    for batch in _batches(prompts, lambda prompt: len(prompt) + longest):
        width = max(map(len, batch))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        options = dict(do_sample=False, max_new_tokens=longest, eos_token_id=end, pad_token_id=pad)
        answers = student.generate(ids, attention_mask=mask, **options)[:, width:]
        texts += tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


@torch.no_grad()
def compare(student: Any, teacher: Any, pad: int, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, float]:
    """On the data's completions, padded on the right."""
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for batch in _batches(pairs, lambda pair: len(pair[0]) + len(pair[1])):
        width = max(len(p) + len(c) for p, c in batch)
        ids = torch.tensor([[*p, *c] + [pad] * (width - len(p) - len(c)) for p, c in batch])
        places = torch.tensor([[len(p) <= i < len(p) + len(c) for i in range(1, width)] for p, c in batch])
        vocabulary = min(student.config.vocab_size, teacher.config.vocab_size)
        ours, theirs = (
            model(ids).logits[:, :-1][places][:, :vocabulary].double().log_softmax(-1) for model in (student, teacher)
        )
        labels = ids[:, 1:][places]
        nll = -ours.gather(-1, labels[:, None]).sum()
        kl = (theirs.exp() * (theirs - ours)).sum()
        sums += torch.stack([nll, kl, (ours.argmax(-1) == theirs.argmax(-1)).sum().double()])
        count += len(labels)
    return dict(zip(("nll", "forward_kl", "agreement"), (sums / count).tolist(), strict=True))


def _batches(items: Sequence[Any], length: Any) -> Iterator[list[Any]]:
    """In order; each at most BATCH_TOKENS as long as its longest times their number, and never empty."""
    batch: list[Any] = []
    for item in items:
        if batch and (len(batch) + 1) * max(map(length, [*batch[:1], item])) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(item)
    yield batch


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of the student")
    parser.add_argument("--teacher_model", type=Path, required=True, help="of the teacher")
    parser.add_argument("--dataset", type=Path, required=True, help="JSONL")
    parser.add_argument("--max_completion_length", type=int, default=16, help="default: %(default)s")
    args = parser.parse_args(argv)
    rows = [json.loads(line) for line in args.dataset.read_text(encoding="utf-8").splitlines()]
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (args.model, args.teacher_model)
    )
    found = measure(student, teacher, AutoTokenizer.from_pretrained(args.model), rows, args.max_completion_length)
    print("\n".join(f"{name:<12} {value:.6g}" for name, value in found.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
