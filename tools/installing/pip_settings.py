"""What is configured for pip, handed to uv, which does not read pip's configuration."""

from __future__ import annotations

import configparser
import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

# pip's option, and the variables of uv that mean the same: the first is set, unless one of them is set already.
INDEX_VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", "UV_INDEX_URL"),
    "extra-index-url": ("UV_INDEX", "UV_EXTRA_INDEX_URL"),
    "find-links": ("UV_FIND_LINKS",),
}
CONNECTION_VARIABLES = {
    "trusted-host": ("UV_INSECURE_HOST",),
    "cert": ("SSL_CERT_FILE",),
    "client-cert": ("SSL_CLIENT_CERT",),
    "keyring-provider": ("UV_KEYRING_PROVIDER",),
}
PROXY_VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy")
INDEX_KEYS_OF_UV = {"index", "index-url", "extra-index-url", "find-links", "no-index"}


def read_pip_settings(environ: Mapping[str, str], venv: Path) -> dict[str, str]:
    """Return pip's options by their long names, as pip reads them: files from far to near, then variables."""
    settings: dict[str, str] = {}
    for file in pip_files(environ, venv):
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):  # pip itself refuses such a file, and names it
            continue
        for section in ("global", "install"):
            if parser.has_section(section):
                settings |= {name.replace("_", "-"): value.strip() for name, value in parser.items(section)}
    for name, value in environ.items():
        if name.startswith("PIP_"):
            settings[name.removeprefix("PIP_").lower().replace("_", "-")] = value
    return {name: value for name, value in settings.items() if value}


def pip_files(environ: Mapping[str, str], venv: Path) -> list[Path]:
    """Return where pip looks for its configuration, in the order in which a later file overrides an earlier one."""
    named = environ.get("PIP_CONFIG_FILE", "")
    if named == os.devnull:
        return []
    home = Path(environ.get("HOME") or Path.home())
    config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    if sys.platform == "darwin":
        shared, own = [Path("/Library/Application Support/pip")], home / "Library/Application Support/pip"
        own = own if own.is_dir() else config / "pip"
    else:
        shared = [Path(part) / "pip" for part in (environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":") if part]
        own = config / "pip"
    files = [directory / "pip.conf" for directory in reversed(shared)]
    files += [Path("/etc/pip.conf"), home / ".pip/pip.conf", own / "pip.conf", venv / "pip.conf"]
    return [*files, Path(named)] if named else files


def uv_settings(
    pip: Mapping[str, str], environ: Mapping[str, str], uv_has_indexes: bool
) -> tuple[dict[str, str], list[str]]:
    """Return the variables and the arguments that tell uv what pip is told; what uv is told already stays."""
    table = CONNECTION_VARIABLES if uv_has_indexes else INDEX_VARIABLES | CONNECTION_VARIABLES
    variables = {}
    for option, names in table.items():
        value = _as_uv_spells_it(option, pip.get(option, ""))
        if value and not any(environ.get(name) for name in names):
            variables[names[0]] = value
    if "UV_INDEX" in variables and "UV_INDEX_STRATEGY" not in environ:
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # the best version on any index, as pip takes it
    if pip.get("proxy") and not any(environ.get(name) for name in PROXY_VARIABLES):
        variables |= {"HTTP_PROXY": pip["proxy"], "HTTPS_PROXY": pip["proxy"]}
    no_index = pip.get("no-index", "").lower() in ("1", "true", "yes", "on") and not uv_has_indexes
    return variables, ["--no-index"] if no_index else []


def _as_uv_spells_it(option: str, value: str) -> str:
    parts = value.split()
    if option == "find-links":
        parts = [part for part in (_absolute(part) for part in parts) if "://" in part or Path(part).exists()]
        return ",".join(parts)
    if option == "keyring-provider":
        return value if value == "subprocess" else ""
    if option in ("cert", "client-cert"):
        return str(Path(value).expanduser()) if value and Path(value).expanduser().exists() else ""
    return " ".join(parts)


def _absolute(place: str) -> str:
    """Return a local place without its `file:` and from the root; uv is not run in the directory that pip would be."""
    place = place.removeprefix("file://")
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))


def has_own_indexes(environ: Mapping[str, str]) -> bool:
    """Return whether uv's own configuration of the user or the system names indexes: then pip's are left out."""
    home = Path(environ.get("HOME") or Path.home())
    files = [
        Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "uv" / "uv.toml",
        *(Path(part) / "uv/uv.toml" for part in (environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":") if part),
        Path("/etc/uv/uv.toml"),
    ]
    if environ.get("UV_CONFIG_FILE"):
        files = [Path(environ["UV_CONFIG_FILE"])]
    for file in files:
        try:
            settings = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if INDEX_KEYS_OF_UV & (settings.keys() | settings.get("pip", {}).keys()):
            return True
    return False
