"""The recipes of pairs of models (launch/_common.sh, `train_pair`): what each would run on its models, in
every number of nodes that it says, is what `check train` takes; what it refuses.

The models are the config.json files of examples/models. Not covered: the hardware. What it would hold: docs/recipes.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_launch import ROOT
from tests.test_launch_train import C10D, CLEAN, _stand_in, config_of, fits, given, has, launch, words  # noqa: F401

PAIRS = {
    "qwen2.5_72b_to_7b": ("Qwen2.5-72B", "Qwen2.5-7B"),
    "llama3.1_70b_to_8b": ("Llama-3.1-70B", "Llama-3.1-8B"),
    "qwen3_32b_to_1.7b": ("Qwen3-32B", "Qwen3-1.7B"),
    "qwen3_235b_to_8b": ("Qwen3-235B-A22B", "Qwen3-8B"),
    "qwen3_235b_to_30b_a3b": ("Qwen3-235B-A22B", "Qwen3-30B-A3B"),
}
NODES = {"separate": ({"NNODES": "2"}, {"NNODES": "5"}), "colocate": ({"NNODES": "1"}, {"NNODES": "3"})}
MIXTURES = {
    "separate": ({"NNODES": "3", "TEACHER_NODES": "2"}, {"NNODES": "8", "TEACHER_NODES": "4"}),
    "colocate": ({"NNODES": "1"}, {"NNODES": "2"}),
}


def environment(name: str, rows: Path | str) -> dict[str, str]:
    teacher, student = (str(ROOT / "examples/models" / model) for model in PAIRS[name])
    return dict(TEACHER=teacher, STUDENT=student, DATASET=str(rows))


@pytest.mark.parametrize("placement", ["separate", "colocate"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_recipe_is_a_run_that_fits_its_ranks(given: dict[str, str], name: str, placement: str) -> None:  # noqa: F811
    for nodes in (MIXTURES if "235b" in name else NODES)[placement]:
        env = environment(name, given["DATASET"]) | C10D | nodes | {"PLACEMENT": placement}
        command = words(launch(f"{name}.sh", "--dry-run", "--lr", "3e-6", **env))
        config = config_of(command)
        assert int(fits(command)) == pytest.approx(128, abs=32), "BATCH, at about"
        assert config.teacher.teacher_placement == placement
        assert config.distillation.gkd_logits_topk is None, "hidden states, not a top K"
        assert (config.training.lr, config.checkpoint.save) == (3e-6, f"runs/{name}"), "the caller's flags win"
        assert has(command, "--nnodes", nodes["NNODES"]) or nodes["NNODES"] == "1"
        assert config.offload.offload_model == ("235b" in name and placement == "colocate")


@pytest.mark.parametrize("name", PAIRS)
def test_what_a_recipe_refuses(given: dict[str, str], name: str) -> None:  # noqa: F811
    env = environment(name, given["DATASET"])
    for changed, message in (
        ({"TEACHER": ""}, "TEACHER is not set"),
        ({"PLACEMENT": "beside"}, "PLACEMENT=beside: give separate or colocate"),
        ({}, "PLACEMENT=separate with NNODES=1 and TEACHER_NODES=1 leaves no node for the student"),
    ):
        result = launch(f"{name}.sh", "--dry-run", **env | changed)
        assert result.returncode == 2
        assert message in result.stderr
