"""Damaged input of every kind, seeded: each is a clear error with its place, a counted skip, or a row that is valid.

What a JSONL file holds is said a second time here, by `expected`, in other words than the package's: the lines that are
rows, and the text that each row must decode to. So a line that is refused without reason, taken without being valid, or
read as something else fails, beside other exceptions and hangs. Parquet and Arrow files have no such second reading: a
changed letter in them is a valid letter (page checksums, where a writer makes them, are verified; one test shows it).

Flags and YAML files at the end: ConfigError or a configuration that validates its own round trip.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_gkd.config.flags import parse_run_config, to_yaml
from megatron_gkd.config.run import flags
from megatron_gkd.data.rows import load_rows
from megatron_gkd.data.streaming import StreamedRows
from megatron_gkd.errors import ConfigError, DataError
from megatron_gkd.records import Row
from tests.support.effort import count
from tests.support.mutations import ASSISTANT, USER, damaged, odd_value, pick
from tests.support.saved_rows import write_saved
from tests.support.tiny_tokenizers import chat_tokenizer

pytestmark = pytest.mark.timeout(240)

TOKENIZER = chat_tokenizer()
MAX_LENGTH = 4000
NUM_RECORDS, NUM_FILES, NUM_FLAGS = count(500, 5000), count(150, 1500), count(200, 2000)
VALID: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]},
    {"messages": [USER]},
    {"prompt": "What is 2 + 3?", "completion": "5"},
    {"prompt": [USER], "response": [ASSISTANT]},
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "I am well."}], "system": "x"},
    {"instruction": "Add.", "input": "2 + 3", "output": "5"},
    {"instruction": "Add.", "output": "5", "system": "x", "history": [["a", "b"]]},
]
GOOD = json.dumps(VALID[2]).encode()


# --- mutations


def mutate_record(rng: random.Random) -> bytes:
    record = json.loads(json.dumps(rng.choice(VALID)))
    for _ in range(rng.randrange(1, 4)):
        picked = pick(record, rng)
        if picked is None:
            break
        (parent, key), kind = picked, rng.randrange(5)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice([*map(str, VALID[5]), "messages", "prompt", "response", "from", "id"])] = odd_value(rng)
        elif kind == 2 and isinstance(parent, list):
            parent.insert(key, odd_value(rng))
        else:
            parent[key] = odd_value(rng)
    return json.dumps(record, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")


def mutate_bytes(rng: random.Random) -> bytes:
    line = bytearray(json.dumps(rng.choice(VALID), ensure_ascii=False).encode())
    at = rng.randrange(len(line))
    kind = rng.randrange(9)
    if kind == 0:
        for _ in range(rng.randrange(1, 4)):
            line[rng.randrange(len(line))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del line[at:]
    elif kind == 2:
        line[at:at] = rng.choice(
            [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\0", b"\xef\xbb\xbf", b"\r", b"\n", b"\x1a", b"\\"]
        )
    elif kind == 3:  # a key twice, with the same or another value
        line[1:1] = rng.choice([b'"prompt": "a", "prompt": "a", ', b'"id": 1, "id": 2, ', b'"prompt": "again", '])
    elif kind == 4:
        line = bytearray(rng.choice([b"[", b'{"messages":[']) * rng.choice([40, 3000, 100000]))
    elif kind == 5:
        line = bytearray(b'{"prompt": "a", "n": ' + rng.choice([b"9" * 5000, b"1e999999", b"-", b"NaN", b"0x1"]) + b"}")
    elif kind == 6:
        line += rng.choice([b"\r", b"  ", b",", b"}", bytes(line), b"// x", b"\0"])
    elif kind == 7:
        line = bytearray(rng.choice([b"null", b"3", b'"text"', b"[]", b"{}", b"true", b"\xef\xbb\xbf", b"\x00" * 9]))
    else:
        line = bytearray(json.dumps(VALID[2]).encode(rng.choice(["utf-16", "utf-32"])))
    return bytes(line)


# --- a second reading of a JSONL file


class Invalid(Exception):
    pass


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise Invalid
    return dict(pairs)


def text(value: Any) -> str:
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise Invalid
    return value


def turns(value: Any, role_key: str = "role", text_key: str = "content") -> list[tuple[str, str]]:
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise Invalid
    return [(text(turn.get(role_key)), text(turn.get(text_key))) for turn in value]


def conversation(record: dict[str, Any]) -> tuple[list[tuple[str, str]], str | None]:
    """The turns before the completion, and the completion's text."""
    record = {name: value for name, value in record.items() if value is not None}
    forms = {"messages": [], "prompt": ["completion", "response"], "conversations": [], "instruction": ["output"]}
    (form,) = [name for name in forms if name in record] if len(forms.keys() & record.keys()) == 1 else [None]
    if form is None or {"completion", "response", "output"} & record.keys() - set(forms[form]):
        raise Invalid
    empty: tuple[Any, ...] = ("", [], {})
    if form != "instruction" and record.get("input", "") not in empty:
        raise Invalid
    if record.get("history", []) not in empty and not isinstance(record.get(form), str):
        raise Invalid
    history = record.get("history", []) if form in ("prompt", "instruction") else []
    pairs = isinstance(history, list) and all(isinstance(h, list) and len(h) == 2 for h in history)
    if not pairs and isinstance(record[form], str):
        raise Invalid
    before = [("system", text(record["system"]))] if record.get("system", "") != "" else []
    for question, reply in history if isinstance(record[form], str) else []:
        before += [("user", text(question)), ("assistant", text(reply))]
    if form == "prompt":
        if "completion" in record and "response" in record:
            raise Invalid
        prompt, answer = record["prompt"], record.get("completion", record.get("response"))
        said = [("user", text(prompt))] if isinstance(prompt, str) else turns(prompt)
        if answer is not None and not isinstance(answer, str):
            ((role, answer),) = turns(answer) if isinstance(answer, list) and len(answer) == 1 else [("", "")]
            if role != "assistant":
                raise Invalid
    elif form == "instruction":
        prompt = "\n".join(filter(None, [text(record["instruction"]), text(record.get("input", ""))]))
        if not prompt:
            raise Invalid
        said, answer = [("user", prompt)], record.get("output")
    else:
        said, answer = turns(record[form], *(("from", "value") if form == "conversations" else ())), None
        if form == "conversations":
            names = dict(human="user", user="user", gpt="assistant", assistant="assistant", chatgpt="assistant")
            names |= dict(model="assistant", bot="assistant", system="system", tool="tool", observation="tool")
            said = [(names.get(role, "?"), words) for role, words in said]
            if "?" in dict(said):
                raise Invalid
        if said[0][0] == "system" and before:
            raise Invalid
        said = [*before, *said]
        if said[-1][0] == "assistant":
            *said, (_, answer) = said
    if form in ("prompt", "instruction"):
        if said[0][0] == "system" and before:
            raise Invalid
        said = [*before, *said]
    if not said or (said[-1][0] not in ("user", "tool") and (answer is None or form == "prompt")):
        raise Invalid
    return said, None if answer is None else text(answer)


def expected(file: bytes) -> dict[int, str | None]:
    """Line -> the text of its row, or None where the line is to be refused."""
    found: dict[int, str | None] = {}
    for number, line in enumerate(file.split(b"\n"), start=1):
        if not line.strip(b" \t\r\v\f"):
            continue
        try:
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            record = json.loads(line.decode("utf-8"), object_pairs_hook=no_key_twice)
            if not isinstance(record, dict):
                raise Invalid
            said, answer = conversation(record)
        except (Invalid, ValueError, RecursionError):
            found[number] = None
            continue
        rendered = (
            "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in said) + "<|im_start|>assistant\n"
        )
        found[number] = rendered if answer is None else f"{rendered}{answer}<|im_end|>"
    return found


def spelled(row: Row) -> str:
    return str(TOKENIZER.decode([*row.prompt_ids, *(row.completion_ids or ())], clean_up_tokenization_spaces=False))


# --- data rows


def check_file(path: Path) -> str:
    """All readings of a JSONL file agree with `expected`. Returns what it was: "rows", "some" or "none" valid."""
    wanted = expected(path.read_bytes())
    rows_wanted = {number: words for number, words in wanted.items() if words is not None}
    if not rows_wanted:
        for read in (load_rows, StreamedRows):
            with pytest.raises(DataError, match=str(path)):
                read([path], TOKENIZER, max_length=MAX_LENGTH, on_bad_row="skip")
        return "none"
    loaded = load_rows([path], TOKENIZER, max_length=MAX_LENGTH, on_bad_row="skip")
    found = {int(loaded.place(i).rpartition(":")[2]): spelled(loaded[i]) for i in range(len(loaded))}
    assert found == rows_wanted
    summary = loaded.summary
    assert (summary.num_read, summary.num_used) == (len(wanted), len(rows_wanted))
    assert sum(summary.dropped.values()) == len(wanted) - len(rows_wanted)

    streamed = StreamedRows([path], TOKENIZER, max_length=MAX_LENGTH, on_bad_row="skip")
    assert len(streamed) == len(wanted)
    for index, (number, words) in enumerate(wanted.items()):
        place = int(streamed.place(index).rpartition(":")[2])
        assert words is None or place == number
        assert spelled(streamed[index]) == rows_wanted[place]
    assert streamed.summary.dropped == summary.dropped

    first_bad = next((number for number, words in wanted.items() if words is None), None)
    for read in (load_rows, StreamedRows):
        if first_bad is None:
            read([path], TOKENIZER, max_length=MAX_LENGTH)
        else:
            with pytest.raises(DataError, match=rf"d.jsonl:{first_bad}: (?s:.)*--on_bad_row skip"):
                read([path], TOKENIZER, max_length=MAX_LENGTH)
    return "rows" if first_bad is None else "some"


def test_mutated_rows(tmp_path: Path) -> None:
    path, outcomes = tmp_path / "d.jsonl", []
    for seed in range(NUM_RECORDS):
        rng = random.Random(seed)
        line = (mutate_record if seed % 2 else mutate_bytes)(rng)
        end = rng.choice([b"\n", b"\r\n"])
        alone = rng.random() < 0.1
        lines = [line] if alone else [GOOD, line, GOOD] if rng.random() < 0.8 else [line, b"", GOOD]
        path.write_bytes(end.join(lines) + (end if rng.random() < 0.5 else b""))
        try:
            outcomes.append(check_file(path))
        except BaseException:
            print(f"seed {seed}: {path.read_bytes()[:300]!r}")
            raise
    counts = {outcome: outcomes.count(outcome) for outcome in ("rows", "some", "none")}
    assert min(counts.values()) > NUM_RECORDS // 50, counts  # the mutations reach every outcome


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"\xef\xbb\xbf", b"\r\n", b"\0", b"\xef\xbb\xbf" + GOOD, GOOD + b"\r"]
)
def test_odd_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    if content.strip():
        check_file(tmp_path / "d.jsonl")
        return
    for read in (load_rows, StreamedRows):
        with pytest.raises(DataError, match=str(tmp_path)):
            read([tmp_path / "d.jsonl"], TOKENIZER, max_length=MAX_LENGTH, on_bad_row="skip")


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_damaged_binary_files(tmp_path: Path, kind: str, on_bad_row: Any) -> None:
    """Never another exception, and both readings agree on what is there."""
    records = [VALID[2] | {"id": i, "tags": ["x"] * i} for i in range(12)]
    if kind == "parquet":
        path = file = tmp_path / "d.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=5)
    else:
        path = write_saved(tmp_path / "saved", records, batch_rows=5)
        (file,) = path.glob("*.arrow")
    whole = file.read_bytes()
    outcomes = []
    for seed in range(NUM_FILES):
        file.unlink()
        file.write_bytes(damaged(whole, random.Random(seed)))
        results: list[set[Row] | None] = []
        named: list[bool] = []
        for read in (load_rows, StreamedRows):
            try:
                rows = read([path], TOKENIZER, max_length=MAX_LENGTH, on_bad_row=on_bad_row)
                results.append(set(rows))
            except DataError as error:
                results.append(None)
                named.append(str(path) in str(error))
        assert results[0] == results[1], seed
        assert all(named), seed
        outcomes.append(results[0] is None)
    assert 0 < sum(outcomes) < NUM_FILES
    (file if kind == "parquet" else path / "state.json").write_bytes(b"")
    for read in (load_rows, StreamedRows):
        with pytest.raises(DataError, match=str(path)):
            read([path], TOKENIZER, max_length=MAX_LENGTH)


def test_a_changed_letter_in_parquet_is_found_where_there_are_checksums(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    table = pyarrow.table({"prompt": ["Hello Hello"] * 3})
    options: dict[str, Any] = dict(compression="none", use_dictionary=False, write_statistics=False)
    pyarrow.parquet.write_table(table, path, write_page_checksum=True, **options)
    path.write_bytes(path.read_bytes().replace(b"Hello H", b"Jello H", 1))
    for read in (load_rows, StreamedRows):
        with pytest.raises(DataError, match=r"d.parquet: .*(?i:crc|checksum)"):
            read([path], TOKENIZER, max_length=MAX_LENGTH)


# --- flags and YAML files

WORDS = [
    "",
    "null",
    "None",
    "true",
    "x",
    "-1",
    "0",
    "1e999",
    "nan",
    "inf",
    "9" * 400,
    "[1",
    "{a: b}",
    "\u00e9",
    "\0",
    "--",
]
WORDS += [
    "1 2",
    "a=b",
    "#",
    "'",
    '"',
    "!!python/object:os.system",
    "&a",
    "*a",
    "- x",
    "---",
    "%",
    "\t",
    "\ud800",
    "0x10",
    "1_0",
]


def configuration(argv: list[str]) -> None:
    """ConfigError, or a configuration that reads back from its own YAML."""
    try:
        cfg = parse_run_config(argv)
    except ConfigError:
        return
    assert cfg.to_flat().keys() == flags().keys()
    to_yaml(cfg)


def test_mutated_flags(tmp_path: Path) -> None:
    names = list(flags())
    for seed in range(NUM_FLAGS // 2):
        rng = random.Random(seed)
        argv = ["--model", "S"]
        for _ in range(rng.randrange(1, 5)):
            name = rng.choice(names)
            word = rng.choice([*WORDS, name])
            if rng.random() < 0.2:
                name = name.replace(rng.choice(name), rng.choice(["", "-", "\u00e9", "__"]), 1)
            argv += rng.choice([[f"--{name}", word], [f"--{name}={word}"], [f"--{name}"], [word]])
        if not {"--help", "-h"} & set(argv):
            configuration(argv)


def test_mutated_yaml(tmp_path: Path) -> None:
    whole = to_yaml(parse_run_config(["--model", "S", "--dataset", "a.jsonl", "b.jsonl"])).encode()
    path = tmp_path / "run.yaml"
    for seed in range(NUM_FLAGS // 2):
        rng = random.Random(seed)
        if seed % 2:
            path.write_bytes(damaged(whole, rng))
        else:
            lines = whole.decode().splitlines()
            for _ in range(rng.randrange(1, 4)):
                at, word = rng.randrange(len(lines)), rng.choice(WORDS)
                name = lines[at].partition(":")[0]
                lines[at] = rng.choice(
                    [f"{name}: {word}", f"{word}: {word}", f"{name}:\n  {word}: 1", lines[0], "? [a]"]
                )
            path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        configuration(["--config", str(path)])
