"""docs/weights.md says what the code does: its tables are compared with the tables in the code."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_gkd.architecture import _FAMILIES, SUPPORTED_ROPE_TYPES
from megatron_gkd.weights.naming import ROLES

PAGE = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Cells of the table whose first header is `heading`, without backticks."""
    lines = iter(PAGE.splitlines())
    for line in lines:
        if line.startswith(f"| {heading} |"):
            break
    next(lines)
    found = []
    for line in lines:
        if not line.startswith("|"):
            return found
        found.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    raise AssertionError(heading)


def spelled_out(name: str) -> tuple[str, ...]:
    """a.{q,k}_proj -> a.q_proj, a.k_proj."""
    match = re.search(r"\{(\w+(?:,\w+)+)\}", name)
    return tuple(name.replace(match[0], part) for part in match[1].split(",")) if match else (name,)


def test_the_table_of_names_is_the_table_in_the_code() -> None:
    table = rows("role")
    assert [row[0] for row in table] == list(ROLES)
    for role, local, engine, hf, transform in table:
        entry = ROLES[role]
        assert transform == entry.transform
        assert (local, *([] if engine == "the same" else [engine])) == entry.core_names
        prefix = "model.layers.{layer}." if entry.per_layer else ""
        assert tuple(prefix + name for name in spelled_out(hf.split(";")[0])) == entry.hf_names


def test_the_table_of_families_is_complete() -> None:
    table = {row[0]: tuple(cell == "yes" for cell in row[2:]) for row in rows("`model_type`")}
    assert table == {name: (family.qkv_bias, family.qk_norm, family.experts) for name, family in _FAMILIES.items()}
    assert all(f"`{kind}`" in PAGE for kind in SUPPORTED_ROPE_TYPES)
