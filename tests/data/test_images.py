"""Rows with images: every form gives the same tokens and the same picture; expansion as transformers' processors have
it; a damaged or missing image is a row with its place; rows keep their pictures in memory, in a file, and streamed.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from megatron_gkd.architecture import read_architecture
from megatron_gkd.cli import main
from megatron_gkd.data.chat import ChatEncoder, load_tokenizer
from megatron_gkd.data.collate import collate
from megatron_gkd.data.cut import cut
from megatron_gkd.data.image_tokens import ImageTokens, read_image_tokens
from megatron_gkd.data.pictures import load
from megatron_gkd.data.policy import RowPolicy
from megatron_gkd.data.row_file import read_rows, write_rows
from megatron_gkd.data.rows import RowDataset, load_rows
from megatron_gkd.data.streaming import StreamedRows
from megatron_gkd.errors import ConfigError, DataError
from megatron_gkd.records import Row, Sample
from tests.support.loopback import LoopbackServer
from tests.support.vision_models import picture, write_tiny_vision

ANSWER = {"role": "assistant", "content": "a cat"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vision(tmp_path_factory.mktemp("images") / "internvl", layers=1)


@pytest.fixture(scope="module")
def images(model: Path) -> ImageTokens:
    return tokens_of(model, "internvl")


def tokens_of(model: Path, family: str, max_tiles: int | None = None) -> ImageTokens:
    vision = read_architecture(model).vision
    assert vision is not None
    return read_image_tokens(model, family, vision.image_token_id, load_tokenizer(model), max_tiles=max_tiles)


def png(width: int = 200, height: int = 60, seed: int = 0) -> bytes:
    file = io.BytesIO()
    picture(width, height, seed).save(file, "PNG")
    return file.getvalue()


def rows_of(folder: Path, model: Path, images: ImageTokens | None, *records: Any, **options: Any) -> RowDataset:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_rows([path], load_tokenizer(model), max_length=400, images=images, **options)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, ANSWER]


def test_every_form_gives_the_same_row(tmp_path: Path, model: Path, images: ImageTokens) -> None:
    (tmp_path / "x.png").write_bytes(png())
    text = base64.b64encode(png()).decode()
    part, rest = {"type": "image"}, {"type": "text", "text": "what?"}
    values: list[dict[str, Any]] = [
        *({"image": "x.png"}, {"path": "x.png"}, {"url": "x.png"}, {"image": str(tmp_path / "x.png")}),
        *({"base64": text}, {"image": f"data:image/png;base64,{text}"}, {"url": f"file://{tmp_path}/x.png"}),
    ]
    records: list[dict[str, Any]] = [{"messages": user([part | value, rest])} for value in values]
    openai = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}
    records += [
        {"messages": user([openai, rest])},
        {"messages": user([part, rest]), "images": ["x.png"]},
        {"messages": user("<image>what?"), "images": ["x.png"]},
        {"messages": user("<image>what?"), "image": "x.png"},
        {"messages": user("what?"), "images": ["x.png"]},
        {"prompt": "<image>what?", "completion": "a cat", "images": ["x.png"]},
        {"prompt": user([part, rest])[:1], "completion": "a cat", "images": [{"path": "x.png"}]},
        {"instruction": "<image>what?", "output": "a cat", "image": {"path": "x.png"}},
        {
            "conversations": [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a cat"}],
            "image": "x.png",
        },
    ]
    rows = rows_of(tmp_path, model, images, *records)
    assert len(rows) == len(records)
    first, decode = rows[0], ChatEncoder(load_tokenizer(model)).decode
    assert decode(first.prompt_ids) == (
        f"<|im_start|>user\n<img>{'<IMG_CONTEXT>' * 16}</img>\nwhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    for row in rows:
        assert (row.prompt_ids, row.completion_ids) == (first.prompt_ids, first.completion_ids)
        (seen,) = row.pictures
        assert (seen.size, seen.digest, seen.spans) == ((200, 60), first.pictures[0].digest, first.pictures[0].spans)
        assert load(seen).tobytes() == picture(200, 60).tobytes()


def test_a_column_of_a_container(tmp_path: Path, model: Path, images: ImageTokens) -> None:
    """{bytes, path} as data sets with an image column have it; mixed with rows of text alone."""
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table(
        {
            "prompt": ["what?", "why?"],
            "completion": ["a cat", "so"],
            "image": pyarrow.array([{"bytes": png(), "path": "lost.png"}, None], kind),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows = load_rows([tmp_path / "rows.parquet"], load_tokenizer(model), max_length=400, images=images)
    assert [len(row.pictures) for row in rows] == [1, 0]
    assert load(rows[0].pictures[0]).tobytes() == picture(200, 60).tobytes()


def test_several_images_turns_and_the_places_of_their_rows(tmp_path: Path, model: Path, images: ImageTokens) -> None:
    for number, size in enumerate([(80, 60), (200, 60), (56, 56)]):
        (tmp_path / f"{number}.png").write_bytes(png(*size, seed=number))
    turns = [*user("<image>one<image>two"), *user("and <image>?")]
    names = [f"{number}.png" for number in range(3)]
    rows = rows_of(tmp_path, model, images, {"messages": turns, "images": names}, loss_scale="all")
    assert [[Path(p.name).name for p in row.pictures] for row in rows] == [names[:2], names]
    for row in rows:
        places = [place for seen in row.pictures for place in seen.places]
        assert places == [n for n, token in enumerate(row.prompt_ids) if token == images.image_token_id]
        assert images.bare(row.prompt_ids, row.pictures).count(images.image_token_id) == len(row.pictures)
    assert [seen.num_tokens for seen in rows[1].pictures] == [4, 16, 4]


@pytest.mark.parametrize("packing", [False, True])
def test_the_index_of_a_micro_batch(packing: bool, tmp_path: Path, model: Path, images: ImageTokens) -> None:
    """Sample by sample, also where a completion holds the placeholder's id; and of each context-parallel part."""
    (tmp_path / "x.png").write_bytes(png())
    record = {"messages": user("<image>what?"), "images": ["x.png"]}
    rows = rows_of(tmp_path, model, images, record, {"messages": user("why?")}, record)
    sampled = (7, images.image_token_id, 9)
    samples = [Sample(n, n, row.prompt_ids, sampled, "dataset", pictures=row.pictures) for n, row in enumerate(rows)]
    batch = collate(samples, packing=packing, pad_to_multiple_of=4, pad_segments_to=4)
    assert batch.media is not None
    flat, own = batch.tokens.reshape(-1), batch.media.index
    assert (flat[own] == images.image_token_id).all()
    assert len(own) == batch.media.num_rows == 32
    assert int((flat == images.image_token_id).sum()) == 32 + 3, "those of the completions are text"
    none = torch.zeros(0, dtype=torch.int64)
    parts = [cut(dataclasses.replace(batch, loss_index=none), 2, rank) for rank in range(2)]
    for part in parts:
        assert part.media is not None
        assert (part.tokens.reshape(-1)[part.media.index] == images.image_token_id).all()
    found = torch.cat([part.media.rows for part in parts if part.media is not None])
    assert sorted(found.tolist()) == list(range(32))


def test_rows_in_a_file_and_streamed_have_the_same_pictures(tmp_path: Path, model: Path, images: ImageTokens) -> None:
    (tmp_path / "x.png").write_bytes(png())
    inline = {"type": "image", "base64": base64.b64encode(png(56, 56)).decode()}
    records = [{"messages": user("<image>what?"), "images": ["x.png"]}, {"messages": user([inline])}]
    rows = rows_of(tmp_path, model, images, *records)
    paths = [str(tmp_path / "rows.jsonl")]
    write_rows(tmp_path / "key.safetensors", rows, paths)
    mapped = read_rows(tmp_path / "key.safetensors", paths, verify=True)
    streamed = StreamedRows(paths, load_tokenizer(model), max_length=400, images=images)
    assert list(rows) == list(mapped) == list(streamed)
    assert rows[1].pictures[0].data == png(56, 56)
    assert rows[0].pictures[0].data is None, "a file is not carried"
    assert mapped.fingerprint() == rows.fingerprint()
    (tmp_path / "x.png").write_bytes(png(seed=1))
    with pytest.raises(DataError, match=r"x.png has changed since the rows were read"):
        load(rows[0].pictures[0])
    assert rows_of(tmp_path, model, images, *records).fingerprint() != rows.fingerprint()


def test_a_teacher_with_other_tiles_or_another_prompt(tmp_path: Path, model: Path, images: ImageTokens) -> None:
    (tmp_path / "x.png").write_bytes(png())
    record = {"messages": user("<image>what?"), "images": ["x.png"]}
    told = record | {"teacher_prompt": "It is a cat. <image>what?"}
    blind = record | {"teacher_prompt": "It is a cat."}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (record, told, blind)))
    policy = RowPolicy(400, images=images, teacher_images=tokens_of(model, "internvl", 1))
    from megatron_gkd.data.rows import tokenise

    rows = list(tokenise([tmp_path / "rows.jsonl"], load_tokenizer(model), policy))
    assert [[p.num_tokens for p in row.pictures] for row in rows] == [[16]] * 3
    assert [[p.num_tokens for p in row.teacher_pictures] for row in rows] == [[4], [4], []]
    sample = Sample(0, 0, rows[0].prompt_ids, (5, 6), "dataset", None, rows[0].teacher_prompt_ids)
    assert sample.for_teacher.num_loss_tokens == sample.num_loss_tokens
    assert len(rows[0].prompt_ids) - len(rows[0].prompt_ids_for_teacher) == 12
    assert (
        load_rows([tmp_path / "rows.jsonl"], load_tokenizer(model), max_length=400, images=images)[0].teacher_prompt_ids
        is None
    ), "the same tokens are no prompt of the teacher's own"


def damaged(folder: Path) -> None:
    (folder / "cut.png").write_bytes(png()[:2000])
    (folder / "text.png").write_text("no image")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": user("<image>?"), "images": ["gone.png"]}, r"rows.jsonl:1: .*gone.png cannot be read: No such file"),
    ({"messages": user("<image>?"), "images": ["cut.png"]}, r"rows.jsonl:1: .*cut.png is a damaged image"),
    ({"messages": user("<image>?"), "images": ["text.png"]}, r"text.png is not an image that can be read"),
    ({"messages": user("<image>?"), "images": ["http://a/b.png"]}, "rows.jsonl:1: http://a/b.png is a URL"),
    ({"messages": user("<image><image>?"), "images": ["cut.png"]}, "1 images in `images` and 2 places"),
    ({"messages": user([{"type": "image"}])}, "is an image without `image`, `path`, `url` or `base64`"),
    ({"messages": user([{"type": "video", "video": "x"}])}, "of the type 'video'; supported are text and image"),
    ({"messages": user([{"type": "image", "base64": "&"}])}, "is not base64"),
    ({"messages": user("<IMG_CONTEXT>")}, "0 images and the chat template made 1 placeholders"),
    (
        {"messages": [user("?")[0], {"role": "assistant", "content": [{"type": "image", "path": "ok.png"}]}]},
        "the completion has an image",
    ),
    ({"messages": user("a\0b"), "images": ["ok.png"]}, "the character NUL"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "message"), BAD)
def test_what_is_wrong_is_named_with_the_row(
    tmp_path: Path, model: Path, images: ImageTokens, record: dict[str, Any], message: str
) -> None:
    damaged(tmp_path)
    (tmp_path / "ok.png").write_bytes(png())
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path, model, images, record)
    kept = rows_of(tmp_path, model, images, record, {"messages": user("why?")}, on_bad_row="skip")
    assert kept.summary.dropped == {"malformed": 1}


class Pictures(LoopbackServer):
    """One image, one text, and an image that is sent in part."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append(request.path)
        data = {"/x.png": png(), "/text": b"no image", "/cut.png": png()[:2000]}.get(request.path)
        request.send_response(404 if data is None else 200)
        request.send_header("Content-Length", str(len(data or b"")))
        request.end_headers()
        request.wfile.write(data or b"")


def test_images_of_urls_are_fetched_once_where_that_is_allowed(
    tmp_path: Path, model: Path, images: ImageTokens
) -> None:
    kept = tmp_path / "kept"
    allowed = dataclasses.replace(images, url_dir=str(kept))
    with Pictures() as server:
        record = {"messages": user("<image>what?"), "images": [f"{server.url}/x.png"]}
        first = rows_of(tmp_path, model, allowed, record)[0]
        again = rows_of(tmp_path, model, allowed, record)[0]
        assert server.asked == ["/x.png"]
        for name, message in (("none", "404"), ("text", "is not an image"), ("cut.png", "is a damaged image")):
            record = {"messages": user("<image>what?"), "images": [f"{server.url}/{name}"]}
            with pytest.raises(DataError, match=rf"rows.jsonl:1: {server.url}/{name} .*{message}"):
                rows_of(tmp_path, model, allowed, record)
    assert first == again
    (file,) = kept.iterdir()
    (seen,) = first.pictures
    assert seen.path == str(file)
    assert load(seen).tobytes() == picture(200, 60).tobytes()
    with pytest.raises(DataError, match=r"rows.jsonl:1: http://127.0.0.1:\d+/none cannot be fetched: .*refused"):
        rows_of(tmp_path, model, allowed, {"messages": user("?"), "images": [f"{server.url}/none"]})


def test_a_model_of_text_alone_is_not_given_images(tmp_path: Path, model: Path) -> None:
    (tmp_path / "x.png").write_bytes(png())
    with pytest.raises(DataError, match="`images` is not used: only text is trained on"):
        rows_of(tmp_path, model, None, {"messages": user("<image>?"), "images": ["x.png"]})


def test_a_prompt_with_an_image_is_never_cut(tmp_path: Path, model: Path, images: ImageTokens) -> None:
    (tmp_path / "x.png").write_bytes(png())
    long = {"messages": user("<image>" + "w" * 500), "images": ["x.png"]}
    rows = rows_of(tmp_path, model, images, long, {"messages": user("w" * 500)}, overlong="truncate_left")
    assert (len(rows), rows.summary.dropped, rows.summary.num_truncated) == (1, {"overlong": 1}, 1)


# ---- as transformers has it -----------------------------------------------------------------------------------------


class Without:
    """Stands in for a video processor, which needs torchvision."""


@pytest.mark.parametrize("max_tiles", [None, 1, 2])
def test_tokens_and_pixels_are_those_of_the_internvl_processor(model: Path, max_tiles: int | None) -> None:
    from transformers import AutoImageProcessor, InternVLProcessor

    tokenizer = load_tokenizer(model)
    processor: Any = InternVLProcessor.__new__(InternVLProcessor)
    processor.image_processor, processor.tokenizer = AutoImageProcessor.from_pretrained(model), tokenizer
    processor.video_processor, processor.image_seq_length = Without(), 4
    processor.start_image_token, processor.end_image_token, processor.image_token = "<img>", "</img>", "<IMG_CONTEXT>"
    rule = tokens_of(model, "internvl", max_tiles)
    for width, height in [(80, 60), (200, 60), (31, 90), (640, 480), (56, 56)]:
        image = picture(width, height)
        options = {"crop_to_patches": True} | ({} if max_tiles is None else {"max_patches": max_tiles})
        made = processor.image_processor(images=[image], return_tensors="pt", **options)
        text = processor.replace_image_token({"num_patches": made["num_patches"]}, 0)
        one = rows_picture((width, height))
        ids, (placed,) = rule.expand((5, rule.image_token_id, 6), [one])
        assert ids == (5, *tokenizer(text, add_special_tokens=False)["input_ids"], 6)
        assert torch.equal(rule.inputs([one])["pixel_values"], made["pixel_values"])
        assert placed.num_tokens == 4 * len(made["pixel_values"])


def rows_picture(size: tuple[int, int]) -> Any:
    from megatron_gkd.data.image_forms import ImageSource
    from megatron_gkd.data.pictures import read_picture

    return read_picture(ImageSource(None, png(*size)), Path(), 0)


def test_tokens_and_pixels_are_those_of_the_llava_processor(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    model = write_tiny_vision(tmp_path / "llava", "llava", decoder="llama", layers=1)
    rule, processor = tokens_of(model, "llava"), AutoProcessor.from_pretrained(model)
    text = "a<image>b<image>"
    sizes = [(80, 60), (33, 200)]
    made = processor(images=[picture(*size) for size in sizes], text=[text], return_tensors="pt")
    bare = tuple(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    pictures = [rows_picture(size) for size in sizes]
    assert rule.expand(bare, pictures)[0] == tuple(made["input_ids"][0].tolist())
    assert torch.equal(rule.inputs(pictures)["pixel_values"], made["pixel_values"])
    with pytest.raises(ConfigError, match="one tile each"):
        tokens_of(model, "llava", 3)


def test_a_template_that_takes_parts_alone(tmp_path: Path, model: Path) -> None:
    """LLaVA's writes nothing of a string: texts are parts for it too."""
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] | selectattr('type', 'equalto', "
        "'image') %}<IMG_CONTEXT>{% endfor %}{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ p['text'] }}{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant\n{% endif %}"
    )
    encoder = ChatEncoder(tokenizer)
    ids, answer = encoder.encode("\0000\0what?", "a cat")
    assert encoder.decode(ids) == "<|im_start|>user\n<IMG_CONTEXT>what?<|im_end|><|im_start|>assistant\n"
    assert encoder.decode(answer or ()) == "a cat<|im_end|>"


def test_check_data_shows_images(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.png").write_bytes(png())
    records = [
        {"messages": user("<image>what?"), "images": ["x.png"]},
        {"messages": user([{"type": "image", "path": "x.png"}, {"type": "text", "text": "what?"}])},
        {"messages": user("look"), "images": ["x.png", "x.png"]},
        {"messages": user("why?")},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    line = ["check", "data", "--model", str(model), "--dataset", str(path), "--max_length", "400"]
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert "x.png: 200x60 pixels, 16 tokens" in shown
    assert "prompt  | <IMG_CONTEXT>\n" in shown or "user\n  prompt  | <IMG_CONTEXT>" in shown
    assert "images in prompts        4, of 64 tokens" in shown
    assert "WRONG" not in shown
    assert "LOOK AT" not in shown
    assert main([*line, "--max_image_tiles", "1", "--image_url_dir", str(tmp_path / "kept")]) == 0
    assert "images in prompts        4, of 16 tokens" in capsys.readouterr().out


def test_a_row_says_what_it_has() -> None:
    assert Row((1,), (2,)).pictures == ()
