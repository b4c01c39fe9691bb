"""A small pod that mounts the volume of a run, in which files are read, written and deleted while no run needs to be there."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import yaml

from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import ConfigError, InfrastructureError

from .causes import Surroundings, causes
from .client import CONFIG_MAP, EVENT, POD, RAY_JOB, Cluster, Json
from .execute import Executed, execute
from .pods import CONTAINER_SECURITY, POD_SECURITY, SCRATCH, head_template
from .recipe import RECIPE_FILE, config_map_files
from .render import run_name

CONTAINER = "files"
LIFE_SECONDS = 6 * 3600  # of a pod whose owner was lost
START_SECONDS = 600.0
POLL_SECONDS = 1.0
SHELL_SECONDS = 60.0
SMALL = {"cpu": "500m", "memory": "512Mi"}


class RunVolume(NamedTuple):
    """The shared volume of a run: its head's pod template, which names volume and image, and its recipe on the cluster."""

    namespace: str
    name: str
    template: Json
    recipe: dict[str, Any]

    @property
    def mount(self) -> str:
        """Return the directory at which pods see the shared volume.

        Raises:
            ConfigError: the run has no shared volume.
        """
        mounts = self.template["spec"]["containers"][0].get("volumeMounts") or []
        found = [m["mountPath"] for m in mounts if m["name"] == "storage"]
        if not found:
            fix = "read it where it is, for example with `aws s3 ls` or `gcloud storage ls`"
            what = f"the run has no shared volume; its output is {self.recipe['output']}"
            raise ConfigError(what, where=f"{self.namespace}/{self.name}", fix=fix)
        return found[0]

    @property
    def directory(self) -> str:
        """Return the run's own directory, as pods see it."""
        return f"{self.recipe['output']}/{self.recipe['name']}"


def volume_of_recipe(recipe: Recipe) -> RunVolume:
    """Return where a recipe's run keeps its files, whether or not it has been applied."""
    name = run_name(recipe)
    values = yaml.safe_load(config_map_files(recipe)[RECIPE_FILE])
    return RunVolume(recipe.cluster.kubernetes.namespace, name, head_template(recipe, name), values)


def volume_of_run(cluster: Cluster, namespace: str, name: str) -> RunVolume:
    """Return where a run keeps its files, as its RayJob and its ConfigMap tell.

    Raises:
        ConfigError: they do not exist.
    """
    run, config = cluster.get(RAY_JOB, namespace, name), cluster.get(CONFIG_MAP, namespace, f"{name}-recipe")
    if run is None or config is None:
        missing = "RayJob" if run is None else "ConfigMap"
        fix = "use the recipe file in volume of the name: it says the same"
        raise ConfigError(f"there is no such {missing}", where=f"{namespace}/{name}", fix=fix)
    template = run["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    return RunVolume(namespace, name, template, yaml.safe_load(config["data"][RECIPE_FILE]))


@contextmanager
def files_pod(cluster: Cluster, volume: RunVolume, say: Callable[[str], None]) -> Iterator[str]:
    """Start a pod that mounts the volume, and delete it at the end of the `with` block; yield its name.

    Raises:
        ConfigError: the run has no shared volume.
        InfrastructureError: the pod does not start; the message says why.
    """
    manifest = pod_manifest(volume, f"{volume.name[:40]}-files-{secrets.token_hex(3)}")
    name = manifest["metadata"]["name"]
    cluster.create(manifest)
    try:
        _wait_until_running(cluster, volume.namespace, name, say)
        yield name
    finally:
        cluster.delete(POD, volume.namespace, name, grace_seconds=0)


def shell(
    cluster: Cluster,
    volume: RunVolume,
    pod: str,
    script: str,
    *arguments: str,
    given: bytes | None = None,
    seconds: float = SHELL_SECONDS,
) -> Executed:
    """Run a shell script in the pod; the script finds the arguments as $1, $2 and so on."""
    command = ["sh", "-c", script, "sh", *arguments]
    return execute(cluster, volume.namespace, pod, CONTAINER, command, given=given, seconds=seconds)


def pod_manifest(volume: RunVolume, name: str) -> Json:
    """Build the pod: the run's own image, which is on the nodes already, its volume, and the placement of its head."""
    mount, spec = volume.mount, volume.template["spec"]
    kept = ("imagePullSecrets", "nodeSelector", "tolerations")
    storage = [v for v in spec["volumes"] if v["name"] == "storage"]
    container = {
        "name": CONTAINER,
        "image": spec["containers"][0]["image"],
        "imagePullPolicy": "IfNotPresent",
        "command": ["sleep", str(LIFE_SECONDS)],
        "env": [{"name": "HOME", "value": SCRATCH["mountPath"]}],
        "resources": {"limits": SMALL, "requests": {"cpu": "100m", "memory": "128Mi"}},
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [dict(SCRATCH), {"name": "storage", "mountPath": mount}],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": volume.namespace,
            "labels": {"app.kubernetes.io/part-of": "dpo-ray", "dpo-ray/files-of": volume.name},
        },
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": LIFE_SECONDS,
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": POD_SECURITY,
            "containers": [container],
            "volumes": [*storage, {"name": SCRATCH["name"], "emptyDir": {"sizeLimit": "1Gi"}}],
            **{key: spec[key] for key in kept if key in spec},
        },
    }


def _wait_until_running(cluster: Cluster, namespace: str, name: str, say: Callable[[str], None]) -> None:
    until, told, before = time.monotonic() + START_SECONDS, "", ""
    while True:
        pod = cluster.get(POD, namespace, name) or {"metadata": {"name": name}}
        phase = (pod.get("status") or {}).get("phase")
        if phase == "Running":
            return
        events = cluster.readable(EVENT, namespace, fields=f"involvedObject.name={name}") or []
        run = {"metadata": {"name": ""}, "status": {"jobDeploymentStatus": "Running"}}
        why = "\n".join(str(c) for c in causes(Surroundings(run, pods=(pod,), events=tuple(events))))
        if phase in ("Failed", "Succeeded") or time.monotonic() > until:
            fix = f"kubectl describe pod {name} -n {namespace}"
            raise InfrastructureError(
                f"the pod for files does not start: {why or phase}", where=f"{namespace}/{name}", fix=fix
            )
        if why and why == before and why != told:
            told = why
            say(f"waits: {why}")
        before = why
        time.sleep(POLL_SECONDS)
