"""Layers of uneven pipeline stages: Megatron's three forms as counts, and what cannot be.

Each form is held against megatron-core's own functions, stage by stage and chunk by chunk. Training in them:
train/test_uneven.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_gkd.errors import LayoutError
from megatron_gkd.model.stage_layers import StageLayers
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.parallel.pipeline_split import PipelineSplit, parse_layout

FORMS: list[tuple[dict[str, Any], int, int, int, tuple[int, ...]]] = [
    (dict(first=2), 6, 2, 1, (2, 4)),
    (dict(last=1), 6, 2, 1, (5, 1)),
    (dict(first=1, last=1), 6, 4, 1, (1, 2, 2, 1)),
    (dict(first=2, last=4), 14, 4, 2, (1, 2, 2, 2, 1, 2, 2, 2)),
    (dict(embedding=True, loss=True), 6, 4, 1, (1, 2, 2, 1)),
    (dict(embedding=True), 7, 2, 2, (1, 2, 2, 2)),
    (dict(loss=True), 7, 2, 2, (2, 2, 2, 1)),
    (dict(embedding=True, loss=True), 2, 4, 1, (0, 1, 1, 0)),
]
UPSTREAM = dict(
    first="num_layers_in_first_pipeline_stage",
    last="num_layers_in_last_pipeline_stage",
    embedding="account_for_embedding_in_pipeline_split",
    loss="account_for_loss_in_pipeline_split",
)


@pytest.mark.parametrize(("form", "num_layers", "stages", "chunks", "counts"), FORMS)
def test_counts_are_megatrons(
    form: dict[str, Any], num_layers: int, stages: int, chunks: int, counts: tuple[int, ...]
) -> None:
    split = PipelineSplit(**form)
    assert split.chunk_layers(num_layers, stages, chunks) == counts
    interleaved = chunks if chunks > 1 else None
    layout = Layout(pipeline=stages, virtual_pipeline=interleaved, split=split)
    assert layout.chunk_layers(num_layers) == counts
    assert str(split) in layout.describe()
    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=interleaved,
        pipeline_dtype=torch.float32,
        **{UPSTREAM[name]: value for name, value in form.items()},
    )
    for stage in range(stages):
        ours = StageLayers(counts, stages=stages, stage=stage)
        for chunk in range(chunks):
            vp_stage = chunk if interleaved else None
            assert ours.get_num_layers_to_build(vp_stage=vp_stage) == get_num_layers_to_build(config, vp_stage, stage)
            assert ours.get_layer_offset(vp_stage=vp_stage) == get_transformer_layer_offset(config, vp_stage, stage)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("Et*2|t*4L", (2, 4)),
        ("Ettttt|tL", (5, 1)),
        ("Et|tt|ttt|L", (1, 2, 3, 0)),
        ("E|t,t|tL", (0, 2, 1)),
        ("Ettt|(tt|)*3,t|L", (3, 2, 2, 2, 1, 0)),
        (" E t | t t L ", (1, 2)),
    ],
)
def test_a_layout_is_read_as_megatron_reads_it(text: str, counts: tuple[int, ...]) -> None:
    assert parse_layout(text) == counts
    theirs = PipelineParallelLayerLayout.parse_str_to_list(text.replace(" ", ""))
    assert tuple(sum(letter.name == "decoder" for letter in stage) for stage in theirs) == counts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ttL", "must begin with the one E"),
        ("Ett", "must begin with the one E and end with the one L"),
        ("tE|tL", "must begin with"),
        ("EttEL", "must begin with"),
        ("Ett|mL", "m is not known; E is the embedding"),
        ("Et*2|(t*4L", "( is not known"),
        ("Et*99999999999|tL", "not a layout of a model"),
        ("E(((t)*999)*999)*999L", "not a layout of a model"),
        ("", "must begin with"),
    ],
)
def test_what_is_no_layout(text: str, said: str) -> None:
    with pytest.raises(LayoutError) as error:
        parse_layout(text, prefix="teacher_")
    assert said in str(error.value)
    assert str(error.value).startswith("--teacher_pipeline_model_parallel_layout")


@pytest.mark.parametrize(
    ("form", "num_layers", "stages", "chunks", "said"),
    [
        (dict(first=2), 6, 1, 1, "there is one pipeline stage"),
        (dict(first=6), 6, 2, 1, "0 of 6 layers are left for 1 other stages"),
        (dict(first=1), 6, 3, 1, "5 of 6 layers are left for 2 other stages"),
        (dict(first=2, last=2), 6, 2, 1, "2 of 6 layers are left for 0 other stages"),
        (dict(first=9), 6, 2, 1, "-3 of 6 layers"),
        (dict(first=1), 4, 2, 2, "1 layers of a stage do not divide into its 2 chunks"),
        (dict(loss=True), 6, 2, 1, "6 layers with the loss are 7, which 2 chunks do not share"),
        (dict(layers=(2, 4)), 6, 4, 1, "has 2 stages, and the layout 4 x 1"),
        (dict(layers=(2, 4)), 7, 2, 1, "has 6 layers (t), and the model 7"),
        (dict(layers=(2, 0, 4)), 6, 3, 1, "stage 2 of 3 has nothing"),
    ],
)
def test_what_does_not_fit(form: dict[str, Any], num_layers: int, stages: int, chunks: int, said: str) -> None:
    with pytest.raises(LayoutError) as error:
        PipelineSplit(**form).chunk_layers(num_layers, stages, chunks)
    assert said in str(error.value)


def test_one_form_at_a_time() -> None:
    with pytest.raises(LayoutError, match="both say how layers are shared"):
        PipelineSplit(first=2, loss=True)
    with pytest.raises(
        LayoutError, match="--teacher_account_for_embedding_in_pipeline_split or _loss_ and --teacher_p"
    ):
        PipelineSplit(embedding=True, layers=(1, 2), prefix="teacher_")
