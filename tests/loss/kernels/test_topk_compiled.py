"""The kernels around a sparse teacher, compiled for GPUs that need not be there: they read wide and spill nothing.

Does not run them (support/interpreted_topk_kernels.py, test_topk_on_gpu.py), and says nothing about speed.
"""

import importlib.util
import re

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

POINTERS = {"rows_ptr": "*fp32", "stats_ptr": "*fp32", "label_column_ptr": "*i32", "columns_ptr": "*i32"}
VARIANTS = [
    ("stats_kernel", dict(WANT_ID=1), 90, "*bf16"),
    ("gradient_kernel", dict(WITH_LABEL=1), 90, "*bf16"),
    ("select_kernel", dict(NUM_DIGITS=2), 90, "*bf16"),
    ("select_kernel", dict(NUM_DIGITS=4), 80, "*fp32"),
]


@pytest.mark.parametrize(("name", "constants", "capability", "logits"), VARIANTS)
def test_compiles_with_wide_loads_and_without_local_memory(name, constants, capability, logits, monkeypatch, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_gkd.loss.kernels import topk

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants = getattr(topk, name), {**constants, "BLOCK": topk.BLOCK}
    pointers = POINTERS | {"logits_ptr": logits, "out_ptr": logits if name == "gradient_kernel" else "*fp32"}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith(("_ptr", "stride"))}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, aligned)
    target = GPUTarget("cuda", capability, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": topk.NUM_WARPS}).asm["ptx"]
    passes = constants.get("NUM_DIGITS", 0) + 1
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= passes, "every pass reads 16 bytes at a time"
    assert ".local" not in ptx
    if name == "gradient_kernel":
        assert re.search(r"st\.global\.v4\.b32", ptx)
