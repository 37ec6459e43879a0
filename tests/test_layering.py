"""The rooms of the package: a room imports only rooms to its left, in functions and for type checking too, and modules
never in a circle.

Also: megatron.core is imported in a few named rooms only, vLLM in rollout/vllm only, and importing a pure module
imports neither, reads no device and changes no environment. Not covered: what a module does when it is used.
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

ROOMS = (
    *("errors", "records", "config", "observe", "parallel", "loss", "schedule", "data", "model", "weights", "rollout"),
    *("teacher", "train", "commands", "cli"),
)
DOORS = {  # modules at the root -> the room that they belong to
    "__init__": "errors",
    "platform": "parallel",
    "vocab_parallel_jsd": "loss",
    "topk_jsd": "loss",
    "fused_linear_jsd": "loss",
    "architecture": "model",
    "rollout_bridge": "rollout",
    "teacher_pipeline": "teacher",
    "__main__": "cli",
}
PLACE = {name: ROOMS.index(room) for name, room in DOORS.items()} | {room: i for i, room in enumerate(ROOMS)}
MOST_AT_THE_ROOT = 13
MAY_IMPORT_MEGATRON = {"platform", "parallel", "model", "weights", "teacher_pipeline", "teacher", "train"}
MAY_IMPORT_VLLM = ("rollout/vllm/",)


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


def test_every_module_has_a_room():
    unknown = {top(name) for name in MODULES} - set(PLACE)
    assert not unknown, f"give {sorted(unknown)} a room in tests/test_layering.py"
    gone = set(PLACE) - {top(name) for name in MODULES}
    assert not gone, f"{sorted(gone)} of tests/test_layering.py name no module"
    root = [path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__")]
    assert len(root) <= MOST_AT_THE_ROOT


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_to_the_left(path: Path):
    here = top(module_name(path))
    for imported in imports(path):
        target = own_module(imported.name)
        if target is not None:
            assert PLACE[top(target)] <= PLACE[here], f"{path}: {here} imports {imported.name}"
        root = imported.name.split(".")[0]
        if root == "megatron":
            assert here in MAY_IMPORT_MEGATRON, f"{path} imports {imported.name}"
        if root == "vllm":
            inside = path.relative_to(PACKAGE).as_posix()
            assert inside.startswith(MAY_IMPORT_VLLM), f"{path} imports {imported.name}"


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
    on_megatron = {"megatron_gkd.__main__", "megatron_gkd.commands.check_teacher"}
    pure = [name for name in MODULES if top(name) not in MAY_IMPORT_MEGATRON and name not in on_megatron]
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
