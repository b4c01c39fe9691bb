"""An API server in miniature, which the kubeconfig of a test names."""

import pytest

from tests.helpers.fakes.api_server import api_server


@pytest.fixture
def server(tmp_path, monkeypatch):
    pytest.importorskip("kubernetes", reason="the extra `kubernetes` is not installed")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with api_server(tmp_path / "config") as server:
        yield server
