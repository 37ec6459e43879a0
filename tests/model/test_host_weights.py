"""Weights in host memory between uses: gone from the modules, back bit for bit, one buffer per dtype.

Not covered: pinned memory and the bus of a GPU.
"""

from __future__ import annotations

import logging

import pytest
import torch

from megatron_gkd.model.host_weights import HostWeights


def frozen() -> torch.nn.Module:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 5, bias=False).to(torch.bfloat16))
    model.register_module("tied", torch.nn.Linear(5, 7, bias=False))
    model.tied.weight = model[0].weight
    return model.requires_grad_(False)


def test_weights_are_there_while_they_are_used_only(caplog: pytest.LogCaptureFixture) -> None:
    model = frozen()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with caplog.at_level(logging.INFO, logger="megatron_gkd"):
        weights = HostWeights([model], torch.device("cpu"))
    assert weights.num_bytes == (5 * 7 + 7) * 4 + 7 * 5 * 2
    assert "in host memory; device memory" in caplog.text
    for _ in range(2):
        assert not any(p.numel() for p in model.parameters())
        with weights:
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
            assert model.tied.weight is model[0].weight
            buffers = {p.untyped_storage().data_ptr() for p in model.parameters()}
            assert len(buffers) == 2, "one buffer per dtype"
    with pytest.raises(RuntimeError):
        model[0](torch.ones(1, 5))


def test_an_error_while_they_are_used_lets_go_of_them_too() -> None:
    model = frozen()
    weights = HostWeights([model], torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), weights:
        1 / 0  # noqa: B018
    assert not any(p.numel() for p in model.parameters())


def test_trained_weights_are_not_copied_one_way() -> None:
    with pytest.raises(AssertionError, match="only frozen weights"):
        HostWeights([torch.nn.Linear(2, 2)], torch.device("cpu"))
