"""The models and files of all tests of scoring, written once."""

from pathlib import Path

import pytest
from scoring_cases import write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `scoring_cases.write_world`; tests must not change it."""
    return write_world(tmp_path_factory.mktemp("world"))
