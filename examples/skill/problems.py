"""The task of the study, as text: add up a row of digits, writing down the running total after each of them.

    prompt      8-5+2-9=
    completion  3;5;-4            right where its last number is the sum: `--eval_verifier last_number`

Four digits from 1 to 9, all but the first added or subtracted: 52,488 problems. Every character is a token, so a model
learns arithmetic from nothing, and a wrong total early on spoils the rest: what the student meets in its own
completions and never in the data's.

A problem depends on the generator's seed alone, and no problem is in two of the files that `split` makes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any, Final

NUM_DIGITS: Final = 4
PROMPT_TOKENS: Final = 2 * NUM_DIGITS
COMPLETION_TOKENS: Final = 16  # the longest right one has 12 with its end; a student may ramble
SPECIAL: Final = ("<pad>", "<end>")
CHARACTERS: Final = "0123456789+-=;"


def solve(prompt: str) -> str:
    """The completion of a prompt such as "8-5+2=": "3;5"."""
    total, totals = int(prompt[0]), []
    for sign, digit in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
        total += int(digit) if sign == "+" else -int(digit)
        totals.append(str(total))
    return ";".join(totals)


def problems(seed: int) -> Iterator[str]:
    """Prompts without end, each of them once."""
    rng, seen = random.Random(seed), set()
    while True:
        digits = [str(rng.randint(1, 9)) for _ in range(NUM_DIGITS)]
        prompt = digits[0] + "".join(rng.choice("+-") + digit for digit in digits[1:]) + "="
        if prompt not in seen:
            seen.add(prompt)
            yield prompt


def split(sizes: Mapping[str, int], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows by the name of the file; the files share no problem."""
    stream = problems(seed)
    return {name: [_row(next(stream)) for _ in range(size)] for name, size in sizes.items()}


def _row(prompt: str) -> dict[str, Any]:
    completion = solve(prompt)
    return {"prompt": prompt, "completion": completion, "answer": completion.rpartition(";")[2]}


def make_tokenizer() -> Any:
    """One token a character, and an end."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        unk_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        clean_up_tokenization_spaces=False,
    )
