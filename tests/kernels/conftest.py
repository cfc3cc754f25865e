"""Fixtures of the kernels' tests: on a GPU one with `path` runs twice, with inline PTX and on the portable path."""
import pytest
from conftest import GPU


@pytest.fixture(params=["ptx", "portable"] if GPU else ["portable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HASHFAST_PORTABLE", "1" if request.param == "portable" else "0")
    return request.param
