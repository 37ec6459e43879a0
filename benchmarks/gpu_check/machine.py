"""What the machine is: versions, modules that import, rates, and collectives of a group of one.

The rates are what `megatron-gkd plan --search` assumes: --matmul_tflops is `bf16_tflop_per_s`.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys

import torch
import torch.distributed as dist

import megatron_gkd
from benchmarks.gpu_check.part import Result, run
from benchmarks.measure import environment, peak_bytes, quantiles, timed, versions
from megatron_gkd import platform

_VLLM = "megatron_gkd.rollout.vllm"  # needs vLLM


def measure(options: argparse.Namespace, result: Result) -> None:
    where = platform.setup(options.device)
    result["environment"] = environment(where.device)
    result["packages"] = versions(
        "megatron-core", "transformers", "liger-kernel", "transformer-engine", "vllm", "pytest"
    )
    result["cuda"] = torch.version.cuda
    result.write()
    result["not_imported"] = imports()
    result.holds("modules that cannot be imported", len(result["not_imported"]), 0)
    platform.init_distributed(where)
    try:
        collectives(where.device, result)
    finally:
        dist.destroy_process_group()
    rates(options, where.device, result)


def imports() -> dict[str, str]:
    """Modules of the package that cannot be imported, and why. Those that are for vLLM are not tried."""
    failed = {}
    for module in pkgutil.walk_packages(megatron_gkd.__path__, "megatron_gkd."):
        if module.name.startswith(_VLLM) or module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except Exception as error:  # whatever a module does when it is imported
            failed[module.name] = f"{type(error).__name__}: {error}"
    return failed


def collectives(device: torch.device, result: Result) -> None:
    """Each gives back what one rank has put in."""
    group = dist.new_group([0])
    x = torch.arange(1024.0, device=device)
    found = {"all_reduce": x.clone(), "broadcast": x.clone(), "all_gather": torch.zeros_like(x)}
    dist.all_reduce(found["all_reduce"], group=group)
    dist.broadcast(found["broadcast"], 0, group=group)
    dist.all_gather_into_tensor(found["all_gather"], x, group=group)
    if device.type == "cuda":  # gloo has none
        found["reduce_scatter"] = torch.zeros_like(x)
        dist.reduce_scatter_tensor(found["reduce_scatter"], x, group=group)
    found["all_to_all"] = torch.zeros_like(x)
    dist.all_to_all_single(found["all_to_all"], x, group=group)
    for name, y in found.items():
        result.holds(f"{dist.get_backend(group)} {name}", float((y - x).abs().max()), 0.0)


def rates(options: argparse.Namespace, device: torch.device, result: Result) -> None:
    """Median rates of products and copies."""
    size = 256 if options.quick else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        a @ b
        seconds = quantiles([timed(lambda a=a, b=b: a @ b, device).wall_s for _ in range(5)])["median"]
        name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        result[f"{name}_tflop_per_s"] = 2 * size**3 / seconds / 1e12
    host = torch.empty(2**20 if options.quick else 2**30, dtype=torch.uint8, pin_memory=device.type == "cuda")
    own = torch.empty(host.shape, dtype=torch.uint8, device=device)
    for name, source, target in (("to_device", host, own), ("to_host", own, host), ("within", own, own.clone())):
        target.copy_(source)
        seconds = quantiles([timed(lambda s=source, t=target: t.copy_(s), device).wall_s for _ in range(5)])["median"]
        result[f"{name}_gb_per_s"] = host.nbytes / seconds / 1e9
    wanted = torch.empty(2**20, dtype=torch.uint8, device=device).nbytes
    result.holds("a MiB is counted as one, relative", abs(_counted(device) / wanted - 1), 0.01)


def _counted(device: torch.device) -> int:
    return peak_bytes(lambda: torch.empty(2**20, dtype=torch.uint8, device=device), device)


if __name__ == "__main__":
    sys.exit(run(measure))
