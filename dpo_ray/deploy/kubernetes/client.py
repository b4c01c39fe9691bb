"""The connection to a Kubernetes cluster through the official client: applying manifests and following a run."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_ray.errors import ConfigError, InfrastructureError, LeaseError

if TYPE_CHECKING:
    from kubernetes.dynamic import DynamicClient

Json = dict[str, Any]

MANAGER = "dpo-ray"
FINISHED = ("Complete", "Failed", "ValidationFailed")
RUNNABLE = ("RayJob", "RayCluster")
POLL_SECONDS = 5.0
ANSWER_SECONDS = 15
GONE_SECONDS = 300
FAILED_CODE = 9  # if the exit code of the run itself is not known


class RunState(NamedTuple):
    """The status of a RayJob, as the KubeRay operator reports it."""

    deployment: str
    """Initializing, Running, Retrying, Suspended, Complete, Failed, ..."""

    job: str
    """The status of the Ray job: PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED; empty before the job exists."""

    failures: int
    message: str

    @property
    def finished(self) -> bool:
        """Return True if the state is final. The state of a failed attempt that will be retried is not final."""
        return self.deployment in FINISHED

    @property
    def exit_code(self) -> int:
        """Return the exit code of a finished run: the driver's own code or, if Ray does not report it, 9."""
        if self.deployment == "Complete" and self.job == "SUCCEEDED":
            return 0
        match = re.search(r"exit code (\d+)", self.message)
        return int(match[1]) if match and int(match[1]) else FAILED_CODE

    def __str__(self) -> str:
        parts = [self.deployment or "waiting for the operator", self.job]
        if self.failures:
            parts.append(f"{self.failures} failed {'attempt' if self.failures == 1 else 'attempts'}")
        line = ", ".join(part for part in parts if part)
        return f"{line}: {self.message.splitlines()[0][:300]}" if self.message else line


def connect(context: str | None = None) -> DynamicClient:
    """Connect to a Kubernetes cluster as kubectl does: with the kubeconfig, or in a pod with its service account.

    Raises:
        InfrastructureError: the client is not installed, the context does not exist, or the API server does not answer.
    """
    try:
        from kubernetes import client, config, dynamic
    except ImportError:
        fix = "pip install 'dpo-ray[kubernetes]'; or pipe `dpo-ray kubernetes render` into kubectl apply -f -"
        raise InfrastructureError("the Kubernetes client is not installed", where="kubernetes", fix=fix) from None
    try:
        if context is None and os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
            config.load_incluster_config()
        else:
            config.load_kube_config(config_file=os.environ.get("KUBECONFIG"), context=context)
    except config.ConfigException as error:
        fix = "set KUBECONFIG, or choose one of its contexts; `kubectl config get-contexts` lists them"
        raise InfrastructureError(
            f"no cluster is configured: {error}", where=context or "kubeconfig", fix=fix
        ) from None
    settings = client.Configuration.get_default_copy()
    settings.retries = 2  # pyright: ignore[reportAttributeAccessIssue] - which the client types as None
    with _answers("cluster"):
        return dynamic.DynamicClient(client.ApiClient(settings))


def apply(cluster: DynamicClient, manifests: list[Json], *, replace: bool = False) -> Iterator[str]:
    """Apply manifests to the cluster, in their order in the list; yield a line of text for each manifest.

    Args:
        cluster: The client that `connect` returns.
        manifests: The result of `render`.
        replace: First delete an existing RayJob or RayCluster of this name. The new one continues from the committed work.

    Raises:
        LeaseError: a RayJob or RayCluster of this name exists, and `replace` is False.
        InfrastructureError: the cluster does not answer, does not know a kind, or refuses the request.
    """
    runs = [m for m in manifests if m["kind"] in RUNNABLE]
    for manifest in runs:  # before anything is changed
        _make_room(cluster, manifest, replace)
    for manifest in manifests:
        kind, name, namespace = manifest["kind"], manifest["metadata"]["name"], manifest["metadata"]["namespace"]
        with _answers(f"{kind}/{name}"):
            api = cluster.resources.get(api_version=manifest["apiVersion"], kind=kind)
            if kind == "PersistentVolumeClaim" and _read(cluster, manifest) is not None:
                yield f"{kind}/{name}: exists already, and is left as it is"
                continue
            api.server_side_apply(
                body=manifest,
                name=name,
                namespace=namespace,
                field_manager=MANAGER,
                force_conflicts=True,
                _request_timeout=ANSWER_SECONDS,
            )
        yield f"{kind}/{name}: applied"


def watch(cluster: DynamicClient, namespace: str, name: str, poll_seconds: float = POLL_SECONDS) -> Iterator[RunState]:
    """Yield the state of a RayJob whenever it changes, until the job has finished.

    This function polls, because proxies would close a connection that stays open.

    Raises:
        ConfigError: there is no RayJob of this name.
        InfrastructureError: the cluster does not answer, or refuses the request.
    """
    reference = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name, "namespace": namespace}}
    last = None
    while True:
        ray_job = _read(cluster, reference)
        if ray_job is None:
            what = "there is no such RayJob" if last is None else "the RayJob was deleted before it had finished"
            fix = f"kubectl get rayjobs -n {namespace} lists them"
            raise ConfigError(what, where=f"{namespace}/{name}", fix=fix)
        state = state_of(ray_job)
        if state != last:
            yield state
        if state.finished:
            return
        last = state
        time.sleep(poll_seconds)


def state_of(ray_job: Json) -> RunState:
    """Return the state of a RayJob; `ray_job` is the RayJob as the API server returns it."""
    status = ray_job.get("status") or {}
    message = status.get("message") or status.get("reason") or ""
    return RunState(
        status.get("jobDeploymentStatus") or "", status.get("jobStatus") or "", status.get("failed") or 0, message
    )


def _make_room(cluster: DynamicClient, manifest: Json, replace: bool) -> None:
    kind, metadata = manifest["kind"], manifest["metadata"]
    where = f"{metadata['namespace']}/{metadata['name']}"
    if _read(cluster, manifest) is None:
        return
    if not replace:
        fix = "watch it with `dpo-ray kubernetes watch`, or use --replace: the run continues from the committed work"
        raise LeaseError(f"a {kind} of this name already exists", where=where, fix=fix)
    with _answers(where):
        api = cluster.resources.get(api_version=manifest["apiVersion"], kind=kind)
        api.delete(
            name=metadata["name"],
            namespace=metadata["namespace"],
            body={"propagationPolicy": "Foreground"},
            _request_timeout=ANSWER_SECONDS,
        )
    deadline = time.monotonic() + GONE_SECONDS
    while _read(cluster, manifest) is not None:
        if time.monotonic() > deadline:
            fix = (
                f"kubectl describe {kind.lower()} {metadata['name']} -n {metadata['namespace']} shows what it waits for"
            )
            raise InfrastructureError(
                f"the object still exists {GONE_SECONDS} s after its deletion", where=where, fix=fix
            )
        time.sleep(1)


def _read(cluster: DynamicClient, manifest: Json) -> Json | None:
    from kubernetes.dynamic.exceptions import NotFoundError

    metadata = manifest["metadata"]
    with _answers(f"{manifest['kind']}/{metadata['name']}"):
        api = cluster.resources.get(api_version=manifest["apiVersion"], kind=manifest["kind"])
        try:
            answer = api.get(name=metadata["name"], namespace=metadata["namespace"], _request_timeout=ANSWER_SECONDS)
        except NotFoundError:
            return None
    return answer.to_dict()


@contextmanager
def _answers(where: str) -> Iterator[None]:
    """Convert errors of the client, the network and the API server to our own errors with a short message."""
    from kubernetes.client import ApiException
    from kubernetes.dynamic.exceptions import ResourceNotFoundError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ResourceNotFoundError:
        fix = "install its operator: KubeRay, or that of Prometheus for a PodMonitor (cluster/kuberay/README.md)"
        raise InfrastructureError("the cluster does not know this kind of object", where=where, fix=fix) from None
    except ApiException as error:  # raised by both clients
        fixes = {
            401: "log in again: the kubeconfig's credentials are not accepted",
            403: "request the permissions that cluster/kuberay/README.md lists",
            404: "create the namespace first: kubectl create namespace NAME",
        }
        what = f"the API server refused the request with {error.status}: {_message(error.body) or error.reason}"
        fix = fixes.get(error.status or 0, "correct what the message names")
        raise InfrastructureError(what, where=where, fix=fix) from None
    except (HTTPError, OSError) as error:
        what = f"the API server does not answer: {type(error).__name__}"
        fix = "check the server in the kubeconfig and the network; `kubectl version` contacts the same server"
        raise InfrastructureError(what, where=where, fix=fix) from error


def _message(body: bytes | str | None) -> str:
    """Return the message in the API server's answer, which is a JSON object of the kind Status."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body or ""
    match = re.search(r'"message":\s*"((?:[^"\\]|\\.)*)"', text)
    return (match[1].replace('\\"', '"') if match else text)[:300]
