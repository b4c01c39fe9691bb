"""The connection to a Kubernetes cluster through the official client. It outlives outages of the API server.

Every failure becomes one error that says what to do.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote

from dpo_ray.errors import ConfigError, InfrastructureError, LostSightError
from dpo_ray.observe.text import duration

if TYPE_CHECKING:
    from kubernetes.client import ApiClient, ApiException

Json = dict[str, Any]
Answer = TypeVar("Answer")

MANAGER = "dpo-ray"
ANSWER_SECONDS = 15
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
PATIENCE_SECONDS = 600.0
OUTAGES = (401, 429, 500, 502, 503, 504)  # 401: a login that has expired, and that its owner may renew meanwhile


class Resource(NamedTuple):
    """A kind of object of the Kubernetes API."""

    api_version: str
    kind: str

    def path(self, namespace: str, name: str = "") -> str:
        """Return the path of one object, or of all objects of this kind in a namespace."""
        root = "api" if "/" not in self.api_version else "apis"
        plural = re.sub("y$", "ie", self.kind.lower()) + "s"
        path = f"/{root}/{self.api_version}/namespaces/{quote(namespace)}/{plural}"
        return f"{path}/{quote(name)}" if name else path


RAY_JOB, RAY_CLUSTER = Resource("ray.io/v1", "RayJob"), Resource("ray.io/v1", "RayCluster")
POD, EVENT, CONFIG_MAP = Resource("v1", "Pod"), Resource("v1", "Event"), Resource("v1", "ConfigMap")
CLAIM = Resource("v1", "PersistentVolumeClaim")
WORKLOADS = (Resource("kueue.x-k8s.io/v1beta2", "Workload"), Resource("kueue.x-k8s.io/v1beta1", "Workload"))


class Cluster:
    """A connection to the API server of a Kubernetes cluster.

    A server that has answered once and then does not is asked again, with growing pauses, for `patience_seconds`; before its
    first answer it is asked only once, so that a wrong address is noticed at once. If the server refuses the login, the
    kubeconfig is read again, because tokens expire.
    """

    def __init__(
        self,
        context: str | None = None,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        say: Callable[[str], None] = lambda text: None,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        """Read the configuration as kubectl does: the kubeconfig, or in a pod its service account. Send no request.

        `say` receives a line of text when the server stops to answer, and when it answers again.

        Raises:
            InfrastructureError: the client is not installed, or the context does not exist.
        """
        self._context, self._patience, self._say, self._first_pause = (
            context,
            patience_seconds,
            say,
            first_pause_seconds,
        )
        self._client = _configured(context)
        self._answered = False

    def get(self, resource: Resource, namespace: str, name: str) -> Json | None:
        """Return an object, or None if it does not exist.

        Raises:
            InfrastructureError: the server does not know this kind of object, or refuses the request.
            LostSightError: the server does not answer.
        """
        return self._ask("GET", resource, namespace, name, absent_is_none=True)

    def objects(self, resource: Resource, namespace: str, *, labels: str = "", fields: str = "") -> list[Json]:
        """Return all objects of a kind in a namespace that match the selectors."""
        query = [("labelSelector", labels)] * bool(labels) + [("fieldSelector", fields)] * bool(fields)
        answer = self._ask("GET", resource, namespace, query=query)
        return (answer or {}).get("items") or []

    def readable(self, resource: Resource, namespace: str, *, labels: str = "", fields: str = "") -> list[Json] | None:
        """Return objects, or None if the server refuses: who may not read them still sees the run itself."""
        try:
            return self.objects(resource, namespace, labels=labels, fields=fields)
        except InfrastructureError:
            return None

    def apply(self, manifest: Json) -> None:
        """Create an object, or change it to its manifest (server-side apply)."""
        query = [("fieldManager", MANAGER), ("force", "true")]
        kind = "application/apply-patch+yaml"
        self._ask("PATCH", *_address(manifest), query=query, body=manifest, content=kind)

    def create(self, manifest: Json) -> None:
        """Create an object that does not exist yet."""
        resource, namespace, _ = _address(manifest)
        self._ask("POST", resource, namespace, body=manifest, content="application/json")

    def change(self, resource: Resource, namespace: str, name: str, values: Json) -> None:
        """Change some fields of an object (merge patch)."""
        self._ask("PATCH", resource, namespace, name, body=values, content="application/merge-patch+json")

    def delete(self, resource: Resource, namespace: str, name: str, *, grace_seconds: int | None = None) -> bool:
        """Delete an object after everything that belongs to it; return False if it does not exist."""
        body: Json = {"propagationPolicy": "Foreground"}
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        answer = self._ask(
            "DELETE", resource, namespace, name, body=body, content="application/json", absent_is_none=True
        )
        return answer is not None

    def client(self) -> ApiClient:
        """Return the official client, for requests that are not JSON."""
        return self._client

    def _ask(
        self,
        method: str,
        resource: Resource,
        namespace: str,
        name: str = "",
        *,
        query: list[tuple[str, str]] | None = None,
        body: Json | None = None,
        content: str | None = None,
        absent_is_none: bool = False,
    ) -> Json | None:
        """Send a request and return the server's answer; None for an object that does not exist, if that is allowed."""
        headers = {"Accept": "application/json"} | ({"Content-Type": content} if content else {})

        def send(client: ApiClient) -> Json:
            answer: Any = client.call_api(
                resource.path(namespace, name),
                method,
                query_params=query or [],
                header_params=dict(headers),
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=ANSWER_SECONDS,
            )
            return json.loads(answer.data)

        return self._patiently(send, f"{resource.kind}/{name}" if name else f"{resource.kind}s", absent_is_none)

    def _patiently(self, send: Callable[[ApiClient], Json], where: str, absent_is_none: bool) -> Json | None:
        """Send a request until it is answered. Time in which this machine sleeps does not count (monotonic clock)."""
        from kubernetes.client import ApiException
        from kubernetes.config import ConfigException
        from urllib3.exceptions import HTTPError

        began, pause, tries, renewed = time.monotonic(), self._first_pause, 0, False
        while True:
            tries += 1
            refusal = None
            try:
                return self._note_answer(send(self._client), began, tries)
            except ApiException as error:
                if error.status == 404 and absent_is_none and _is_status(error):
                    return self._note_answer(None, began, tries)
                if error.status not in OUTAGES:
                    raise refused(error, where) from None
                refusal, reason = error, f"HTTP {error.status}: {message_of(error.body) or error.reason}"
            except (HTTPError, OSError, ValueError, ConfigException) as error:
                reason = type(getattr(error, "reason", None) or error).__name__
            if refusal is not None and refusal.status == 401:
                reason = self._renew() or "it refuses the login with 401; log in again"
                if not renewed:
                    renewed = True
                    continue
            if refusal is not None and not self._answered:
                raise refused(refusal, where) from None
            waited = time.monotonic() - began
            if not self._answered or waited + pause > self._patience:
                raise _lost_sight(reason, where, waited if self._answered else 0)
            if tries == 2:  # a single failure may be a connection that was closed while it was idle
                self._say(
                    f"the API server does not answer ({reason}); asking again for up to {duration(self._patience)}"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _note_answer(self, answer: Json | None, began: float, tries: int) -> Json | None:
        self._answered = True
        if tries > 2:
            self._say(f"the API server answers again after {duration(time.monotonic() - began)}")
        return answer

    def _renew(self) -> str:
        """Read the configuration again; return why that is not possible, or ""."""
        try:
            self._client = _configured(self._context)
        except InfrastructureError as error:
            return error.what
        return ""


def default_namespace(context: str | None = None) -> str:
    """Return the namespace of the kubeconfig's context, or `default`."""
    from kubernetes import config

    try:
        listed: Any = config.list_kube_config_contexts(os.environ.get("KUBECONFIG"))
    except config.ConfigException:
        return "default"
    contexts, current = listed
    chosen = next((c for c in contexts if c["name"] == context), current) or {}
    return chosen.get("context", {}).get("namespace") or "default"


def no_such_run(namespace: str, name: str, what: str = "there is no such RayJob") -> ConfigError:
    """Return the error for a run that does not exist."""
    fix = f"`dpo-ray kubernetes list --namespace {namespace}` lists the runs"
    return ConfigError(what, where=f"{namespace}/{name}", fix=fix)


def refused(error: ApiException, where: str) -> InfrastructureError:
    """Return the error for a request that the API server refuses, with the server's own words."""
    if error.status == 404 and not _is_status(error):
        fix = "install its operator: KubeRay, or that of Prometheus for a PodMonitor (cluster/kuberay/README.md)"
        return InfrastructureError("the cluster does not know this kind of object", where=where, fix=fix)
    fixes = {
        401: "log in again: the kubeconfig's credentials are not accepted",
        403: "request the permissions that cluster/kuberay/README.md lists",
        404: "create the namespace first: kubectl create namespace NAME",
    }
    what = f"the API server refused the request with {error.status}: {message_of(error.body) or error.reason}"
    return InfrastructureError(what, where=where, fix=fixes.get(error.status or 0, "correct what the message names"))


def message_of(body: bytes | str | None) -> str:
    """Return the message in the API server's answer, which is a JSON object of the kind Status."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body or ""
    match = re.search(r'"message":\s*"((?:[^"\\]|\\.)*)"', text)
    return (match[1].replace('\\"', '"') if match else text)[:300]


def _address(manifest: Json) -> tuple[Resource, str, str]:
    metadata = manifest["metadata"]
    return Resource(manifest["apiVersion"], manifest["kind"]), metadata["namespace"], metadata.get("name", "")


def _is_status(error: ApiException) -> bool:
    """Return whether the server explains itself. For a kind of object that it does not know, it does not."""
    text = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body or ""
    return '"Status"' in text


def _lost_sight(reason: str, where: str, waited: float) -> LostSightError:
    since = f" since {duration(waited)}" if waited else ""
    fix = "check the server in the kubeconfig and the network (`kubectl version` contacts the same server), then look again"
    return LostSightError(f"the API server does not answer{since}: {reason}", where=where, fix=fix)


def _configured(context: str | None) -> ApiClient:
    try:
        from kubernetes import client, config
    except ImportError:
        fix = "pip install 'dpo-ray[kubernetes]'; or pipe `dpo-ray kubernetes render` into kubectl apply -f -"
        raise InfrastructureError("the Kubernetes client is not installed", where="kubernetes", fix=fix) from None
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of every lost connection, which is handled here
    settings = client.Configuration()
    try:
        if context is None and os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
            config.load_incluster_config(client_configuration=settings)
        else:
            file = os.environ.get("KUBECONFIG")
            config.load_kube_config(config_file=file, context=context, client_configuration=settings)
    except config.ConfigException as error:
        fix = "set KUBECONFIG, or choose one of its contexts; `kubectl config get-contexts` lists them"
        raise InfrastructureError(
            f"no cluster is configured: {error}", where=context or "kubeconfig", fix=fix
        ) from None
    settings.retries = 0  # pyright: ignore[reportAttributeAccessIssue] - which the client types as None
    return client.ApiClient(settings)
