"""The quick start's scripts import each other as scripts do: their own directory is on the path."""

from pathlib import Path

import pytest

QUICKSTART = Path(__file__).resolve().parent.parent.parent / "examples" / "quickstart"


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(QUICKSTART))
