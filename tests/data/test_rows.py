"""Rows: the forms of a record, the policies for bad and overlong ones, and the account of what happened."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.data.policy import RowPolicy
from megatron_gkd.data.rows import load_rows, tokenise
from megatron_gkd.data.streaming import StreamedRows
from megatron_gkd.errors import ConfigError, DataError
from megatron_gkd.records import Row
from tests.support.tiny_tokenizers import chat_tokenizer, plain_tokenizer

USER, ASSISTANT = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I am well."}
TOKENIZER = chat_tokenizer()


def write(path, *records):
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


def load(path, tokenizer=TOKENIZER, max_length=100, **options):
    return load_rows([path], tokenizer, max_length=max_length, **options)


# --- forms


def test_every_form_of_a_pair_gives_the_same_row(tmp_path):
    records = [
        {"messages": [USER, ASSISTANT]},
        {"prompt": "Hello", "completion": "I am well."},
        {"prompt": "Hello", "response": "I am well.", "id": 17},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "I am well."},
        {"prompt": "Hello", "response": [ASSISTANT]},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "I am well."}]},
        {"instruction": "Hello", "input": "", "output": "I am well."},
        {"messages": [{**USER, "name": None}, {**ASSISTANT, "tool_calls": None}]},
    ]
    rows = load(write(tmp_path / "d.jsonl", *records))
    assert len(rows) == len(records)
    assert len(set(rows)) == 1
    assert TOKENIZER.decode(rows[0].completion_ids) == "I am well.<|im_end|>"


def test_every_form_of_a_prompt_gives_the_same_row(tmp_path):
    rows = load(
        write(
            tmp_path / "d.jsonl",
            {"messages": [USER]},
            {"prompt": "Hello"},
            {"prompt": [USER]},
            {"prompt": "Hello", "completion": None},
        )
    )
    assert len(set(rows)) == 1
    assert rows[0].completion_ids is None
    assert rows.summary.num_prompt_only == 4


def test_parquet_and_several_files_in_order(tmp_path):
    records = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "d.parquet")
    jsonl = write(tmp_path / "d.jsonl", *reversed(records))
    rows = load_rows([tmp_path / "d.parquet", jsonl], TOKENIZER, max_length=100)
    assert rows[0] == rows[3]
    assert rows[1] == rows[2]
    assert rows[0] != rows[1]
    assert rows.place(1) == f"{tmp_path / 'd.parquet'}:2"
    assert rows.place(2) == f"{jsonl}:1"


def test_strings_with_a_plain_tokenizer(tmp_path):
    tokenizer = plain_tokenizer()
    rows = load(write(tmp_path / "d.jsonl", {"prompt": "2 + 3 =", "completion": " 5"}), tokenizer)
    assert rows[0] == Row(
        tuple(tokenizer("2 + 3 =")["input_ids"]), (*tokenizer(" 5")["input_ids"], tokenizer.eos_token_id)
    )


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ("{", "not valid JSON"),
        ("3", "a JSON int, not an object"),
        ({"question": "a", "id": 3}, r"columns \['id', 'question'\] are not a known form; supported: `messages`"),
        ({"messages": [USER, ASSISTANT], "prompt": "a"}, "columns `messages` and `prompt` are two forms at once"),
        ({"prompt": None, "completion": "b"}, r"columns \['completion'\]"),
        ({"prompt": "a", "completion": "b", "response": "c"}, "both `completion` and `response`"),
        ({"prompt": 5}, "`prompt` is a int; give a list of turns"),
        ({"prompt": "a", "completion": ["b"]}, "`completion`, turn 1 is a str"),
        ({"prompt": "a", "completion": [USER]}, r"`completion` has turns of \['user'\]"),
        ({"prompt": "a", "completion": [ASSISTANT, ASSISTANT]}, "it must have one"),
        ({"prompt": [USER, ASSISTANT]}, "`prompt` ends with a turn of 'assistant'"),
        ({"messages": []}, "`messages` is a list without turns"),
        ({"messages": [ASSISTANT]}, "a prompt must come before it"),
        ({"messages": [{"role": "system", "content": "a"}]}, "ends with a turn of 'system'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "turn 2: `content` is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"turn 1: `content` is list; .*text only"),
        ({"messages": [{"content": "a"}]}, "turn 1: `role` is missing"),
    ],
)
def test_bad_row_stops_or_is_skipped_and_counted(tmp_path, record, text):
    path = write(
        tmp_path / "d.jsonl", {"prompt": "a", "completion": "b"}, record, "", record, {"prompt": "c", "completion": "d"}
    )
    with pytest.raises(DataError, match=rf"d.jsonl:2: .*{text}"):
        load(path)
    rows = load(path, on_bad_row="skip")
    assert [rows.place(i) for i in range(2)] == [f"{path}:1", f"{path}:5"]
    assert (rows.summary.num_read, rows.summary.num_used, rows.summary.dropped) == (4, 2, {"malformed": 2})
    assert f"4 rows read, 2 used; 2 dropped as malformed (first: {path}:2: " in str(rows.summary)


def test_template_error_names_the_place(tmp_path):
    with pytest.raises(DataError, match=r"d.jsonl:1: chat messages, but the tokenizer has no chat template"):
        load(write(tmp_path / "d.jsonl", {"messages": [USER, ASSISTANT]}), plain_tokenizer())


def test_no_usable_row_is_an_error_with_the_reason(tmp_path):
    with pytest.raises(DataError, match=r"no usable row in .*2 rows read, 0 used; 2 dropped as malformed .*'question'"):
        load(write(tmp_path / "d.jsonl", *[{"question": "a"}] * 2), on_bad_row="skip")
    with pytest.raises(DataError, match="no data set is given"):
        load_rows([], TOKENIZER, max_length=9)
    with pytest.raises(DataError, match="0 rows read"):
        load(write(tmp_path / "d.jsonl"))


def test_a_missing_second_file_is_found_before_the_first_is_read(tmp_path):
    bad = write(tmp_path / "a.jsonl", "{")
    with pytest.raises(DataError, match=r"b.jsonl: there is no such file"):
        load_rows([bad, tmp_path / "b.jsonl"], TOKENIZER, max_length=9)


# --- length


@pytest.fixture
def lengths(tmp_path):
    """A file whose rows have 4 + 3 tokens, 9 + 3 and 2 + 12 (no template, a token a digit, an end of text each)."""
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": "6789", "completion": "67"},
        {"prompt": "987698769", "completion": "67"},
        {"prompt": "67", "completion": "98769876987"},
    )
    rows = load(path, plain_tokenizer())
    assert [(len(row.prompt_ids), len(row.completion_ids)) for row in rows] == [(4, 3), (9, 3), (2, 12)]
    return path


def sizes(rows):
    return [(len(row.prompt_ids), len(row.completion_ids)) for row in rows]


def test_overlong_rows_are_dropped_and_counted(lengths):
    rows = load(lengths, plain_tokenizer(), max_length=11)
    assert sizes(rows) == [(4, 3)]
    assert rows.summary.dropped == {"overlong": 1, "completion_overlong": 1}
    assert "2:" in rows.summary.first_dropped["overlong"]
    assert "9 prompt tokens and 3 completion tokens" in str(rows.summary)
    assert sizes(load(lengths, plain_tokenizer(), max_length=12)) == [(4, 3), (9, 3)]
    assert sizes(load(lengths, plain_tokenizer(), max_length=14)) == [(4, 3), (9, 3), (2, 12)]


def test_overlong_prompts_are_cut_at_the_left(lengths):
    whole = load(lengths, plain_tokenizer())
    rows = load(lengths, plain_tokenizer(), max_length=11, overlong="truncate_left")
    assert list(rows) == [whole[0], Row(whole[1].prompt_ids[1:], whole[1].completion_ids)]
    assert rows.summary.num_truncated == 1
    assert rows.summary.dropped == {"completion_overlong": 1}  # completions are never cut
    rows = load(lengths, plain_tokenizer(), max_length=13, overlong="truncate_left")
    assert sizes(rows) == [(4, 3), (9, 3), (1, 12)]
    assert "3 used, 1 with their prompt cut at the left" in str(rows.summary)


def test_overlong_rows_stop(lengths):
    with pytest.raises(
        DataError, match=r"d.jsonl:2: 9 prompt tokens and 3 completion tokens exceed max_length 11; raise --max_length"
    ):
        load(lengths, plain_tokenizer(), max_length=11, overlong="stop")


def test_prompts_leave_room_for_sampled_completions(lengths):
    rows = load(lengths, plain_tokenizer(), max_length=14, max_completion_length=8)
    assert sizes(rows) == [(4, 3), (2, 12)]
    assert "9 prompt tokens and room for 8 sampled tokens exceed max_length 14" in str(rows.summary)
    rows = load(lengths, plain_tokenizer(), max_length=14, max_completion_length=8, overlong="truncate_left")
    assert sizes(rows) == [(4, 3), (6, 3), (2, 12)]


def test_prompt_only_rows_leave_room_for_one_token(tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "6789"}, {"prompt": "67"})
    assert len(load(path, plain_tokenizer(), max_length=5)) == 2
    assert len(load(path, plain_tokenizer(), max_length=4)) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_length": 1}, "max_length is 1"),
        ({"max_completion_length": 100}, "must leave room for a prompt"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
        ({"on_bad_row": "ignore"}, "on_bad_row is 'ignore'"),
        ({"overlong": "cut"}, "overlong is 'cut'"),
        ({"max_rows": 0}, "max_rows is 0"),
    ],
)
def test_arguments_are_checked(lengths, options, text):
    with pytest.raises(ConfigError, match=text):
        load(lengths, plain_tokenizer(), **options)


# --- the data set


def test_rows_without_completions_are_refused_where_one_is_needed(tmp_path):
    rows = load(write(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "c"}))
    rows.check_sources(lmbda=1.0, seq_kd=False)
    rows.check_sources(lmbda=0.0, seq_kd=True)
    with pytest.raises(
        DataError, match=r"--lmbda 0.5 with --seq_kd false needs a completion in every row, and 1 of 2 .*d.jsonl:2"
    ):
        rows.check_sources(lmbda=0.5, seq_kd=False)
    with pytest.raises(DataError, match="evaluation needs"):
        rows.require_completions("evaluation")
    load(write(tmp_path / "e.jsonl", {"prompt": "a", "completion": "b"})).check_sources(lmbda=0, seq_kd=False)


def test_data_set_indexes_like_a_list(tmp_path):
    rows = load(write(tmp_path / "d.jsonl", *[{"prompt": str(i), "completion": "b"} for i in range(5)]))
    assert rows[-1] == rows[4] == list(rows)[4]
    with pytest.raises(IndexError, match="row 5 of 5"):
        rows[5]
    assert rows.max_token_id == max(max(*row.prompt_ids, *row.completion_ids) for row in rows)


def test_max_rows_stops_reading(tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}, "{")
    rows = load_rows([path, path], TOKENIZER, max_length=99, max_rows=2)
    assert len(rows) == rows.summary.num_read == 2


def test_a_teacher_prompt_is_encoded_as_the_prompt_is(tmp_path):
    encoder = ChatEncoder(TOKENIZER)
    secret = [{"role": "system", "content": "The answer is 5."}, USER]
    rows = load(
        write(
            tmp_path / "d.jsonl",
            {"messages": [USER, ASSISTANT], "teacher_prompt": secret},
            {"prompt": "2 + 3?", "completion": "5", "teacher_prompt": "2 + 3? It is 5."},
            {"prompt": "2 + 3?", "teacher_prompt": None},
        )
    )
    assert rows[0].teacher_prompt_ids == encoder.encode(secret, None)[0]
    assert rows[0].prompt_ids == encoder.encode([USER], None)[0]
    assert rows[0].completion_ids == encoder.encode([USER], ASSISTANT)[1]
    assert rows[1].teacher_prompt_ids == rows[1].prompt_ids_for_teacher == encoder.encode("2 + 3? It is 5.", None)[0]
    assert rows[2].teacher_prompt_ids is None
    assert rows[2].prompt_ids_for_teacher == rows[2].prompt_ids
    assert rows.summary.num_teacher_prompts == 2
    assert "2 with a teacher_prompt" in str(rows.summary)
    rows.require_teacher_prompts("training")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "`teacher_prompt` is a int"),
        ([], "`teacher_prompt` is a list without turns"),
        ([USER, ASSISTANT], "`teacher_prompt` ends with a turn of 'assistant'"),
    ],
)
def test_malformed_teacher_prompts(tmp_path, value, message):
    path = write(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b", "teacher_prompt": value})
    with pytest.raises(DataError, match=message):
        load(path)


def test_the_largest_id_may_be_in_a_teacher_prompt(tmp_path):
    plain, high = ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "teacher_prompt": "\u00ff"})
    with_high = load(write(tmp_path / "a.jsonl", high))
    without = load(write(tmp_path / "b.jsonl", plain))
    assert with_high.max_token_id == max(max(without[0].prompt_ids), max(with_high[0].teacher_prompt_ids))


def test_a_teacher_prompt_that_does_not_fit_is_never_cut(tmp_path):
    """Not even by truncate_left, which would take the privileged part away unseen; the student's may be."""
    long = {"prompt": "a", "completion": "b", "teacher_prompt": "x" * 60}
    short = {"prompt": "y" * 60, "completion": "b", "teacher_prompt": "z"}
    fitting = {"prompt": "a", "completion": "b"}
    path = write(tmp_path / "d.jsonl", long, short, fitting)
    dropped = load(path, max_length=50)
    assert len(dropped) == 1
    assert dropped.summary.dropped == {"teacher_prompt_overlong": 1, "overlong": 1}
    assert "tokens of `teacher_prompt` and" in dropped.summary.first_dropped["teacher_prompt_overlong"]
    cut = load(path, max_length=50, overlong="truncate_left")
    assert len(cut) == 2
    assert len(cut[0].prompt_ids) + len(cut[0].completion_ids) == 50
    assert cut[0].teacher_prompt_ids == ChatEncoder(TOKENIZER).encode("z", None)[0]
    assert cut.summary.dropped == {"teacher_prompt_overlong": 1}
    with pytest.raises(DataError, match=r"d\.jsonl:1: \d+ tokens of `teacher_prompt` and .* exceed max_length 50"):
        load(path, max_length=50, overlong="stop")


def test_a_teacher_prompt_leaves_room_for_what_is_sampled(tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "a", "teacher_prompt": "x" * 20})
    needed = len(ChatEncoder(TOKENIZER).encode("x" * 20, None)[0]) + 15
    assert len(load(path, max_length=needed, max_completion_length=15)) == 1
    with pytest.raises(DataError, match=r"no usable row.*teacher_prompt_overlong"):
        load(path, max_length=needed - 1, max_completion_length=15)


def test_tags(tmp_path):
    bare = {"prompt": "a", "completion": "b"}
    path = write(tmp_path / "d.jsonl", bare | {"of": "math"}, bare | {"of": "code"}, bare, bare | {"of": "math"})
    assert [row.tag for row in load(path)] == [None] * 4
    rows = load(path, tag_key="of")
    assert [row.tag for row in rows] == ["math", "code", None, "math"]
    rows.require_tags({"math"}, rest=True, column="of")
    with pytest.raises(DataError, match=r"d\.jsonl:2: no teacher server has the tag 'code' of the column `of`.*math"):
        rows.require_tags({"math"}, rest=False, column="of")
    with pytest.raises(DataError, match=r"d\.jsonl:3: the row has no column `of` \(--teacher_tag_key\)"):
        rows.require_tags({"math", "code"}, rest=False, column="of")
    bad = write(tmp_path / "bad.jsonl", bare | {"of": 3})
    with pytest.raises(DataError, match=r"`of` \(--teacher_tag_key\) is a int"):
        load(bad, tag_key="of")


def test_fingerprint_tells_teachers_prompts_and_tags_apart(tmp_path):
    bare = {"prompt": "a", "completion": "b", "of": "x"}
    first, second = bare | {"teacher_prompt": "c"}, bare | {"teacher_prompt": "d"}
    fingerprints = [
        load(write(tmp_path / "d.jsonl", *records), tag_key=key).fingerprint()
        for records, key in [
            ([bare, bare], None),
            ([first, bare], None),
            ([bare, first], None),
            ([second, bare], None),
            ([bare, bare], "of"),
            ([bare, bare | {"of": "y"}], "of"),
            ([bare, bare | {"of": "z"}], "of"),
        ]
    ]
    assert len(set(fingerprints)) == len(fingerprints)


def test_fingerprint_tells_data_apart(tmp_path):
    a, b = {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}
    prints = [
        load(write(tmp_path / "d.jsonl", *records)).fingerprint()
        for records in ([a, b], [a, b], [b, a], [a], [{"prompt": "a"}])
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


def test_pitfall_10_rows_are_the_encoders_ids_unchanged(tmp_path):
    from megatron_gkd.data.chat import ChatEncoder

    rows = load(write(tmp_path / "d.jsonl", {"messages": [USER, ASSISTANT]}))
    assert rows[0] == Row(*ChatEncoder(TOKENIZER).encode([USER], ASSISTANT))


def test_weights_decide_the_stream_and_the_fingerprint(tmp_path):
    a = write(tmp_path / "a.jsonl", *[{"prompt": str(i), "completion": "b"} for i in range(6)])
    b = write(tmp_path / "b.jsonl", *[{"prompt": str(i), "completion": "c"} for i in range(2)])

    def rows(*weights):
        return load_rows([a, b], TOKENIZER, max_length=99, weights=weights)

    assert rows().sizes == rows(1, 3).sizes == (6, 2)
    assert sum(index >= 6 for index in rows().indices(0, 0, 1000, shuffle=True)) == 250
    assert sum(index >= 6 for index in rows(1, 3).indices(0, 0, 1000, shuffle=True)) == 750
    assert len({rows().fingerprint(), rows(1, 3).fingerprint(), rows(3, 1).fingerprint()}) == 3
    with pytest.raises(ConfigError, match="has 1 values and --dataset 2"):
        rows(1)
    empty = write(tmp_path / "b.jsonl", "{")
    with pytest.raises(DataError, match=rf"no usable row in {empty}, which has a weight"):
        load_rows([a, empty], TOKENIZER, max_length=99, on_bad_row="skip", weights=[1, 1])


@pytest.mark.parametrize("streamed", [False, True])
def test_prompts_alone_are_dropped_on_request(tmp_path, streamed):
    """One such row in a data set must not end a run that takes the completions of the others."""
    pairs = [{"prompt": "a", "completion": "b"}, {"prompt": "c"}, {"prompt": "d", "completion": "e"}]
    path = write(tmp_path / "d.jsonl", *pairs)
    refused = r"--lmbda 0.5 .* 1 of 3 rows have a prompt only \(first: .*d.jsonl:2\).*--prompt_only drop"
    with pytest.raises(DataError, match=refused):
        load(path).check_sources(lmbda=0.5, seq_kd=False)
    if streamed:
        rows = StreamedRows([path], TOKENIZER, max_length=100, prompt_only="drop")
    else:
        rows = tokenise([path], TOKENIZER, RowPolicy(100, prompt_only="drop"))
        assert len(rows) == 2
    rows.check_sources(lmbda=0.5, seq_kd=False)
    assert all(rows[index].completion_ids for index in range(len(rows)))
    assert "1 dropped as prompt_only (first: " in rows.account()
