"""What uv or pip said when it failed, in one line: what, where, and what to do."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from .checks import GIB, nearest

MISSING, NETWORK, OTHER = "missing", "network", "other"
LINE_CHARACTERS = 600

DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded")
DISK_PATHS = (
    re.compile(r"(/[^\s`':]+)[`']?: (?:No space left|Disk quota exceeded)"),
    re.compile(r"(?:No space left on device|Disk quota exceeded): '(/[^']+)'"),
)
NETWORK_CAUSES = (
    (re.compile(r"ProxyError|tunnel"), "the proxy does not answer, or does not let it through"),
    (re.compile(r"[Cc]onnection refused"), "the connection is refused"),
    (
        re.compile(r"dns error|[Nn]ame or service not known|[Nn]ame ?[Rr]esolution|nodename nor"),
        "its name is not found",
    ),
    (re.compile(r"[Tt]imed out|timeout|deadline has elapsed"), "it does not answer in time"),
    (re.compile(r"(?:Network is|No route to host|[Nn]etwork) ?unreachable|No route to host"), "there is no way to it"),
    (re.compile(r"[Cc]onnection reset|closed before|IncompleteRead|broken pipe"), "the connection breaks off"),
    (re.compile(r"error sending request|Max retries|[Cc]onnection broken|decoding response"), "the connection fails"),
)


@dataclass(frozen=True)
class Failure:
    """Why it failed: the kind, what and where, and what to do."""

    kind: str
    what: str
    todo: str


def explain(output: str, code: int, index: str, venv: Path) -> Failure:
    """Return what the output of uv or pip means; `index` is named where the output names none."""
    text = one_line(output)
    for of_kind in (_disk, _hash, _credentials, _certificate, _server_or_file, _network, _resolution):
        failure = of_kind(text, index, venv)
        if failure:
            return failure
    if code < 0:
        todo = "free memory, where the system ended it for want of it" if code == -9 else "look at the log"
        return Failure(OTHER, f"the installer was ended by signal {-code}", todo)
    what = (
        re.sub(r"^error: ", "", text, flags=re.IGNORECASE)[:LINE_CHARACTERS]
        or f"the installer ended with code {code} and said nothing"
    )
    return Failure(OTHER, what, "mend that")


def one_line(output: str) -> str:
    """Return the part of the output that tells of the error, as one line without frames and names of users."""
    lines = [line.strip(" \t│×╰├─▶╭·") for line in masked(output).splitlines()]
    begin = re.compile(r"error|ERROR|WARNING|Could not fetch|Failed to|No solution found")
    starts = [i for i, line in enumerate(lines) if begin.match(line)]
    return " ".join(line for line in lines[starts[0] if starts else -1 :] if line)


def masked(text: str) -> str:
    """Return the text without the names and passwords that stand in addresses."""
    return re.sub(r"://[^/\s@]+@", "://***@", text)


def _address(text: str, index: str) -> str:
    found = re.search(r"(?:Failed to fetch|URL|[Uu]rl):? [`(<]?(https?://[^\s`)>]+)", text) or re.search(
        r"index(?: URL)? \((https?://[^\s)]+)\)", text
    )
    return found[1] if found else masked(index)


def _disk(text: str, index: str, venv: Path) -> Failure | None:
    if not DISK_FULL.search(text):
        return None
    found = next((match for match in (pattern.search(text) for pattern in DISK_PATHS) if match), None)
    place = Path(found[1]) if found else venv
    free = shutil.disk_usage(nearest(place)).free
    return Failure(
        "disk",
        f"the disk is full at {place} ({free / GIB:.2f} GiB free)",
        "free some space, or move uv's cache (UV_CACHE_DIR=/path) or the environment (make VENV=/path)",
    )


def _hash(text: str, index: str, venv: Path) -> Failure | None:
    found = re.search(r"Hash mismatch for `([^`]+)`", text)
    if not found:
        return None
    return Failure(
        "hash",
        f"{masked(index)} has another file of {found[1]} than the one whose hash is in tools/locks",
        "find out who changed the file, or choose the versions anew from an index that you trust (make lock)",
    )


def _credentials(text: str, index: str, venv: Path) -> Failure | None:
    found = re.search(r"\b(401|403) (?:Unauthorized|Forbidden|Client Error|Error)", text)
    if not found:
        return None
    code = found[1]
    what = "wants a name and a password, or has others" if code == "401" else "does not allow this"
    return Failure(
        "credentials",
        f"{_address(text, index)} {what} ({code})",
        "put the credentials into the index's address or ~/.netrc",
    )


def _certificate(text: str, index: str, venv: Path) -> Failure | None:
    if not re.search(r"peer certificate|CERTIFICATE_VERIFY_FAILED|SSLError|certificate verify failed", text):
        return None
    return Failure(
        "certificate",
        f"the certificate of {_address(text, index)} is not trusted",
        "set SSL_CERT_FILE to the file with your company's certificates, or check the system's clock",
    )


def _server_or_file(text: str, index: str, venv: Path) -> Failure | None:
    found = re.search(r"\b(404|410) (?:Not Found|Gone|Client Error)|HTTP error (404)", text)
    if found:
        return Failure(
            MISSING,
            f"the index lists {_address(text, index)} and does not have it ({found[1] or found[2]})",
            "put the file there, or use another index (UV_DEFAULT_INDEX=https://...)",
        )
    found = re.search(r"server error \((5\d\d)|\b(5\d\d) Server Error", text)
    if found:
        what = f"{_address(text, index)} fails ({found[1] or found[2]})"
        return Failure(NETWORK, what, "try again later, or use another index (UV_DEFAULT_INDEX=https://...)")
    return None


def _network(text: str, index: str, venv: Path) -> Failure | None:
    if not re.search(r"Failed to (?:fetch|read|download)|Request failed|Retrying|Max retries|network", text):
        return None
    cause = next((cause for pattern, cause in NETWORK_CAUSES if pattern.search(text)), None)
    if not cause:
        return None
    return Failure(
        NETWORK,
        f"{_address(text, index)} cannot be reached: {cause}",
        "check the network and the proxy, or name an index that you can reach (UV_DEFAULT_INDEX=https://...)",
    )


def _resolution(text: str, index: str, venv: Path) -> Failure | None:
    found = re.search(r"Because (\S+) was not found in (?:the package registry|the provided package locations)", text)
    if not found:
        found = re.search(r"No matching distribution found for ([\w.-]+)", text)
    if found:
        return Failure(
            MISSING,
            f"the index {masked(index)} lacks the project {found[1]}",
            "put it there, or use another index (UV_DEFAULT_INDEX=https://...)",
        )
    found = re.search(r"No solution found.*?(Because .*)", text)
    if found:
        return Failure(
            "resolution",
            f"no set of versions on {masked(index)} fits: {found[1][:LINE_CHARACTERS]}",
            "use an index that has them (UV_DEFAULT_INDEX=https://...)",
        )
    return None
