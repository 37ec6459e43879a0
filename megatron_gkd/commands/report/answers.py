"""Greedy answers of the teacher, of the student before and of the student after, to the first held-out prompts.

Plain transformers in float32 on the CPU, one model in memory at a time, from token ids to token ids: what is fed is
what the trainer would feed. That the exported student answers here is also the proof that transformers loads it.

A model that is not there any more (moved, or not exported yet) is left out with a note; the report goes on.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_gkd.commands.report.run_record import RunRecord
from megatron_gkd.data.chat import ChatEncoder, load_tokenizer
from megatron_gkd.data.files import Columns, read_records
from megatron_gkd.data.forms import prompt_and_completion
from megatron_gkd.data.row_maker import RowMaker, check_row_flags
from megatron_gkd.data.rows import RowDataset, load_rows
from megatron_gkd.errors import ConfigError, GKDError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.train.hub_files import with_recorded_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)


def sample_answers(run: RunRecord, *, num_answers: int, max_new_tokens: int) -> dict[str, Any]:
    """{"max_new_tokens", "answers": one dictionary per prompt, "answer_notes": what could not be done and why}."""
    result: dict[str, Any] = {"max_new_tokens": max_new_tokens, "answers": [], "answer_notes": []}
    if not run.config.data.eval_dataset:
        result["answer_notes"].append("no sample answers: the run had no --eval_dataset to take prompts from")
        return result
    run = replace(run, config=with_recorded_files(run.config, run.directory))
    try:
        tokenizer = load_tokenizer(run.config.model.model)
        rows = _held_out(run, tokenizer, num_answers)
    except GKDError as error:
        result["answer_notes"].append(f"no sample answers: {error}")
        return result
    end_id = ChatEncoder(tokenizer).end_of_turn_id
    prompts = [rows[i].prompt_ids for i in range(len(rows))]
    result["answers"] = [_question(rows, i, tokenizer, _maker(run)) for i in range(len(rows))]
    for who, path in _models(run).items():
        if path is None or not (Path(path) / "config.json").is_file():
            result["answer_notes"].append(f"no answers of {who}: no model at {path or 'hf/ (not exported)'}")
            continue
        logger.info("%d answers of %s, at most %d tokens each: %s", len(prompts), who, max_new_tokens, path)
        answers = generate(path, prompts, end_id=end_id, max_new_tokens=max_new_tokens)
        for answer, ids in zip(result["answers"], answers, strict=True):
            answer[who] = tokenizer.decode(ids, skip_special_tokens=True)
    return result


def generate(
    model_dir: str | Path, prompts: list[tuple[int, ...]], *, end_id: int, max_new_tokens: int
) -> list[list[int]]:
    """Greedy continuations, without the prompts; each prompt by itself, so that nothing is padded."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(model_dir), dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    model.eval()
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end_id, pad_token_id=end_id, bos_token_id=None
    )
    answers = []
    for number, prompt in enumerate(prompts, start=1):
        logger.info("answer %d of %d", number, len(prompts))
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def _models(run: RunRecord) -> dict[str, str | Path | None]:
    return {
        "teacher": run.config.teacher.teacher_model,
        "student before": run.config.model.model,
        "student after": hf if (hf := run.directory / "hf").exists() else run.exported,
    }


def _held_out(run: RunRecord, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> RowDataset:
    data = run.config.data
    if data.external_plugins:
        raise ConfigError("its rows are made by --external_plugins, and a report executes nothing")
    return load_rows(
        data.eval_dataset,
        tokenizer,
        max_length=data.max_length,
        on_bad_row=data.on_bad_row,
        overlong=data.overlong,
        max_rows=num_rows,
        loss_scale=data.loss_scale,
        template_kwargs=data.template_kwargs,
        maker=_maker(run),
    )


def _maker(run: RunRecord) -> RowMaker | None:
    data = run.config.data
    return check_row_flags([], data.prompt_template, data.teacher_prompt_template)


def _question(
    rows: RowDataset, index: int, tokenizer: PreTrainedTokenizerBase, maker: RowMaker | None
) -> dict[str, str]:
    """The prompt as a reader wants it, without the template around it, and the data set's own completion."""
    path, _, line = rows.place(index).rpartition(":")
    record = next(record for number, record in read_records(path) if number == int(line))
    columns = record if maker is None else maker.made(record)
    assert isinstance(columns, dict), "a row that was loaded has columns"
    question = {"prompt": prompt_text(columns)}
    completion = rows[index].completion_ids
    if completion is not None:
        question["reference"] = str(tokenizer.decode(list(completion), skip_special_tokens=True))
    return question


def prompt_text(record: Columns) -> str:
    """The user's last turn, or the prompt's text."""
    prompt, _ = prompt_and_completion(record)
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
