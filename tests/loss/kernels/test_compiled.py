"""The kernels compiled for GPUs that need not be there: every variant compiles, reads wide and spills nothing.

Does not run them (support/interpreted_kernels.py, test_on_gpu.py), and says nothing about speed.
"""

import importlib.util
import re

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

POINTERS = {"rows_ptr": "*fp32", "label_rows_ptr": "*fp32", "label_column_ptr": "*i32"}
FLOATS = ("inverse_temperature", "beta", "one_minus_beta")
VARIANTS = [
    *(("stats_kernel", dict(WANT_LABEL=label, WANT_COLUMNS=ids)) for label, ids in ((0, 0), (1, 1))),
    *(("sums_kernel", dict(MODE=mode)) for mode in range(4)),
    *(("gradient_kernel", dict(MODE=mode, LABEL_MODE=label)) for mode, label in ((0, 0), (1, 1), (2, 2), (3, 0))),
]


def _compile(name: str, constants: dict[str, int], capability: int, logits: str):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_gkd.loss.kernels import dense

    kernel = getattr(dense, name)
    constants = {**constants, "BLOCK": dense.BLOCK}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in FLOATS:
            signature[argument] = "fp32"
        elif argument.endswith("_ptr"):
            out = "*fp32" if name != "gradient_kernel" else logits
            signature[argument] = POINTERS.get(argument, out if argument == "out_ptr" else logits)
        else:
            signature[argument] = "i32"
        if argument.endswith(("_ptr", "_stride")):  # what a launch with aligned buffers tells the compiler
            attributes[(i,)] = [["tt.divisibility", 16]]
    constexprs = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": dense.NUM_WARPS}).asm[
        "ptx"
    ]


@pytest.mark.parametrize(("name", "constants"), VARIANTS)
@pytest.mark.parametrize(("capability", "logits"), [(90, "*bf16"), (80, "*fp32")])
def test_compiles_with_wide_loads_and_without_local_memory(name, constants, capability, logits, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = _compile(name, constants, capability, logits)
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= 2, "both logits are read 16 bytes at a time"
    assert ".local" not in ptx
    if name == "gradient_kernel":
        assert re.search(r"st\.global\.v4\.b32", ptx)
