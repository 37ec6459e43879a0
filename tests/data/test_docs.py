"""The examples of docs/data.md and docs/long_context.md do what they say."""

import doctest
from pathlib import Path

import pytest


@pytest.mark.parametrize(("name", "number"), [("data.md", 11), ("long_context.md", 2)])
def test_examples_of_a_page(name: str, number: int):
    page = Path(__file__).parents[2] / "docs" / name
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted >= number
    assert result.failed == 0
