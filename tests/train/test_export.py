"""The exported student is the trained one: its logits in transformers equal the trainer's, and nothing else is changed.
An exported adapter is the trained one: its logits in peft equal the trainer's, and those of the merged student.

Without an update the directory's tensors equal the source's bit for bit (in a file of its own order): a run is resumed
from a checkpoint that was saved before any step, so that the tensors pass through Megatron's layout, a distributed
checkpoint and back.

Not covered here: the maps of the other families, bf16 and sharded files (tests/weights).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.config.run import RunConfig
from megatron_gkd.data.collate import MicroBatch, collate
from megatron_gkd.model.pipeline import forward_hidden, run_schedule, select_loss_tokens
from megatron_gkd.records import Sample
from megatron_gkd.train.checkpoint import TrainerState, describe_run, load_checkpoint
from megatron_gkd.train.checkpoint.saving import Save
from megatron_gkd.train.loop import run_training
from megatron_gkd.train.setup import Run
from megatron_gkd.weights.hf_files import HFCheckpoint
from tests.support.checkpoint_runs import ADAPTERS
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.dense_step import all_logits, load
from tests.support.effort import FULL
from tests.support.numerics import Float64, within_reference_error
from tests.support.peft_itself import need_peft, peft_logits
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import command_line, exported, train
from tests.support.trainers import PAIRS, build_run, make_samples, write_pair, write_rows

pytestmark = pytest.mark.slow

SAMPLES = make_samples([(4, 9), (2, 5), (7, 3)], vocab_size=300)
FLAGS: dict[str, Any] = dict(
    lmbda=0, global_batch_size=4, train_iters=2, lr=8e-3, report_to="none", device="cpu", teacher_tensor=1
)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2 PP2": (4, dict(tensor=2, pipeline=2)),
    "PP2 VPP2": (2, dict(pipeline=2, virtual=2)),
    "TP2 SP": (2, dict(tensor=2, sequence=True)),
}
TUNERS: dict[str, dict[str, Any]] = {"all weights": {}, "adapters": ADAPTERS | dict(modules_to_save=["norm"])}
CELLS = [  # of the gate
    *(("qwen3", layout, "all weights") for layout in ("TP1", "PP2 VPP2", "TP2 SP")),
    ("llama", "TP2 PP2", "all weights"),
    ("qwen3", "TP2 SP", "adapters"),
]
UNTRAINED = [("qwen3", "PP2 VPP2", "adapters"), ("llama", "TP2 PP2", "all weights")]
if FULL:
    CELLS = UNTRAINED = list(product(PAIRS, LAYOUTS, TUNERS))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("export")
    rows = write_rows(root / "rows.jsonl", 12)
    pairs = {family: write_pair(root, family) for family in PAIRS}
    return {
        family: dict(model=student, teacher_model=teacher, dataset=rows) for family, (student, teacher) in pairs.items()
    }


def logits(run: Run) -> torch.Tensor | None:
    """[sum of C, V] of SAMPLES by the run's student; None but on the last stage of the first replica."""
    student = run.student

    def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
        batch, chunk = next(batches), model.module

        def collect(hidden: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
            local = torch.nn.functional.linear(select_loss_tokens(chunk.head_input(hidden), batch), chunk.head_weight())
            shards = [torch.empty_like(local) for _ in range(student.layout.tensor)]
            dist.all_gather(shards, local.contiguous(), group=student.groups.tp)
            return torch.cat(shards, dim=-1)[:, : run.architecture.vocab_size]

        return forward_hidden(chunk, batch, run.platform.device), collect

    samples: list[list[Sample]] = [[sample] for sample in SAMPLES]
    samples += [[]] * (-len(samples) % student.layout.pipeline)
    batches = [collate(batch, pad_to_multiple_of=16) for batch in samples]
    with torch.no_grad():
        out = run_schedule(
            student.chunks, student.layout, student.groups, forward_step, batches, forward_only=True, collect=True
        )
    return torch.cat(out) if out else None


def run_load_and_logits(argv: list[str], checkpoint: str) -> torch.Tensor | None:
    """The logits of the student in a checkpoint."""
    config = parse_run_config(argv, command="train")
    with megatron():
        run = build_run(config)
        description = describe_run(config, run.student, "cpu")
        load_checkpoint(Path(checkpoint), run.student, expected=state_of(run, config), description=description)
        return logits(run)


def run_untrained(argv: list[str], run_dir: str) -> None:
    """Save before any step, then go on with a run that is already at its end: it loads, and exports."""
    config = parse_run_config(argv, command="train")
    with megatron():
        run = build_run(config)
        state = state_of(run, config, step=config.training.train_iters)
        Save(run_dir, run.student, state, description=describe_run(config, run.student, "cpu")).finish()
        run_training(config)


def state_of(run: Run, config: RunConfig, step: int | None = 0) -> TrainerState:
    assert run.plans is not None
    assert step is not None
    sharded, rows = config.parallel.use_distributed_optimizer, run.plans._draws.rows.fingerprint()
    return TrainerState(step, 0, rows, repr(run.architecture), sharded, base=run.base)


def side_files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.suffix != ".safetensors"}


@pytest.mark.parametrize(("family", "layout", "tuner"), UNTRAINED)
def test_without_an_update_the_export_is_the_source(
    tmp_path: Path, inputs: dict[str, dict[str, Any]], family: str, layout: str, tuner: str
) -> None:
    """Of new adapters too, whose products are 0."""
    world, flags = LAYOUTS[layout]
    argv = command_line(**inputs[family], **FLAGS, **flags, **TUNERS[tuner], save=tmp_path, load=tmp_path)
    run_ranks(run_untrained, argv, str(tmp_path), world=world)
    source = Path(inputs[family]["model"])
    assert side_files(tmp_path / "hf") == side_files(source)
    written = exported(tmp_path)
    with HFCheckpoint(source) as checkpoint:
        assert written.keys() == set(checkpoint.names())
        for name, tensor in written.items():
            assert tensor.dtype == checkpoint.dtype(name)
            assert torch.equal(tensor, checkpoint.read(name)), name


@pytest.mark.parametrize(("family", "layout", "tuner"), CELLS)
def test_the_exported_student_has_the_logits_of_the_trainer(
    tmp_path: Path, inputs: dict[str, dict[str, Any]], family: str, layout: str, tuner: str
) -> None:
    """Merged, and its adapter as peft loads it."""
    world, flags = LAYOUTS[layout]
    flags = inputs[family] | FLAGS | flags | TUNERS[tuner]
    run_dir = train(world=world, **flags, save=tmp_path / "run")
    argv = command_line(**flags, save=tmp_path / "other")
    results = run_ranks(run_load_and_logits, argv, str(run_dir / "checkpoints" / "step_00000002"), world=world)
    untrained, reference = (torch.cat(all_logits(str(path), SAMPLES)) for path in (flags["model"], run_dir / "hf"))
    with Float64():
        truth = torch.cat(all_logits(str(run_dir / "hf"), SAMPLES, torch.float64))
    found = [result for result in results if result is not None]
    assert len(found) == world // flags.get("pipeline", 1)
    expected = {"hf": (reference, truth)}
    if tuner == "adapters":
        need_peft()
        paths = str(flags["model"]), str(run_dir / "adapter")
        (expected["adapter"],) = run_ranks(peft_logits, *paths, SAMPLES, world=1, fresh=True)
    for result, (directory, of_directory) in product(found, expected.items()):
        within_reference_error(result, *of_directory, directory)
    assert (untrained - truth).abs().max() > 0.1
    names = {name: tensor.shape for name, tensor in exported(run_dir).items()}
    assert names == {name: tensor.shape for name, tensor in load(str(flags["model"])).named_parameters()}
    assert side_files(run_dir / "hf") == side_files(Path(flags["model"]))


def test_no_export_on_request(tmp_path: Path, inputs: dict[str, dict[str, Any]]) -> None:
    run_dir = train(**inputs["llama"], **FLAGS, save_hf=False, save=tmp_path / "run")
    assert not (run_dir / "hf").exists()
    assert (run_dir / "checkpoints" / "latest").exists()


def test_a_frozen_embedding_is_exported_as_it_was(tmp_path: Path) -> None:
    """Tied over two stages, whose copies must stay equal; everything else is trained."""
    root = tmp_path
    student = write_tiny_checkpoint(root / "student", "llama", tied=True, layers=2, hidden_size=32, seed=5)
    flags = FLAGS | dict(model=student, teacher_model=student, dataset=write_rows(root / "rows.jsonl", 8), sft_alpha=1)
    flags |= dict(on_teacher_fault="warn")
    run_dir = train(world=2, **flags, pipeline=2, freeze_embeddings=True, save=root / "run")
    before = {name: parameter.detach() for name, parameter in load(str(student)).named_parameters()}
    after = exported(run_dir)
    unchanged = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert unchanged == {"model.embed_tokens.weight"}
