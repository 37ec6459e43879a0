"""`--eval_generate`: evaluates greedy completions of the first held-out prompts, sampled by the engines with the
current weights.

    generate/accuracy      mean of the verifier's verdicts (data/verify.py)
    generate/mean_length   tokens
    generate/truncated     fraction cut at its limit: --max_completion_length (the longest of a schedule), or the room
                           that its prompt leaves
    generate/repeated      as rollout/repeated
    generate/num_prompts

The requests are made, and refused if impossible, before a weight is read (`read_prompts`). The first rank reads the
records again for their columns, once, and verifies; all ranks get its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_gkd.data.dataset import Rows
from megatron_gkd.data.files import read_records
from megatron_gkd.data.row_maker import RowMaker
from megatron_gkd.data.verify import ANSWER, check_answer, load_verifier, verdict
from megatron_gkd.parallel.together import on_first
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.rollout.requests import make_requests
from megatron_gkd.train.inputs import Inputs, row_maker
from megatron_gkd.train.rollouts import Rollouts, repeated_share
from megatron_gkd.train.sampling import banned_tokens, engine_length, seeing


@dataclass(frozen=True)
class Prompts:
    """The requests, the same on every rank; `records` only on the first, in their order."""

    requests: list[Request]
    records: list[dict[str, Any]]
    places: list[str]


def prompt_requests(inputs: Inputs) -> list[Request]:
    """Requests for the first held-out prompts. Raises ConfigError for one that leaves no room."""
    config, rows = inputs.config, inputs.eval_rows
    assert rows is not None, "config/validate.py refuses --eval_generate without held-out rows"
    requests = make_requests(
        {index: rows[index].prompt_ids for index in range(min(config.logging.eval_generate, len(rows)))},
        run_seed=config.training.seed,
        step=0,
        max_completion_length=round(config.schedule("max_completion_length").most),
        max_length=config.data.max_length,
        max_model_len=engine_length(config, inputs.student_arch),
    )
    return [seeing(request, rows[request.key], inputs.sight.student) for request in requests]


def read_prompts(inputs: Inputs) -> Prompts:
    """The requests and the verifier's records. Collective over all ranks; an error is raised on all."""
    rows, name = inputs.eval_rows, inputs.config.logging.eval_verifier
    assert rows is not None
    requests = prompt_requests(inputs)
    places = [rows.place(request.key) for request in requests]

    def read() -> list[dict[str, Any]]:
        load_verifier(name)
        records = _records(places, row_maker(inputs.config))
        for request, record, place in zip(requests, records, places, strict=True):
            if ANSWER not in record:
                ids = list(rows[request.key].completion_ids or ())
                record[ANSWER] = inputs.tokenizer.decode(ids, skip_special_tokens=True)
            check_answer(name, record, place)
        return records

    is_first = dist.get_rank() == 0
    records: list[dict[str, Any]] = []
    on_first(lambda: records.extend(read()))
    return Prompts(requests, records if is_first else [], places)


def _records(places: list[str], maker: RowMaker | None) -> list[dict[str, Any]]:
    """The columns of the records at FILE:LINE, after the row maker, in order. Each file is read once, as far as
    needed."""
    wanted: dict[str, set[int]] = {}
    for place in places:
        path, _, number = place.rpartition(":")
        wanted.setdefault(path, set()).add(int(number))
    found: dict[str, dict[str, Any]] = {}
    for path, lines in wanted.items():
        for line, record in read_records(path):
            if line in lines:
                columns = record if maker is None else maker.made(record)
                assert isinstance(columns, dict), "a row that was loaded has columns"
                found[f"{path}:{line}"] = dict(columns)
            if line >= max(lines):
                break
    return [dict(found[place]) for place in places]


class Generation:
    """The generation of one run, on every rank of the student."""

    def __init__(self, inputs: Inputs, prompts: Prompts, engines: Rollouts, group: dist.ProcessGroup) -> None:
        """Args: group: the ranks of the student."""
        self._name, self._prompts = inputs.config.logging.eval_verifier, prompts
        self._engines, self._group = engines, group
        self._tokenizer = inputs.tokenizer
        banned = banned_tokens(inputs)
        self._settings = SamplingSettings(0.0, stop_token_ids=inputs.stop_ids, banned_token_ids=banned)

    def measure(self, version: int) -> dict[str, float]:
        """The numbers of the module docstring, on every rank. Collective over the student's ranks.

        Args:
            version: of the weights: the number of updates made.
        """
        completions = self._engines.sample_apart(version, self._prompts.requests, self._settings)
        count = len(completions)
        lengths = [len(completion.token_ids) for completion in completions.values()]
        accuracy = on_first(lambda: self._accuracy(completions), self._group)
        return {
            "generate/accuracy": accuracy,
            "generate/mean_length": sum(lengths) / count,
            "generate/truncated": sum(c.finish_reason == "length" for c in completions.values()) / count,
            "generate/repeated": sum(repeated_share(c.token_ids) for c in completions.values()) / count,
            "generate/num_prompts": count,
        }

    def _accuracy(self, completions: dict[int, Completion]) -> float:
        verifier, prompts, total = load_verifier(self._name), self._prompts, 0.0
        for request, record, place in zip(prompts.requests, prompts.records, prompts.places, strict=True):
            ids = list(completions[request.key].token_ids)
            text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
            total += verdict(verifier, self._name, text, record, place)
        return total / len(prompts.requests)


def held_out_rows(inputs: Inputs) -> Rows:
    """The rows whose beginnings verify the engines: training rows, or held-out rows without them."""
    rows = inputs.rows if inputs.rows is not None else inputs.eval_rows
    assert rows is not None, "a run has rows"
    return rows
