"""The examples of docs/data.md do what they say."""

import doctest
from pathlib import Path


def test_examples_of_the_data_page():
    page = Path(__file__).parents[2] / "docs" / "data.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 10
    assert result.failed == 0
