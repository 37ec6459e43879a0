"""`Divergence` is the only place that asks what beta is.

The rule is textual: outside of it no file of the package compares `beta`, tests it, looks something up by it or asks
for its form. Does not cover: that the formulas are right (test_vocab_parallel_jsd.py, test_topk_jsd.py).
"""

import ast
from pathlib import Path

import pytest

import megatron_gkd

PACKAGE = Path(megatron_gkd.__file__).parent
MAY_ASK = {
    "loss/divergence.py",
    "loss/reference.py",  # an independent truth shares no formula
    "loss/kernels/dense.py",  # one variant of a kernel for each form
    "commands/report/summary.py",  # words for people, in a command that does not import torch
}


def is_beta(node: ast.AST) -> bool:
    return (isinstance(node, ast.Name) and node.id == "beta") or (
        isinstance(node, ast.Attribute) and node.attr == "beta"
    )


def places_that_ask(source: str) -> list[int]:
    """Lines on which a decision hangs on beta."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        asked: list[ast.AST] = []
        match node:
            case ast.Compare():
                asked = [node]
            case ast.If() | ast.IfExp() | ast.While() | ast.comprehension():
                asked = [node.test] if not isinstance(node, ast.comprehension) else list(node.ifs)
            case ast.BoolOp():
                asked = list(node.values)
            case ast.UnaryOp(op=ast.Not()):
                asked = [node.operand]
            case ast.Match():
                asked = [node.subject]
            case ast.Subscript():
                asked = [node.slice]
            case ast.Call(func=ast.Attribute(attr="get")):
                asked = list(node.args)
            case ast.ImportFrom(module="megatron_gkd.loss.divergence"):
                asked = [ast.Name("beta") for alias in node.names if alias.name == "Form"]
        if any(is_beta(part) for root in asked for part in ast.walk(root)):
            lines.append(getattr(node, "lineno", 0))
    return lines


@pytest.mark.parametrize(
    "planted",
    [
        "if beta == 0: pass",
        "x = 1 if not 0.0 < float(divergence.beta) < 1.0 else 2",
        "if self.setting.divergence.beta: pass",
        "y = beta and z",
        "match loss.beta:\n    case 0.5: pass",
        "mode = {0.0: A, 1.0: B}.get(beta, C)",
        "mode = {0.0: A, 1.0: B}[config.beta]",
        "z = [x for x in y if beta]",
        "from megatron_gkd.loss.divergence import Divergence, Form",
    ],
)
def test_a_planted_branch_is_found(planted):
    assert places_that_ask(planted)


@pytest.mark.parametrize("allowed", ["D = Divergence(loss.beta, 2.0)", "f(beta=beta)", "if adam_beta1 > beta1: pass"])
def test_handing_beta_on_is_no_branch(allowed):
    assert not places_that_ask(allowed)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_branch_on_beta(path):
    if str(path.relative_to(PACKAGE)) not in MAY_ASK:
        lines = places_that_ask(path.read_text(encoding="utf-8"))
        assert not lines, f"{path}, lines {lines}: make it a method of megatron_gkd.loss.divergence.Divergence"
    else:
        assert places_that_ask(path.read_text(encoding="utf-8")), f"{path} need not be in MAY_ASK"
