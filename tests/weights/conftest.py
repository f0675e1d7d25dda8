"""Fixtures of the weights family."""

import pytest

from solera.weights._ring import compiled


@pytest.fixture(params=["compiled", "python"])
def ring(request, monkeypatch):
    """Both forms of the ring; the compiled one only where it is built."""
    if request.param == "python":
        monkeypatch.setenv("SOLERA_IO", "python")
    elif isinstance(compiled(), str):
        pytest.skip(f"solera._io: {compiled()}")
    return request.param
