"""pip's configuration as uv is told it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.installing.pip_settings import has_own_indexes, read_pip_settings, uv_settings

NEWER = """\
[global]
index_url = https://a.example/simple
timeout = 5
[install]
trusted-host =
  b.example
  c.example
"""
FILES = {
    "home/.config/pip/pip.conf": NEWER,
    "home/.pip/pip.conf": "[global]\nproxy = http://p.example:3128\n",
}


def test_files_and_variables_are_read_as_pip_reads_them(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    environ = {"HOME": str(tmp_path / "home"), "PATH": os.defpath, "PIP_EXTRA_INDEX_URL": "https://e.example/simple"}
    said = subprocess.run([sys.executable, "-m", "pip", "config", "list"], env=environ, capture_output=True, text=True)
    if said.returncode:
        pytest.skip("this environment has no pip to compare with")
    pairs = [line.partition("=") for line in said.stdout.splitlines()]
    theirs = {name.rsplit(".", 1)[-1]: str(ast.literal_eval(value)).strip() for name, _, value in pairs}
    assert read_pip_settings(environ, Path(sys.prefix)) == theirs
    assert theirs["index-url"] == "https://a.example/simple"


def test_uv_is_told_what_pip_is_told(tmp_path: Path) -> None:
    certificates = tmp_path / "ca.pem"
    certificates.touch()
    pip = {
        "index-url": "https://a.example/simple",
        "extra-index-url": "https://b.example/simple\nhttps://c.example/simple",
        "find-links": f"{tmp_path} /not/there https://d.example/files/",
        "trusted-host": "a.example b.example",
        "cert": str(certificates),
        "proxy": "http://p.example:3128",
        "no-index": "true",
    }
    variables, arguments = uv_settings(pip, {}, uv_has_indexes=False)
    assert variables == {
        "UV_DEFAULT_INDEX": "https://a.example/simple",
        "UV_INDEX": "https://b.example/simple https://c.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": f"{tmp_path},https://d.example/files/",
        "UV_INSECURE_HOST": "a.example b.example",
        "SSL_CERT_FILE": str(certificates),
        "HTTP_PROXY": "http://p.example:3128",
        "HTTPS_PROXY": "http://p.example:3128",
    }
    assert arguments == ["--no-index"]


def test_what_uv_is_told_already_stays(tmp_path: Path) -> None:
    pip = {"index-url": "https://a.example/simple", "trusted-host": "a.example", "proxy": "http://p.example"}
    set_already = {"UV_INDEX_URL": "https://u.example/simple", "https_proxy": "http://q.example"}
    assert uv_settings(pip, set_already, uv_has_indexes=False)[0] == {"UV_INSECURE_HOST": "a.example"}
    assert uv_settings(pip, {}, uv_has_indexes=True)[0] == {
        "UV_INSECURE_HOST": "a.example",
        "HTTP_PROXY": "http://p.example",
        "HTTPS_PROXY": "http://p.example",
    }
    own = tmp_path / "uv.toml"
    own.write_text('[[index]]\nurl = "https://u.example/simple"\n')
    assert has_own_indexes({"UV_CONFIG_FILE": str(own)})
    own.write_text('link-mode = "copy"\n')
    assert not has_own_indexes({"UV_CONFIG_FILE": str(own)})
