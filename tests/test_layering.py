"""The levels of the package: a module imports only from its own level or lower, and never in a circle.

Also: megatron.core is imported in a few named places only, vLLM by the rollout adapters only, and importing a pure
module imports neither, reads no device and changes no environment. Not covered: what a module does when it is used.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.effort import LIMIT_S

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_gkd"

LEVELS: dict[int, set[str]] = {  # first name below the package -> its level
    0: {
        *("__init__", "errors", "records", "dtypes", "settings", "config", "contradictions", "not_built", "flags"),
        *("server_list", "secret", "json_file", "environment", "template_flags", "no_effect"),
        *("sample_config", "check_config", "observe"),
    },
    1: {"platform", "parallel"},
    2: {
        *(
            "reference",
            "divergence",
            "sharded_softmax",
            "support",
            "vocab_parallel_jsd",
            "vocab_parallel_topk",
            "vocab_parallel_ce",
        ),
        *("topk_jsd", "fused_linear_jsd", "fused_chunks", "fused_dense", "fused_task", "checks"),
        *("kernels", "schedule", "data", "architecture", "known_options", "reach", "git_lfs"),
    },
    3: {"model", "weights", "signals", "teacher_pipeline", "teacher_server", "rollout_bridge", "rollout"},
    4: {"train"},
    5: {"cli", "__main__", "convert", "launcher", "report", "sample"},
}
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names}
MAY_IMPORT_MEGATRON = {"platform", "parallel", "model", "teacher_pipeline", "train", "weights"}
MAY_IMPORT_VLLM = {"rollout"}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name, and how: `eager` imports happen when the importing module is imported."""

    name: str
    eager: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports(path: Path) -> Iterator[Import]:
    """Every import statement of a file, those inside functions and under TYPE_CHECKING included (as not eager)."""

    def walk(node: ast.AST, eager: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (Import(f"{node.module}.{alias.name}", eager) for alias in node.names)
        lazy = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        for child in ast.iter_child_nodes(node):
            yield from walk(child, eager and not lazy)

    return walk(ast.parse(path.read_text(encoding="utf-8")), True)


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module_name(path): path for path in FILES}


def top(name: str) -> str:
    """megatron_gkd.train.loop -> train; megatron_gkd -> __init__."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def own_module(name: str) -> str | None:
    """The module of the package that an imported name is, or is in; None for other packages."""
    while name:
        if name in MODULES:
            return name
        if name == "megatron_gkd":
            return "megatron_gkd.__init__"
        name = name.rpartition(".")[0]
    return None


def test_every_module_has_a_level():
    unknown = {top(name) for name in MODULES} - set(LEVEL_OF)
    assert not unknown, f"give {sorted(unknown)} a level in tests/test_layering.py"
    gone = set(LEVEL_OF) - {top(name) for name in MODULES}
    assert not gone, f"{sorted(gone)} of tests/test_layering.py name no module"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path):
    here = top(module_name(path))
    for imported in imports(path):
        target = own_module(imported.name)
        if target is not None:
            assert LEVEL_OF[top(target)] <= LEVEL_OF[here], f"{path}: level {LEVEL_OF[here]} imports {imported.name}"
        root = imported.name.split(".")[0]
        if root == "megatron":
            assert here in MAY_IMPORT_MEGATRON, f"{path} imports {imported.name}"
        if root == "vllm":
            assert here in MAY_IMPORT_VLLM, f"{path} imports {imported.name}"


def test_no_import_circles():
    graph = {
        name: {target for item in imports(path) if item.eager and (target := own_module(item.name)) not in (None, name)}
        for name, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def test_importing_pure_modules_does_nothing_else():
    pure = [name for name in MODULES if top(name) not in MAY_IMPORT_MEGATRON and top(name) != "__main__"]
    assert len(pure) > 10
    code = """if True:
        import importlib, os, sys
        import torch  # before the snapshot: what torch does at import is torch's
        before = dict(os.environ)
        for name in sys.argv[1:]:
            importlib.import_module(name.removesuffix(".__init__"))
            assert "megatron" not in sys.modules, f"importing {name} imports megatron.core"
            assert "vllm" not in sys.modules, f"importing {name} imports vllm"
        assert dict(os.environ) == before, "importing changes the environment"
        assert not torch.distributed.is_initialized()
        assert not torch.cuda.is_initialized()
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, *pure], capture_output=True, text=True, env=env, timeout=LIMIT_S
    )
    assert result.returncode == 0, result.stderr
