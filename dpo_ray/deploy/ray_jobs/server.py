"""Reach a cluster's job server, the HTTP service beside Ray's dashboard; every way it may fail is one clear line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray.exceptions
import requests
from ray.job_submission import JobSubmissionClient

from dpo_ray.errors import ConfigError, InfrastructureError

PROBE_SECONDS = 10
REDIRECTIONS = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray's client lets either overrule the address it is given
TOKEN_PLACES = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token"  # noqa: S105 - where Ray keeps tokens, no token


def connect(address: str) -> JobSubmissionClient:
    """Return a client of the job server at `address`, and of no other, whatever RAY_ADDRESS says.

    The token is sent to a cluster that asks for one, and to no other.

    Raises:
        ConfigError: the address is not that of a dashboard.
        InfrastructureError: nothing listens there, it is no Ray dashboard, it refuses the token, or it runs another Ray.
    """
    place = dashboard_url(address)
    headers: dict[str, str] = {}
    answer = _version(place, headers)
    if answer.status_code == 401:
        token, source = _token(place)
        headers["Authorization"] = f"Bearer {token}"
        answer = _version(place, headers)
        if answer.status_code in (401, 403):
            fix = f"take the token from the cluster's owner, and put it into {TOKEN_PLACES} (the first that is there counts)"
            raise InfrastructureError(f"the cluster refuses the token of {source}", where=place, fix=fix)
    _same_ray(_ray_version(answer, place), place)
    with _not_redirected(), answers(place):
        client = JobSubmissionClient(place, headers=headers)
    if not headers:
        client._headers.pop("Authorization", None)  # Ray adds the token where RAY_AUTH_MODE is set, whoever asks
    return client


def dashboard_url(address: str) -> str:
    """Complete an address: `host:8265` is meant as http.

    Raises:
        ConfigError: it is the address of something else, such as Ray Client's.
    """
    place = address.strip()
    place = (place if "://" in place else f"http://{place}").rstrip("/")
    try:
        parts = urlsplit(place)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        sound = False
    if not sound or address.strip() in ("auto", "local"):
        fix = "give that of the dashboard: --address http://HEAD:8265"
        raise ConfigError("this is not the address of a Ray dashboard", where=f"--address {address}", fix=fix)
    return place


@contextmanager
def answers(place: str, job: str = "") -> Iterator[None]:
    """Turn what Ray's client raises into errors that say what, where and what to do; `job` is the one asked about."""
    try:
        yield
    except (requests.exceptions.RequestException, ConnectionError) as error:
        raise InfrastructureError(
            f"the cluster does not answer any more ({type(error).__name__})",
            where=place,
            fix="a job goes on without its client: ask again later. If its head was lost, the job is too: submit again to go on",
        ) from error
    except ray.exceptions.AuthenticationError as error:
        fix = f"is {TOKEN_PLACES} the token of this cluster?"
        raise InfrastructureError("the cluster refuses this token", where=place, fix=fix) from error
    except RuntimeError as error:
        if "status code 404" in str(error) and job:
            fix = "`dpo-ray list` names the jobs that the cluster knows; a new cluster knows none of an earlier one"
            raise ConfigError("there is no such job", where=f"{job} at {place}", fix=fix) from None
        what = f"the job server refuses: {last_line(str(error))}"
        fix = "the dashboard's log on the head, /tmp/ray/session_latest/logs/dashboard*.log, says more"
        raise InfrastructureError(what, where=place, fix=fix) from error


def last_line(text: str, limit: int = 300) -> str:
    """Return the last line that says something, which of a traceback is the error itself."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    return lines[-1][:limit] if lines else "no reason given"


def _version(place: str, headers: dict[str, str]) -> requests.Response:
    try:
        return requests.get(f"{place}/api/version", headers=headers, timeout=PROBE_SECONDS, allow_redirects=False)
    except requests.exceptions.SSLError as error:
        fix = "http:// where it has no TLS; REQUESTS_CA_BUNDLE=FILE for an authority of your own"
        raise InfrastructureError(f"TLS fails: {str(error)[:200]}", where=place, fix=fix) from error
    except requests.exceptions.Timeout as error:
        fix = "check the address, and that a firewall lets its port through"
        raise InfrastructureError(f"no answer within {PROBE_SECONDS} s", where=place, fix=fix) from error
    except requests.exceptions.RequestException as error:
        fix = "check the address (the dashboard's, port 8265 by default); from outside: ssh -L 8265:127.0.0.1:8265 HEAD"
        raise InfrastructureError("nothing listens there", where=place, fix=fix) from error


def _ray_version(answer: requests.Response, place: str) -> str:
    try:
        body: Any = answer.json() if answer.status_code == 200 else None
    except requests.exceptions.JSONDecodeError:
        body = None
    if isinstance(body, dict) and isinstance(body.get("ray_version"), str):
        return body["ray_version"]
    what = f"something answers (HTTP {answer.status_code}), but it is no Ray dashboard with a job server"
    fix = "check host and port; the head needs ray[default]"
    raise InfrastructureError(what, where=place, fix=fix)


def _same_ray(theirs: str, place: str) -> None:
    ours = version("ray")
    if ours.split(".")[:2] != theirs.split(".")[:2]:
        what = f"the cluster runs Ray {theirs}, this is Ray {ours}"
        fix = f"use an image with ray=={ours} for the cluster, or the dpo-ray that goes with Ray {theirs} here"
        raise InfrastructureError(what, where=place, fix=fix)


def _token(place: str) -> tuple[str, str]:
    """Find the token where Ray itself looks, in its order; returns it and where it was."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    if not token:
        what = "the cluster wants a token, and there is none here" + (f" ({path} cannot be read)" if named else "")
        raise InfrastructureError(what, where=place, fix=f"put the cluster's token into {TOKEN_PLACES}")
    return token, str(path)


@contextmanager
def _not_redirected() -> Iterator[None]:
    """Hide what overrules the address while Ray's client makes up its mind."""
    hidden = {name: os.environ.pop(name) for name in REDIRECTIONS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
