"""The offline variant of the quick start: a tiny random teacher, its tokenizer and small text, made here in seconds.

    python examples/quickstart/make_tiny.py --out cache/tiny

Nothing is downloaded. `teacher/` is a Llama of 0.2 M parameters with RANDOM weights: it knows nothing, its answers are
noise, and distilling it shows that the machinery works, not that a model learned a skill. Its weights are drawn wide
(std 0.2, ten times the usual start), so that it prefers some tokens strongly and a student has something to match.
`data/` holds short sums written by this script, with the tokenizer (byte-level BPE, trained on that text) and a ChatML
template. Cut the student with cut_student.py, as for the real model.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from megatron_gkd.errors import GKDError
from prepare_data import write_jsonl
from prepared import building, is_prepared

FORMAT = 2  # of what this script writes; raised when its output changes
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QUESTIONS = ("What is {a} plus {b}?", "Add {a} and {b}.", "{name} has {a} apples and buys {b} more. How many now?")
_NAMES = ("Ada", "Ben", "Chen", "Dina", "Emil")


def make_rows(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Chat rows, each question once: a small sum and its solution in two short lines."""
    solutions: dict[str, str] = {}
    while len(solutions) < count:
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        question = rng.choice(_QUESTIONS).format(a=a, b=b, name=rng.choice(_NAMES))
        solutions[question] = f"{a} + {b} = {a + b}.\n#### {a + b}"
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]}
        for question, solution in solutions.items()
    ]


def make_tokenizer(rows: list[dict[str, Any]]) -> Any:
    """Byte-level BPE trained on the rows; every byte is covered, so every text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((message["content"] for row in rows for message in row["messages"]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_teacher(out: Path, tokenizer: Any, seed: int) -> None:
    """A random Llama: 4 layers x 64, 4 heads of 32, 2 key-value heads: it splits over 2 ranks, tensor or pipeline."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's attention on CPUs takes
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("cache/tiny"), help="directory to write (default: %(default)s)"
    )
    parser.add_argument("--num_train", type=int, default=512, help="training rows (default: %(default)s)")
    parser.add_argument("--num_held_out", type=int, default=32, help="held-out rows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of weights and text (default: %(default)s)")
    args = parser.parse_args(argv)
    source = {
        "made_by": "make_tiny.py",
        "format": FORMAT,
        "seed": args.seed,
        "num_train": args.num_train,
        "num_held_out": args.num_held_out,
        "weights": "random, not trained",
    }
    out: Path = args.out
    if is_prepared(out, source):
        print(f"make_tiny: {out} is ready (random weights)")
        return 0
    rows = make_rows(args.num_train + args.num_held_out, random.Random(args.seed))
    try:
        with building(out, source) as work:
            write_jsonl(work / "data" / "train.jsonl", rows[: args.num_train])
            write_jsonl(work / "data" / "held_out.jsonl", rows[args.num_train :])
            make_teacher(work / "teacher", make_tokenizer(rows), args.seed)
    except GKDError as error:
        print(f"make_tiny: {error}", file=sys.stderr)
        return 2
    print(f"make_tiny: wrote {out}: a tiny RANDOM teacher, its tokenizer, {args.num_train} + {args.num_held_out} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
