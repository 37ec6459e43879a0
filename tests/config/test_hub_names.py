"""Which texts are names of a hub, what they mean, and which are paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_gkd.config.hub_names import HubName, Kind, names_in, read_name
from megatron_gkd.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "kind", "meant"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "model", HubName("", "hf", "model", "Qwen/Qwen2.5-7B-Instruct")),
        ("MS::Qwen/Q", "model", HubName("", "modelscope", "model", "Qwen/Q")),
        (f"Qwen/Q@{COMMIT}", "model", HubName("", "hf", "model", "Qwen/Q", COMMIT)),
        ("HF::Qwen/Q@refs/pr/3", "model", HubName("", "hf", "model", "Qwen/Q", "refs/pr/3")),
        (
            "AI-ModelScope/alpaca-gpt4-data-en#2000",
            "dataset",
            HubName("", "hf", "dataset", "AI-ModelScope/alpaca-gpt4-data-en", None, (), 2000),
        ),
        (
            "modelscope/coco_2014_caption:validation#5000",
            "dataset",
            HubName("", "hf", "dataset", "modelscope/coco_2014_caption", None, ("validation",), 5000),
        ),
        ("O/N@v1.0:en/de", "dataset", HubName("", "hf", "dataset", "O/N", "v1.0", ("en", "de"))),
    ],
)
def test_names(text: str, kind: Kind, meant: HubName) -> None:
    found = read_name(text, kind)
    assert found == HubName(text, *(getattr(meant, name) for name in list(meant.__dataclass_fields__)[1:]))


def test_the_hub_of_a_bare_name_is_asked_for() -> None:
    hubs = [read_name(text, "model", use_hf=False) for text in ("O/N", "HF::O/N", "MS::O/N")]
    assert [name and name.hub for name in hubs] == ["modelscope", "hf", "modelscope"]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "S",
            "a/b/c",
            "/O/N",
            "./O/N",
            "../N",
            "O/N/",
            "~/N",
            "",
            "https://a/b",
            "data/train.jsonl",
            "data/x.parquet#5",
        ),
        *("here/N", "here/there"),
    ],
)
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_paths(text: str, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What exists, what does not look like a name, and what is misspelt in a directory that exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/there").mkdir(parents=True)
    assert read_name(text, kind) is None
    named = read_name("HF::here/N", kind)
    assert named is not None
    assert named.repo == "here/N"


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("dataset", "HF::N", r"--dataset HF::N is not a name on a hub: give HF::OWNER/NAME\[@REVISION\]\[:SUBSET\]"),
        (
            "model",
            "MS::O/N:train",
            r"--model MS::O/N:train is not a name on a hub: give MS::OWNER/NAME\[@REVISION\]$",
        ),
        ("eval_dataset", "O/N#0", "--eval_dataset O/N#0 asks for 0 rows"),
    ],
)
def test_malformed(flag: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(names_in({flag: [text] if "dataset" in flag else text}))


def test_subsets_of_one_revision_are_pinned_together() -> None:
    names = [read_name(text, "dataset") for text in ("O/N:a#5", "O/N:b", "O/N@v2:a")]
    assert [name and name.key for name in names] == ["hf/dataset/O/N@"] * 2 + ["hf/dataset/O/N@v2"]
