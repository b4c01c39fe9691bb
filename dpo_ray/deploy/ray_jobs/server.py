"""The connection to a cluster's job server, which is an HTTP service of Ray's dashboard.

Every failure becomes one error that says what to do.
"""

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
REDIRECTIONS = (
    "RAY_API_SERVER_ADDRESS",
    "RAY_ADDRESS",
)  # in Ray's client, each takes precedence over the given address
TOKEN_PLACES = "RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"  # noqa: S105 - no token


def connect(address: str) -> JobSubmissionClient:
    """Return a client of the job server at `address`, even if RAY_ADDRESS names another cluster.

    A token is sent only to a cluster that requires a token.

    Raises:
        ConfigError: `address` is not the address of a dashboard.
        InfrastructureError: nothing listens at the address, it is not a Ray dashboard, the cluster refuses the token, or
            it runs another version of Ray.
    """
    place = dashboard_url(address)
    headers: dict[str, str] = {}
    answer = _version(place, headers)
    if answer.status_code == 401:
        token, source = _token(place)
        headers["Authorization"] = f"Bearer {token}"
        answer = _version(place, headers)
        if answer.status_code in (401, 403):
            fix = f"get the token from the cluster's owner, and put it into {TOKEN_PLACES} (the first that exists is used)"
            raise InfrastructureError(f"the cluster refuses the token from {source}", where=place, fix=fix)
    _same_ray(_ray_version(answer, place), place)
    with _not_redirected(), answers(place):
        client = JobSubmissionClient(place, headers=headers)
    if not headers:
        client._headers.pop("Authorization", None)  # if RAY_AUTH_MODE is set, Ray adds the token for every cluster
    return client


def dashboard_url(address: str) -> str:
    """Return the complete URL of a dashboard. An address without a scheme, such as `host:8265`, means http.

    Raises:
        ConfigError: this is not the address of a dashboard, but for example the address of Ray Client.
    """
    place = address.strip()
    place = (place if "://" in place else f"http://{place}").rstrip("/")
    try:
        parts = urlsplit(place)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number
        sound = False
    if not sound or address.strip() in ("auto", "local"):
        fix = "use the address of the dashboard: --address http://HEAD:8265"
        raise ConfigError("this is not the address of a Ray dashboard", where=f"--address {address}", fix=fix)
    return place


@contextmanager
def answers(place: str, job: str = "") -> Iterator[None]:
    """Convert exceptions of Ray's client to errors that say where they happened and what to do.

    `job` is the id of the job that the request concerns, or "" if it concerns no job.
    """
    try:
        yield
    except (requests.exceptions.RequestException, ConnectionError) as error:
        raise InfrastructureError(
            f"the cluster no longer answers ({type(error).__name__})",
            where=place,
            fix="the job continues without this client: try again later. If the head was lost, the job was lost, too: submit it again",
        ) from error
    except ray.exceptions.AuthenticationError as error:
        fix = f"check that {TOKEN_PLACES} holds the token of this cluster"
        raise InfrastructureError("the cluster refuses this token", where=place, fix=fix) from error
    except RuntimeError as error:
        if "status code 404" in str(error) and job:
            fix = "`dpo-ray list` lists the jobs of the cluster; a new cluster does not know those of an earlier one"
            raise ConfigError("there is no such job", where=f"{job} at {place}", fix=fix) from None
        what = f"the job server refuses the request: {last_line(str(error))}"
        fix = "for details see the dashboard's log on the head, /tmp/ray/session_latest/logs/dashboard*.log"
        raise InfrastructureError(what, where=place, fix=fix) from error


def last_line(text: str, limit: int = 300) -> str:
    """Return the last line with text, cut to `limit` characters. In a traceback, this line is the error itself."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    return lines[-1][:limit] if lines else "no reason is known"


def _version(place: str, headers: dict[str, str]) -> requests.Response:
    try:
        return requests.get(f"{place}/api/version", headers=headers, timeout=PROBE_SECONDS, allow_redirects=False)
    except requests.exceptions.SSLError as error:
        fix = "use http:// if it has no TLS; set REQUESTS_CA_BUNDLE=FILE for your own certificate authority"
        raise InfrastructureError(f"TLS fails: {str(error)[:200]}", where=place, fix=fix) from error
    except requests.exceptions.Timeout as error:
        fix = "check the address, and that no firewall blocks its port"
        raise InfrastructureError(f"there is no answer within {PROBE_SECONDS} s", where=place, fix=fix) from error
    except requests.exceptions.RequestException as error:
        fix = "check the address (the dashboard's, port 8265 by default); from outside: ssh -L 8265:127.0.0.1:8265 HEAD"
        raise InfrastructureError("nothing listens at the address", where=place, fix=fix) from error


def _ray_version(answer: requests.Response, place: str) -> str:
    try:
        body: Any = answer.json() if answer.status_code == 200 else None
    except requests.exceptions.JSONDecodeError:
        body = None
    if isinstance(body, dict) and isinstance(body.get("ray_version"), str):
        return body["ray_version"]
    what = f"something answers (HTTP {answer.status_code}), but it is not a Ray dashboard with a job server"
    fix = "check host and port; the head needs ray[default]"
    raise InfrastructureError(what, where=place, fix=fix)


def _same_ray(theirs: str, place: str) -> None:
    ours = version("ray")
    if ours.split(".")[:2] != theirs.split(".")[:2]:
        what = f"the cluster runs Ray {theirs}, but this machine has Ray {ours}"
        fix = f"use an image with ray=={ours} on the cluster, or a dpo-ray for Ray {theirs} here"
        raise InfrastructureError(what, where=place, fix=fix)


def _token(place: str) -> tuple[str, str]:
    """Return the token for the cluster, and where it was found. Ray looks for tokens in the same order.

    Raises:
        InfrastructureError: there is no token on this machine.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    if not token:
        what = "the cluster requires a token, and none was found on this machine" + (
            f" ({path} cannot be read)" if named else ""
        )
        raise InfrastructureError(what, where=place, fix=f"put the cluster's token into {TOKEN_PLACES}")
    return token, str(path)


@contextmanager
def _not_redirected() -> Iterator[None]:
    """In the `with` block, remove the environment variables that would make Ray's client use another address."""
    hidden = {name: os.environ.pop(name) for name in REDIRECTIONS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
