"""Tokenizers and chat templates: where a completion begins and ends, and what is refused.

Not covered: real models' tokenizers (the quick start's is, end to end).
"""

import pytest

from megatron_gkd.data.chat import ChatEncoder, check_same_tokenizer, load_tokenizer
from megatron_gkd.errors import CheckpointError, DataError
from tests.support.tiny_tokenizers import CHATML, chat_tokenizer, plain_tokenizer


@pytest.fixture
def encoder():
    return ChatEncoder(chat_tokenizer())


def texts(encoder, prompt, completion):
    prompt_ids, completion_ids = encoder.encode(prompt, completion)
    return encoder.tokenizer.decode(prompt_ids), encoder.tokenizer.decode(completion_ids)


# --- with a template


def test_completion_begins_where_sampling_would_and_ends_with_the_end_of_turn(encoder):
    assert texts(encoder, "What is 2 + 3?", "2 + 3 = 5") == (
        "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n",
        "2 + 3 = 5<|im_end|>",  # the template's line break after the turn is cut
    )
    assert (
        encoder.end_of_turn_id
        == encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
        != encoder.tokenizer.eos_token_id
    )


def test_earlier_turns_are_prompt(encoder):
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    prompt, completion = texts(encoder, turns, {"role": "assistant", "content": "d"})
    assert prompt.count("<|im_end|>") == 4
    assert "assistant\nb<|im_end|>" in prompt
    assert completion == "d<|im_end|>"


def test_prompt_ids_do_not_depend_on_the_completion(encoder):
    alone, none = encoder.encode("Hello", None)
    assert none is None
    assert encoder.encode("Hello", "x")[0] == alone


def test_empty_completion_is_the_end_of_turn(encoder):
    assert encoder.encode("Hello", "")[1] == (encoder.end_of_turn_id,)


def test_pitfall_10_token_across_the_border_is_split_as_a_sampler_would(encoder):
    """The completion begins with a line break, which the vocabulary would merge with the header's; a sampler never sees
    that token."""
    tokenizer = encoder.tokenizer
    merged = tokenizer("<|im_start|>assistant\n\nThank you", add_special_tokens=False)["input_ids"]
    prompt_ids, completion_ids = encoder.encode("Hello", "\nThank you")
    assert prompt_ids == encoder.encode("Hello", None)[0]
    assert (*prompt_ids, *completion_ids)[-len(merged) :] != tuple(merged)
    assert tokenizer.decode([*prompt_ids, *completion_ids]).endswith("assistant\n\nThank you<|im_end|>")


def test_end_of_turn_inside_a_completion_does_not_cut_it(encoder):
    assert texts(encoder, "Hello", "a<|im_end|>b")[1] == "a<|im_end|>b<|im_end|>"


def test_two_special_tokens_after_a_turn_keep_the_first():
    template = CHATML.replace(
        "{% if add_generation_prompt %}",
        "{% if not add_generation_prompt %}<|endoftext|>{% endif %}{% if add_generation_prompt %}",
    )
    encoder = ChatEncoder(chat_tokenizer(template))
    assert texts(encoder, "Hello", "b")[1] == "b<|im_end|>"


@pytest.mark.parametrize(
    "opening",
    ["<|im_start|>assistant\n<think>", "<|im_start|>Assistant\n"],
    ids=["an opening that the conversation does not repeat", "another spelling"],
)
def test_template_that_breaks_the_prefix_rule_is_refused(opening):
    template = CHATML.replace("%}<|im_start|>assistant\n{%", "%}" + opening + "{%")
    with pytest.raises(DataError, match="breaks the prefix rule"):
        ChatEncoder(chat_tokenizer(template)).encode("Hello", "b")


def test_template_that_rewrites_earlier_turns_is_refused():
    template = CHATML.replace(
        "{{ message['content'] }}", "{{ message['content'] if loop.last else message['content'] | upper }}"
    )
    with pytest.raises(DataError, match=r"They part at 'hello<.im_end.>.* \(prompt\) and 'HELLO"):
        ChatEncoder(chat_tokenizer(template)).encode("hello", "b")


def test_template_that_refuses_messages_is_reported():
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}" + CHATML
    )
    with pytest.raises(DataError, match="no system turns here"):
        ChatEncoder(chat_tokenizer(template)).encode(
            [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "c"
        )


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHATML.replace("<|im_end|>", ""), r"does not close an assistant turn .*it writes '\\n' after it"),
        ("{% for message in messages %}<|im_start|>{% endfor %}", "does not close an assistant turn"),
        ("{{ raise_exception('never') }}", "does not work on one user and one assistant turn"),
        ("{% for %}", "does not work"),
    ],
)
def test_template_without_an_end_of_turn_is_refused_at_once(template, text):
    with pytest.raises(CheckpointError, match=text):
        ChatEncoder(chat_tokenizer(template))


# --- without a template


def test_strings_without_a_template_are_tokenised_apart():
    encoder = ChatEncoder(plain_tokenizer())
    tokenizer = encoder.tokenizer
    prompt_ids, completion_ids = encoder.encode("2 + 3 =", " 5")
    assert prompt_ids == tuple(tokenizer("2 + 3 =")["input_ids"])
    assert completion_ids == (*tokenizer(" 5")["input_ids"], tokenizer.eos_token_id)
    assert encoder.end_of_turn_id == tokenizer.eos_token_id
    assert not encoder.has_template
    assert encoder.encode("2 + 3 =", " 5<|endoftext|>")[1] == completion_ids  # not ended twice
    assert encoder.encode("2 + 3 =", "")[1] == (tokenizer.eos_token_id,)


def test_beginning_of_text_stays_and_end_of_text_never_closes_a_prompt():
    encoder = ChatEncoder(plain_tokenizer(bos=True))
    assert texts(encoder, "Hello", " you") == ("<|im_start|>Hello", " you<|endoftext|>")
    assert texts(encoder, "", "you") == ("<|im_start|>", "you<|endoftext|>")


def test_plain_tokenizer_refuses():
    encoder = ChatEncoder(plain_tokenizer())
    with pytest.raises(DataError, match="prompt is empty"):
        encoder.encode("", "a")
    with pytest.raises(DataError, match="no chat template"):
        encoder.encode([{"role": "user", "content": "a"}], "b")
    with pytest.raises(CheckpointError, match="neither a chat template nor an eos_token"):
        ChatEncoder(plain_tokenizer(eos_token=None))


# --- tokenizers


def test_load_tokenizer_round_trips(tmp_path):
    chat_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    check_same_tokenizer(chat_tokenizer(), loaded)
    assert ChatEncoder(loaded).encode("Hello", "you") == ChatEncoder(chat_tokenizer()).encode("Hello", "you")


def test_load_tokenizer_refuses(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        load_tokenizer(tmp_path / "file")


def test_code_in_a_models_directory_is_never_run(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}')
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    with pytest.raises(CheckpointError, match="code inside it is never run"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_nothing_is_fetched(monkeypatch):
    import transformers

    asked = {}

    def record(path, **options):
        asked.update(options)
        return chat_tokenizer()

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", record)
    load_tokenizer("someone/a-model")
    assert asked == {"local_files_only": True, "trust_remote_code": False}


def test_same_tokenizer_names_sizes_and_the_first_difference():
    ours, theirs = chat_tokenizer(), chat_tokenizer(extra=("<think>", "</think>"))
    n = len(ours.get_vocab())
    with pytest.raises(
        CheckpointError,
        match=rf"\({n} and {n + 2} tokens\): id {n} is no token for the student and '<think>' for the teacher",
    ):
        check_same_tokenizer(ours, theirs)
    with pytest.raises(CheckpointError, match=f"id {n} is '<a>' for the student and '<think>' for the teacher"):
        check_same_tokenizer(chat_tokenizer(extra=("<a>",)), theirs)


def test_same_tokenizer_lets_padding_differ():
    check_same_tokenizer(chat_tokenizer(extra=("<fill>",), pad_token="<fill>"), chat_tokenizer())
    check_same_tokenizer(
        chat_tokenizer(pad_token="<|endoftext|>"), chat_tokenizer(extra=("<fill>",), pad_token="<fill>")
    )
