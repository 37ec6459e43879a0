"""When the kernels are chosen, and that nothing falls back in silence. No kernel runs here."""

import subprocess
import sys

import pytest
import torch

from megatron_gkd.errors import ConfigError
from megatron_gkd.loss import kernels
from megatron_gkd.loss.divergence import Divergence, Form
from megatron_gkd.loss.fused.dense import DenseSetting, uses_kernels
from tests.support.effort import LIMIT_S

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)  # a name only: no device is needed


@pytest.fixture
def _with_triton(monkeypatch):
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)


@pytest.mark.usefixtures("_with_triton")
@pytest.mark.parametrize(
    ("device", "dtypes", "expected"),
    [
        (CUDA, (torch.bfloat16, torch.bfloat16), True),
        (CUDA, (torch.float32, torch.bfloat16), True),
        (CUDA, (torch.float16, torch.float32), True),
        (CUDA, (torch.float64, torch.bfloat16), False),
        (CPU, (torch.float32, torch.float32), False),
    ],
)
def test_the_rule(device, dtypes, expected):
    assert kernels.chosen(device, *dtypes) is expected


@pytest.mark.usefixtures("_with_triton")
def test_a_formula_that_the_kernels_do_not_have_takes_the_torch_path(monkeypatch):
    """They would take it for the last of those that they have."""
    setting = DenseSetting(torch.bfloat16, torch.bfloat16, torch.float32, CUDA, 8, 0, Divergence(0.3))
    assert uses_kernels(setting)
    monkeypatch.setattr(kernels, "FORMS", tuple(form for form in Form if form is not Form.GENERAL))
    assert not uses_kernels(setting)
    with kernels.forced(True):
        assert not uses_kernels(setting)


def test_without_triton_the_torch_path_is_taken(monkeypatch):
    monkeypatch.setattr(kernels, "_has_triton", lambda: False)
    assert not kernels.chosen(CUDA, torch.bfloat16)
    with kernels.forced(True), pytest.raises(ConfigError, match="without triton"):
        kernels.chosen(CUDA, torch.bfloat16)


@pytest.mark.usefixtures("_with_triton")
def test_forced():
    with kernels.forced(True):
        assert kernels.chosen(CPU, torch.float32)
        with pytest.raises(ConfigError, match=r"torch\.float64"):
            kernels.chosen(CPU, torch.float64)
        with kernels.forced(False):
            assert not kernels.chosen(CUDA, torch.float32)
        assert kernels.chosen(CPU, torch.float32), "the block inside has ended"
    assert not kernels.chosen(CPU, torch.float32)


def test_the_choice_does_not_import_triton():
    code = "import sys, megatron_gkd.fused_linear_jsd, megatron_gkd.loss.kernels; assert 'triton' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
    assert result.returncode == 0, result.stderr
