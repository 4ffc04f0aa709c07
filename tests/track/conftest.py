"""One MLflow store on SQLite for the tests that need one of their own files; its tables are made once."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the store, which is `mlflow.db` inside."""
    return tmp_path_factory.mktemp("store")
