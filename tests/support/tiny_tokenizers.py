"""Tokenizers small enough to train in a test: byte-level BPE, with a ChatML template, or plain."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
TEXT = [
    "What is 2 + 3?",
    "2 + 3 = 5",
    "The answer is 5.",
    "Hello, how are you?",
    "I am well.\n\nThank you!",
    "user assistant system",
]


@cache
def _backend(extra: tuple[str, ...] = (), bos: bool = False) -> str:
    tokenizer = Tokenizer(models.BPE())
    # no splitting into words: merges may cross any border, as in some real tokenizers, and "\n\n" is a token
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([*TEXT, "\n\n" * 50], trainer)
    tokenizer.add_special_tokens(list(extra))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A <|endoftext|>", special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)]
        )
    return tokenizer.to_str()


def chat_tokenizer(
    template: str | None = CHATML, *, extra: tuple[str, ...] = (), **special: str | None
) -> PreTrainedTokenizerFast:
    """A chat tokenizer whose turns end with <|im_end|>; its eos_token is another one, as in many base models."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(extra)),
        **{"eos_token": "<|endoftext|>", "pad_token": "<pad>", **special},
    )
    tokenizer.chat_template = template
    return tokenizer


def plain_tokenizer(*, bos: bool = False, eos_token: str | None = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """A tokenizer without a chat template; `bos=True` writes <|im_start|> before and <|endoftext|> after every text."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_backend((), bos)), eos_token=eos_token)
