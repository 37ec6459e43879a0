"""`megatron-gkd convert`: there and back bit for bit over layouts, megatron-core's own loader, refusals, memory.

That the map is right is tests/weights/test_logits.py's; here `--check` must see a network that is not the same.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file

from megatron_gkd import cli
from megatron_gkd.architecture import read_architecture
from megatron_gkd.commands.convert import (
    ConvertConfig,
    _set_aside,
    memory_bound_bytes,
    parse_convert_config,
    run_convert,
)
from megatron_gkd.errors import CheckpointError, ConfigError
from megatron_gkd.model.build import build_model
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.weights.compare import sample_tokens
from megatron_gkd.weights.hf_files import HFCheckpoint
from megatron_gkd.weights.megatron_files import what_it_is
from megatron_gkd.weights.safe_files import read_metadata
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import FULL, LIMIT_S
from tests.support.numerics import FACTOR, allowed_error, reference_and_truth
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import groups_of, load_model, megatron

ROOT = Path(__file__).parents[2]
SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def convert(configs: list[ConvertConfig]) -> list[str]:
    """Messages of the conversions that are refused."""
    messages = []
    with megatron():
        for cfg in configs:
            try:
                run_convert(cfg)
            except CheckpointError as error:
                messages.append(str(error))
    return messages


def config(to: Any, model: Path, save: Path, tp: int = 1, pp: int = 1, ep: int = 1, **options: Any) -> ConvertConfig:
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "expert_model_parallel_size": ep}
    return ConvertConfig(to=to, model=str(model), save=str(save), **sizes, **options)


def digests(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen3", False)])
@pytest.mark.parametrize(("there", "back"), [((1, 1), (2, 1)), ((2, 1), (1, 2)), ((2, 2), (1, 1)), ((1, 2), (2, 2))])
def test_there_and_back_bit_for_bit(tmp_path: Path, family: str, tied: bool, there: Any, back: Any) -> None:
    """Other layouts on the way back, where the vocabulary is padded otherwise too."""
    source = write_tiny_checkpoint(tmp_path / "source", family, tied=tied, dtype=torch.bfloat16)
    for to, model, save, layout in (("megatron", "source", "megatron", there), ("hf", "megatron", "back", back)):
        cfg = config(to, tmp_path / model, tmp_path / save, *layout)
        assert run_ranks(convert, [cfg], world=layout[0] * layout[1]) == [[]] * (layout[0] * layout[1])
    for name in SIDE_FILES:
        for other in ("megatron", "back"):
            assert (tmp_path / other / name).read_bytes() == (source / name).read_bytes()
    with HFCheckpoint(source) as before, HFCheckpoint(tmp_path / "back") as after:
        assert sorted(before.names()) == sorted(after.names())
        for name in before.names():
            assert after.dtype(name) == torch.bfloat16
            assert torch.equal(after.read(name), before.read(name))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "megatron", "back"}


@pytest.mark.parametrize(
    ("family", "options"), [("mixtral", {}), ("qwen3_moe", {"mlp_only_layers": [1], "tied": True})]
)
def test_experts_there_and_back(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    """Through expert parallelism one way and tensor x expert tensor x pipeline parallelism the other."""
    source = write_tiny_checkpoint(tmp_path / "source", family, **options)
    there = config("megatron", source, tmp_path / "m", ep=2, expert_tensor_parallel_size=1)
    assert run_ranks(convert, [there], world=2) == [[], []]
    back = [
        config("hf", tmp_path / "m", tmp_path / "tp", tp=2),
        config("hf", tmp_path / "m", tmp_path / "ep", tp=2, ep=2, expert_tensor_parallel_size=1),
        config("hf", tmp_path / "m", tmp_path / "pp", pp=2),
    ]
    assert run_ranks(convert, back, world=2) == [[], []]
    assert digests(tmp_path / "tp") == digests(tmp_path / "ep") == digests(tmp_path / "pp")
    with HFCheckpoint(source) as before, HFCheckpoint(tmp_path / "tp") as after:
        assert sorted(before.names()) == sorted(after.names())
        assert all(torch.equal(after.read(name), before.read(name)) for name in before.names())


def run_own_loader(source: str, converted: str, layout: Layout) -> list[str]:
    """Load the conversion with megatron-core's own loader and compare the parameters."""
    with megatron():
        expected = load_model(Path(source), layout)
        groups = groups_of(layout)
        chunks = build_model(expected.arch, layout, groups, ModelOptions.on("cpu"), dtype="fp32")
        metadata = {"dp_cp_group": groups.dp_cp}
        state = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
        loaded = dist_checkpointing.load(state, converted)
        faults = []
        for i, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"model{i}"], strict=True)
            right = dict(expected.chunks[i].named_parameters())
            faults += [name for name, value in chunk.named_parameters() if not torch.equal(value, right[name])]
    return faults


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", Layout(tensor=2)),
        ("llama", Layout(pipeline=2, virtual_pipeline=2)),
        ("qwen3_moe", Layout(data=2, expert=2)),
    ],
)
def test_megatron_core_loads_it_in_another_layout(tmp_path: Path, family: str, layout: Layout) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", family, tied=False)
    run_ranks(convert, [config("megatron", source, tmp_path / "out")], world=1)
    assert run_ranks(run_own_loader, str(source), str(tmp_path / "out"), layout, world=2) == [[], []]


def run_save_as_training_does(source: str, out: str, form: str = "") -> None:
    """megatron-core's writer, with entries of an optimizer beside the model."""
    with megatron():
        model = load_model(Path(source), Layout(tensor=2))
        metadata: dict[str, Any] = {"dp_cp_group": model.groups.dp_cp}
        if form == "layers apart":
            metadata["non_homogeneous_layers"] = True
        if dist.get_rank() == 0:
            Path(out).mkdir()
        dist.barrier()
        prefix = "module." if form == "wrapped" else ""
        state = {"model0": model.chunks[0].sharded_state_dict(prefix, metadata=metadata), "optimizer": {"step": 3}}
        # megatron-core 0.19 wants a package of its own for saving, unless it is told not to
        has_choice = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
        dist_checkpointing.save(state, out, **({"async_strategy": "mcore"} if has_choice else {}))


SPELLINGS = {"layers apart": "decoder.layers.0.mlp.linear_fc2.weight", "wrapped": "module.decoder."}
OF_FAMILIES = [("llama", "wrapped"), ("qwen3_moe", "layers apart")]
if FULL:
    OF_FAMILIES += [("llama", "layers apart"), ("qwen3_moe", "wrapped")]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form"), OF_FAMILIES)
def test_other_spellings_of_the_stored_names(tmp_path: Path, family: str, form: str) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", family, tied=False)
    run_ranks(run_save_as_training_does, str(source), str(tmp_path / "step"), form, world=2)
    names = read_metadata(tmp_path / "step" / ".metadata").state_dict_metadata
    key = SPELLINGS[form].removesuffix("linear_fc2.weight")
    assert any(name.startswith(key) for name in names), sorted(names)[:5]
    cfg = config("hf", tmp_path / "step", tmp_path / "back", hf_config=str(source))
    assert run_ranks(convert, [cfg], world=1) == [[]]
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_of_a_training_run_with_another_config(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", "llama", tied=True)
    run_ranks(run_save_as_training_does, str(source), str(tmp_path / "step"), world=2)
    cfg = config("hf", tmp_path / "step", tmp_path / "back", hf_config=str(source))
    assert run_ranks(convert, [cfg, replace(cfg, hf_config=None, save=str(tmp_path / "none"))], world=1) == [
        [f"{tmp_path}/step has no config.json; it is not a Hugging Face model directory"]
    ]
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_was_trained_keeps_its_type_whatever_the_source_has(tmp_path: Path) -> None:
    """An fp32 run of a bf16 model: bf16 would round away what it has learnt."""
    trained = write_tiny_checkpoint(tmp_path / "trained", "llama", tied=True, layers=1, seed=3)
    source = write_tiny_checkpoint(tmp_path / "source", "llama", tied=True, layers=1, seed=4, dtype=torch.bfloat16)
    run_ranks(run_save_as_training_does, str(trained), str(tmp_path / "step"), world=2)
    assert run_ranks(convert, [config("hf", tmp_path / "step", tmp_path / "back", hf_config=str(source))], world=1) == [
        []
    ]
    before, after = (load_file(path / "model.safetensors") for path in (trained, tmp_path / "back"))
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"


def test_tensors_of_several_dtypes_return_to_them(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", "llama", layers=1, dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-4
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    there, back = (config("megatron", source, tmp_path / "m"), config("hf", tmp_path / "m", tmp_path / "back"))
    assert run_ranks(convert, [there, back], world=1) == [[]]
    returned = load_file(tmp_path / "back/model.safetensors")
    assert all(
        torch.equal(value, returned[name]) and value.dtype == returned[name].dtype for name, value in tensors.items()
    )


def test_another_dtype(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", "llama", layers=1)
    there = config("megatron", source, tmp_path / "m", dtype="bf16")
    back = config("hf", tmp_path / "m", tmp_path / "back", dtype="bf16")
    assert run_ranks(convert, [there, back], world=1) == [[]]
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", "llama", layers=2)
    made = tmp_path / "made"
    bad = write_tiny_checkpoint(tmp_path / "bad", "llama", layers=2)
    tensors = load_file(bad / "model.safetensors")
    save_file(tensors | {"model.layers.1.self_attn.o_proj.bias": torch.ones(64)}, bad / "model.safetensors")
    other = write_tiny_checkpoint(tmp_path / "other", "llama", layers=1)
    before = {path.name for path in tmp_path.iterdir()} | {"made"}
    (messages,) = run_ranks(
        convert,
        [
            config("megatron", source, made),
            config("megatron", source, made),
            config("megatron", made, tmp_path / "out"),
            config("hf", source, tmp_path / "out"),
            config("megatron", bad, tmp_path / "out"),
            config("hf", made, tmp_path / "out", hf_config=str(other)),
        ],
        world=1,
    )
    for message, expected in zip(
        messages,
        ("not overwritten", "already a Megatron", "no Megatron distributed", "o_proj.bias", "has shape [2, "),
        strict=True,
    ):
        assert expected in message
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_directory_that_holds_checkpoints_is_told_from_one(tmp_path: Path) -> None:
    newest = tmp_path / "lm" / "iter_0000100"
    for name in ("iter_0000010", newest.name):
        (tmp_path / "lm" / name).mkdir(parents=True)
    of_those = "not one checkpoint; give one of those in it, such as"
    assert what_it_is(tmp_path / "lm") == f"is a directory of Megatron-LM checkpoints, {of_those} {newest}"
    step = tmp_path / "run" / "checkpoints" / "step_00000004"
    step.mkdir(parents=True)
    (step / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert what_it_is(tmp_path / "run") == f"is a run directory, {of_those} {step}"
    (tmp_path / "old" / "mp_rank_00").mkdir(parents=True)
    assert "format `torch`; save it with --ckpt-format torch_dist" in what_it_is(tmp_path / "old")
    assert what_it_is(tmp_path) == "is no Megatron distributed checkpoint"


def test_damaged_megatron_checkpoints(tmp_path: Path) -> None:
    source, made = write_tiny_checkpoint(tmp_path / "source", "llama", layers=2), tmp_path / "made"
    run_ranks(convert, [config("megatron", source, made)], world=1)
    shards, index = made / "__0_0.distcp", made / ".metadata"
    whole, entries = shards.read_bytes(), index.read_bytes()
    back = config("hf", made, tmp_path / "back")
    shards.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in run_ranks(convert, [back], world=1)[0][0]
    shards.write_bytes(whole)
    index.write_bytes(entries[:40])
    assert "missing or damaged" in run_ranks(convert, [back], world=1)[0][0]
    index.write_bytes(entries)
    (made / "hf_dtypes.json").write_text('{"dtype": "float4"}')
    assert "hf_dtypes.json is damaged" in run_ranks(convert, [back], world=1)[0][0]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "made"}


def test_flags() -> None:
    with pytest.raises(ConfigError, match="--save is missing"):
        parse_convert_config(["--to", "hf", "--model", "m"])
    with pytest.raises(ConfigError, match="--hf_config goes with --to hf"):
        parse_convert_config(["--to", "megatron", "--model", "m", "--save", "s", "--hf_config", "c"])
    assert parse_convert_config(["--to", "hf", "--model", "m", "--save", "s", "--check"]).check


# ---- the optional bridge ---------------------------------------------------------------------------------------------


def test_the_bridge_is_refused_where_it_cannot_or_need_not_work(tmp_path: Path) -> None:
    """Its errors only: the library itself is never imported in these tests."""
    assert "megatron.bridge" not in sys.modules
    ours = write_tiny_checkpoint(tmp_path / "ours", "llama", layers=1)
    other = tmp_path / "other"
    other.mkdir()
    out = tmp_path / "out"
    arguments = ["--bridge", "megatron_bridge", "--save", str(out), "--to"]

    def refused(expected: str, *argv: str, config: dict[str, Any] | None = None) -> None:
        (other / "config.json").write_text(json.dumps(config or {"model_type": "gpt2"}))
        with pytest.raises((ConfigError, CheckpointError), match=expected):
            run_convert(parse_convert_config([*arguments, *argv]))
        assert not out.exists()

    refused("llama is in this package's own map.*leave out --bridge", "megatron", "--model", str(ours))
    refused("no safetensors", "megatron", "--model", str(other))
    refused("needs --hf_config", "hf", "--model", str(tmp_path))
    refused("own map", "hf", "--model", str(tmp_path), "--hf_config", str(ours))
    refused("remote code", "megatron", "--model", str(other), config={"model_type": "x", "auto_map": {"A": "b.C"}})
    for flag in (["--check"], ["--dtype", "bf16"], ["--tensor_model_parallel_size", "2"], ["--check_tolerance", "1"]):
        refused(f"takes no {flag[0]}", "megatron", "--model", str(other), *flag)
    save_file({"a": torch.zeros(1)}, other / "model.safetensors")
    refused("megatron-bridge is not installed.*qwen3_moe", "megatron", "--model", str(other))
    assert "megatron.bridge" not in sys.modules


# ---- one plain process -----------------------------------------------------------------------------------------------


def tool(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """tools/convert_hf.py as a user starts it."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools/convert_hf.py"), *argv]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def allowed_difference(model: Path) -> float:
    """Of fp32 logits from transformers' in fp32: what both may be off the truth, on the tokens that --check takes."""
    reference, truth = reference_and_truth(model, sample_tokens(model, read_architecture(model)))
    return allowed_error(reference, truth, factor=FACTOR + 1)


@pytest.mark.slow
def test_the_tool_checks_what_it_made(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "source", "qwen3", tied=True, rope="yarn")
    done = tool("--to", "megatron", "--model", "source", "--save", "out", "--check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    difference = float(done.stdout.rsplit(":", 1)[1])
    assert difference <= allowed_difference(tmp_path / "source")


@pytest.mark.parametrize(("family", "layout"), [("llama", (4, 1)), ("qwen2", (2, 2)), ("qwen3_moe", (2, 1, 2))])
def test_check_on_several_ranks(tmp_path: Path, family: str, layout: tuple[int, ...]) -> None:
    """Both ways; four tensor-parallel ranks share two key/value heads. It raises above the tolerance."""
    source = write_tiny_checkpoint(tmp_path / "source", family, tied=True)
    world = layout[0] * layout[1]
    options: dict[str, Any] = {"check": True, "check_tolerance": allowed_difference(source)}
    if family == "qwen3_moe":
        options["expert_tensor_parallel_size"] = 1
    there = config("megatron", source, tmp_path / "m", *layout, **options)
    back = config("hf", tmp_path / "m", tmp_path / "back", *layout, **options)
    assert run_ranks(convert, [there, back], world=world) == [[]] * world


def run_check_of_another_model(source: str, made: str) -> list[str]:
    """The comparison that --check makes, with a source whose weights have changed after the conversion."""
    import megatron_gkd.commands.convert as module

    cfg = config("megatron", Path(source), Path(made))
    with megatron():
        run_convert(cfg)
        tensors = load_file(Path(source) / "model.safetensors")
        swapped = ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight")
        tensors[swapped[0]], tensors[swapped[1]] = tensors[swapped[1]], tensors[swapped[0]]
        save_file(tensors, Path(source) / "model.safetensors", metadata={"format": "pt"})
        try:
            module._check(cfg, read_architecture(source), Layout())
        except CheckpointError as error:
            return [str(error)]
    return []


def test_check_sees_another_model(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", "llama", layers=2)
    ((message,),) = run_ranks(run_check_of_another_model, str(source), str(tmp_path / "out"), world=1)
    assert "logits differ by" in message
    assert message.endswith(f"what was written is wrong, and is now {tmp_path}/out.wrong; do not use it")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.wrong" / "metadata.json").exists()


def test_an_output_that_is_wrong_again_gets_a_name_of_its_own(tmp_path: Path) -> None:
    for wanted in ("out.wrong", "out.wrong2"):
        (tmp_path / "out").mkdir()
        assert _set_aside(tmp_path / "out") == str(tmp_path / wanted)


def test_the_command_line_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").mkdir()
    assert cli.main(["convert", "--to", "hf", "--model", "nowhere"]) == 2
    assert "--save is missing" in capsys.readouterr().err


# ---- memory ----------------------------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def peak_bytes(to: Any, small: Path, large: Path, out: Path, check: bool = False) -> int:
    """On a rank of its own: most memory that a conversion adds, without the kernel's cache of mapped files."""
    with megatron():
        run_convert(config(to, small, Path(f"{out}_small"), check=check))  # all is imported now
        before, peak, done = anonymous_bytes(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.001):
                peak = max(peak, anonymous_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        run_convert(config(to, large, out, check=check))
        done.set()
        watcher.join()
    return peak - before


@pytest.mark.slow
def test_a_model_larger_than_memory(tmp_path: Path) -> None:
    """210 MB of weights, largest tensor 6.3 MB, both ways, within the stated bound."""
    options: dict[str, Any] = {"hidden_size": 512, "ffn_hidden_size": 1024, "vocab_size": 3072, "heads": 8}
    small = write_tiny_checkpoint(tmp_path / "small", "llama", layers=1, **options)
    large = write_tiny_checkpoint(tmp_path / "large", "llama", layers=20, max_shard_size="50MB", **options)
    arch = read_architecture(large)
    weights = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    slack = 24 * 2**20  # of the interpreter: plans, metadata, stacks of the groups' threads
    (there,) = run_ranks(peak_bytes, "megatron", small, large, tmp_path / "m", world=1, fresh=True)
    assert there <= memory_bound_bytes(arch, 4, to="megatron") + slack < weights / 2
    (back,) = run_ranks(peak_bytes, "hf", tmp_path / "m_small", tmp_path / "m", tmp_path / "hf", world=1, fresh=True)
    assert back <= memory_bound_bytes(arch, 4, to="hf") + slack < weights / 2
    with HFCheckpoint(large) as before, HFCheckpoint(tmp_path / "hf") as after:
        assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())
    # The measure sees a whole model.
    (loaded,) = run_ranks(peak_bytes, "megatron", small, large, tmp_path / "checked", True, world=1, fresh=True)
    assert loaded > 2 * (memory_bound_bytes(arch, 4, to="hf") + slack)
