"""Flags of ms-swift's Megatron GKD scripts whose names are not ours. With them such a script runs unchanged except for
the program's name, or gets an error that says what to change.

    translate(["--torch_dtype", "bfloat16", "--beta", "1"]) -> ["--dtype", "bf16", "--beta", "1"]
    translate_key("torch_dtype", "bfloat16") -> ("dtype", "bf16")          of a configuration file

Each of these flags is one of ours under another name, or states what is always the case here, or is refused. All
refused ones are in one message, each with its replacement. None is silently ignored. A flag that is given under two
names with different values is refused too. Flags with the same name in both programs are not listed here;
docs/from_ms_swift.md compares all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from megatron_gkd.config.schema import show
from megatron_gkd.errors import ConfigError

_HOLDS: Final = ""  # in place of our value: the flag states what is always the case here


@dataclass(frozen=True)
class Theirs:
    """A flag of ms-swift.

    Attributes:
        ours: our flag; None: there is none.
        values: their value -> ours; None: any value, unchanged.
        advice: what to do instead of giving another value.
    """

    ours: str | None = None
    values: Mapping[str, str] | None = None
    advice: str = ""


def _refused(advice: str, *, holds: Iterable[str] = ()) -> Theirs:
    return Theirs(None, dict.fromkeys(holds, _HOLDS), advice)


_NO_TURNS = "a completion is sampled in one turn; leave it out"

FLAGS: Final[Mapping[str, Theirs]] = {
    "output_dir": Theirs("save"),
    "val_dataset": Theirs("eval_dataset"),
    "torch_dtype": Theirs(
        "dtype", {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}, "give --dtype fp32, bf16 or fp16"
    ),
    "padding_free": Theirs("packing", {"true": "true", "false": "false"}, "give --packing true or false"),
    "save_safetensors": Theirs("save_hf", {"true": "true", "false": "false"}, "give --save_hf true or false"),
    "truncation_strategy": Theirs(
        "overlong",
        {"delete": "drop", "left": "truncate_left", "raise": "stop"},
        "a completion is never cut; give --overlong drop, truncate_left or stop",
    ),
    "attn_impl": Theirs(
        "attention_backend",
        {"flash_attn": "flash", "flash_attention_2": "flash"},
        "give --attention_backend auto, flash, fused or unfused",
    ),
    "load_from_cache_file": Theirs(
        "data_cache_dir", {"true": _HOLDS, "false": "none"}, "give --data_cache_dir, a directory or none"
    ),
    "train_type": Theirs("tuner_type"),
    "freeze_vit": Theirs("freeze_vision"),
    "freeze_aligner": Theirs("freeze_projector"),
    "freeze_llm": _refused("the decoder is trained; leave it out", holds=("false",)),
    "vit_lr": _refused("there is one learning rate, --lr; leave it out"),
    "aligner_lr": _refused("there is one learning rate, --lr; leave it out"),
    "vit_gradient_checkpointing": _refused("activations of a vision tower are kept; leave it out", holds=("false",)),
    "multi_turn_scheduler": _refused(_NO_TURNS),
    "max_turns": _refused(_NO_TURNS, holds=("1",)),
    "vllm_server_pass_dataset": _refused(
        "servers are given token ids alone (--vllm_mode server); leave it out", holds=("false",)
    ),
    "remove_unused_columns": _refused(
        "columns with a meaning are read, and the others named; leave it out, or change --dataset", holds=("false",)
    ),
    "split_dataset_ratio": _refused("give held-out rows as --eval_dataset", holds=("0", "0.0")),
    "eval_iters": _refused("give --eval_samples, the number of held-out rows"),
    "dataset_num_proc": _refused("one rank of a machine tokenises, once (--data_cache_dir); leave it out"),
    "dataloader_num_workers": _refused("rows are tokenised beforehand, or with --streaming true; leave it out"),
    "model_revision": _refused("write it behind the name: --model OWNER/NAME@REVISION"),
    "teacher_model_revision": _refused("write it behind the name: --teacher_model OWNER/NAME@REVISION"),
}


def translate(argv: Sequence[str]) -> list[str]:
    """The command line with our names and values. Raises ConfigError that lists all flags that cannot be accepted."""
    told: list[str] = []
    problems: list[str] = []
    given: dict[str, dict[str, list[str]]] = {}  # our flag -> names in the command line -> values
    for tokens in _by_flag(argv):
        name, words = _name_and_words(tokens)
        try:
            translated = _translated(name, words)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if translated is None:
            continue
        ours, values = translated
        told += tokens if name not in FLAGS else [f"--{ours}", *values]
        given.setdefault(ours, {})[name] = [value.lower() for value in values or ["true"]]
    for ours, names in given.items():
        if len({tuple(values) for values in names.values()}) > 1:
            both = " and ".join(f"--{name} {' '.join(values)}" for name, values in names.items())
            problems.append(f"{both} are one flag here, --{ours}, with two values; keep one of them")
    if problems:
        raise ConfigError("; ".join(problems))
    return told


def translate_key(name: str, value: Any) -> tuple[str, Any] | None:
    """The same for a key of a configuration file; None: it states what is always the case. Raises ConfigError."""
    if name not in FLAGS:
        return name, value
    words = [show(item) for item in (value if isinstance(value, list) else [value])]
    translated = _translated(name, words)
    if translated is None:
        return None
    ours, values = translated
    return ours, value if values == words else {"true": True, "false": False}.get(values[0], values[0])


def _by_flag(argv: Sequence[str]) -> list[list[str]]:
    """The tokens of each flag with its values; tokens before the first flag are a group of their own."""
    groups: list[list[str]] = []
    for token in argv:
        if token.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(token)
    return groups


def _name_and_words(tokens: Sequence[str]) -> tuple[str, list[str]]:
    flag, equals, value = tokens[0].partition("=")
    name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
    return name, [*([value] if equals else []), *tokens[1:]]


def _translated(name: str, words: list[str]) -> tuple[str, list[str]] | None:
    """(our flag, its values); None if it states what is always the case. Raises ConfigError if it is refused."""
    theirs = FLAGS.get(name)
    if theirs is None:
        return name, words
    if theirs.values is None:
        return str(theirs.ours), words
    value = " ".join(words)
    ours_value = theirs.values.get(value.lower() or "true")
    if ours_value is None:
        raise ConfigError(f"--{name}{f' {value}' if value else ''} is ms-swift's: {theirs.advice}")
    return None if ours_value == _HOLDS else (str(theirs.ours), [ours_value])
