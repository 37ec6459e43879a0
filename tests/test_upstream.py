"""docs/upstream.md, the table of what is private upstream, against the package and against what is installed.

Every private name and every patch of the package is in the table with its file; every file, test and upstream name of
the table exists; the originals of copied code are ones that ours have been compared with. vLLM is read, not imported,
which would take half a minute. Not covered: behaviour behind a name that stays (the tests in the table's last column).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import megatron_gkd
from megatron_gkd.architecture import read_architecture
from megatron_gkd.model.build import build_model
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.parallel.layout import Layout
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import groups_of, megatron

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(megatron_gkd.__file__).parent
LIBRARIES = ("torch", "megatron", "vllm")


class Row(NamedTuple):
    upstream: str  # the cells' text
    files: list[str]
    tests: list[str]


def table() -> list[Row]:
    rows = []
    for line in (ROOT / "docs/upstream.md").read_text().splitlines():
        if line.startswith("| `"):
            upstream, _, where, tests = (cell.strip() for cell in line.strip("|").split(" | "))
            rows.append(Row(upstream, *(re.findall(r"`([^`]+)`", cell) for cell in (where, tests))))
    return rows


UPSTREAM_NAMES = sorted(
    {name for row in table() for name in re.findall(r"`((?:torch|megatron|vllm)[.\w]+)`", row.upstream)}
)


def test_every_file_and_test_of_the_table_exists() -> None:
    assert len(table()) > 25
    for row in table():
        assert row.files, row
        assert all((PACKAGE / file).is_file() for file in row.files), row
        assert row.tests, row
        for name in row.tests:
            file, _, function = name.partition("::")
            assert re.search(rf"^def {function}\(", (ROOT / file).read_text(), flags=re.M), name


# ---- the package against the table ----------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def own_names(all_trees: dict[str, ast.Module]) -> set[str]:
    """Names that the package itself gives: functions, classes, variables, attributes of `self`."""
    names = {"_replace", "_asdict", "_fields", "_exit"}  # documented: namedtuple's, os._exit
    for node in (node for tree in all_trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names | set(names_of_setattr(all_trees))


def names_of_setattr(all_trees: dict[str, ast.Module]) -> Iterator[str]:
    """`_gkd_...`: what the package hangs onto objects of others bears its name."""
    for node in (node for tree in all_trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_gkd_"):
            yield node.attr


def uses(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Private names of a library that a module uses, and names of a library that it replaces."""
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            for alias in node.names:
                imported.add(alias.asname or alias.name)
                if any(map(is_private, [*str(node.module).split("."), alias.name])):
                    yield alias.name
        elif isinstance(node, ast.Import):
            imported |= {a.asname or a.name.split(".")[0] for a in node.names if a.name.split(".")[0] in LIBRARIES}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        if is_private(node.attr) and node.attr not in own:
            yield node.attr
        if isinstance(node.ctx, ast.Store | ast.Del) and ast.unparse(node).split(".")[0] in imported:
            yield node.attr


def not_in_the_table(file: str, found: Iterator[str]) -> set[str]:
    return {
        name
        for name in found
        if not any(file in row.files and re.search(rf"\b{re.escape(name)}\b", row.upstream) for row in table())
    }


def test_every_private_use_is_in_the_table() -> None:
    own = own_names(trees())
    missing = {file: names for file, tree in trees().items() if (names := not_in_the_table(file, uses(tree, own)))}
    assert missing == {}, "add a row to docs/upstream.md"


def test_the_search_finds_what_it_looks_for() -> None:
    text = """
from torch.distributed._shard import api
from megatron.core.optimizer import _get_param_groups
import vllm.envs as envs
import torch.distributed as dist
dist.get_rank = lambda: 0
envs.VLLM_X, other = 1, 2
model._secret(group.options._timeout)
self._mine = state._asdict()
"""
    tree = ast.parse(text)
    found = list(uses(tree, own_names({"x.py": tree})))
    assert sorted(found) == ["VLLM_X", "_get_param_groups", "_secret", "_timeout", "api", "get_rank"]
    assert not_in_the_table("rollout/weight_group.py", iter(found)) == {*found} - {"_timeout"}


# ---- what is installed against the table ----------------------------------------------------------------------------


def resolve(dotted: str) -> Any:
    """The object; AttributeError or ImportError where there is none."""
    parts = dotted.split(".")
    found: Any = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            found = importlib.import_module(".".join(parts[:i]))
        else:
            found = getattr(found, part)
    return found


def source(dotted: str) -> str:
    """The text of a definition in the installed source, which is not imported. Raises LookupError without one."""
    parts = dotted.split(".")
    spec = importlib.util.find_spec(parts[0])
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"{parts[0]} is not installed")
    root = Path(next(iter(spec.submodule_search_locations))).parent
    for end in range(len(parts), 0, -1):
        module = root.joinpath(*parts[:end])
        for file in (module.with_suffix(".py"), module / "__init__.py"):
            if file.is_file():
                text = file.read_text()
                node: ast.AST = ast.parse(text)
                for name in parts[end:]:
                    node = next((n for n in ast.walk(node) if defines(n, name)), None)  # type: ignore[assignment]
                    if node is None:
                        raise LookupError(f"{file} does not define {name}")
                return ast.get_source_segment(text, node) or text
    raise LookupError(f"there is no {dotted}")


def defines(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [target.id if isinstance(target, ast.Name) else getattr(target, "attr", None) for target in targets]
        return name in names  # of a module, a class, or an instance (self.name)
    if isinstance(node, ast.alias):
        return (node.asname or node.name) == name
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name


@pytest.mark.parametrize("name", UPSTREAM_NAMES)
def test_upstream_names_exist(name: str) -> None:
    if not name.startswith("vllm"):
        resolve(name)
        return
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    source(name)


# Copied code: ours follows each of these texts. A new one means: compare it with ours (docs/upstream.md), add it here.
COPIED = {
    "megatron.core.dist_checkpointing.serialization.load": {
        "36b3d259f88b": "0.16.1",
        "0cd0fb909d12": "0.17.1, 0.18.2",
        "982f100b500f": "0.19.2",
    },
    "megatron.core.dist_checkpointing.serialization.save": {
        "2df1c0d48726": "0.16.1",
        "03b0f8ebe312": "0.17.1, 0.18.2",
        "c6584b7a8391": "0.19.2",
    },
    "megatron.core.dist_checkpointing.strategies.torch.TorchDistLoadShardedStrategy.load": {
        "3c5239fcd4a2": "0.16.1",
        "235b050841ac": "0.17.1",
        "ceb165d8b728": "0.18.2",
        "450682170a05": "0.19.2",
    },
    "megatron.core.transformer.attention.SelfAttention.get_query_key_value_tensors": {
        "b8459eb216b6": "0.16.1",
        "3f4f30155881": "0.17.1 to 0.19.2",
    },
    "megatron.core.models.common.language_module.language_module.LanguageModule"
    ".tie_embeddings_and_output_weights_state_dict": {"94b4bbd408e2": "0.16.1 to 0.19.2"},
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states": {
        "0fb8c1343b9d": "0.16.1",
        "154c0e90d6c8": "0.17.1, 0.18.2",
        "abb463384d3f": "0.19.2",
    },
    "vllm.distributed.parallel_state.cleanup_dist_env_and_memory": {"e7e462143142": "0.32.0"},
}


@pytest.mark.parametrize("name", COPIED)
def test_copied_code_has_a_known_original(name: str) -> None:
    assert name in UPSTREAM_NAMES
    library = name.split(".")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    digest = hashlib.sha256(source(name).encode()).hexdigest()[:12]
    assert digest in COPIED[name], f"{name} has changed (now {digest}): compare our copy with it"


# ---- behaviour that no other test of the table holds ----------------------------------------------------------------


def run_attention_factor(path: str) -> list[tuple[float, float]]:
    """Per layer what it multiplies rotary embeddings by, of a model with a factor and of one without."""
    with megatron():
        arch = read_architecture(Path(path))
        factors = []
        for rope in (replace(arch.rope, attention_factor=1.25), replace(arch.rope, attention_factor=1.0)):
            model = build_model(
                replace(arch, rope=rope), Layout(), groups_of(Layout()), ModelOptions.on("cpu"), dtype="fp32"
            )[0]
            factors.append([attention_factor(layer.self_attention) for layer in model.decoder.layers])
        return list(zip(*factors, strict=True))


def attention_factor(attention: Any) -> float:
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

    if hasattr(attention, "_yarn_concentration_factor"):  # megatron-core 0.19 computes it once
        return float(attention._yarn_concentration_factor)
    return float(yarn._yarn_get_concentration_factor_from_config(attention.config))


def test_the_attention_factor_reaches_the_layers(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "m", "llama", tied=False, layers=2)
    (layers,) = run_ranks(run_attention_factor, str(path), world=1)
    assert layers == [pytest.approx((1.25, 1.0))] * 2
