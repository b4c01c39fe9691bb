"""Checks of manifests by the rules of the KubeRay operator that its schemas cannot express.

The rules are from release 1.7 of the operator, with the default feature gates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from dpo_ray.config.cluster import MAX_RAYJOB_NAME

from .schema import Violation, schema_violations

Json = dict[str, Any]

MAX_RAYCLUSTER_NAME = 53
MAX_REPLICAS = 2**31 - 1  # the schema's default
MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
SIZES_OF_START = ("num-cpus", "num-gpus", "memory", "resources")
AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
FEATURE_GATES = {  # disabled unless the operator is installed with them
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
KUEUE_QUEUE, ELASTIC_JOB = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/elastic-job"
KUEUE_TOPOLOGY = ("kueue.x-k8s.io/podset-required-topology", "kueue.x-k8s.io/podset-preferred-topology")
MAX_KUEUE_GROUPS = 7  # of workers: Kueue admits eight sets of pods at most, and one of them is the head
DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_KEY = re.compile(
    r"([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
)
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def violations(manifest: Json) -> list[Violation]:
    """List what is wrong with a manifest. The operator's rules are checked only if its schema finds nothing wrong."""
    wrong = schema_violations(manifest)
    if not wrong and not manifest["metadata"].keys() & {"name", "generateName"}:
        wrong = [Violation("metadata.name", "is required, but missing")]
    if wrong:
        return wrong
    if manifest["kind"] == "RayJob":
        return list(_ray_job(manifest))
    if manifest["kind"] == "RayCluster":
        return list(_ray_cluster(manifest))
    return []


def _ray_job(manifest: Json) -> Iterator[Violation]:
    metadata, spec = manifest["metadata"], manifest["spec"]
    yield from _name(metadata.get("name"), MAX_RAYJOB_NAME)
    yield from _submission(spec)
    yield from _end_of_job(spec)
    yield from _deletion(spec)
    if _is_token_of_kubernetes(spec.get("rayClusterSpec") or {}):
        yield Violation("spec.rayClusterSpec.authOptions.enableK8sTokenAuth", "is not supported for a RayJob")
    if (metadata.get("labels") or {}).get(KUEUE_QUEUE) and not spec.get("shutdownAfterJobFinishes"):
        yield Violation(
            "spec.shutdownAfterJobFinishes", "Kueue releases the quota only of a job that shuts down: set it to true"
        )
    if spec.get("rayClusterSpec"):
        yield from _cluster(spec["rayClusterSpec"], metadata.get("annotations") or {}, "spec.rayClusterSpec")
        yield from _kueue(metadata, spec["rayClusterSpec"], "spec.rayClusterSpec")


def _submission(spec: Json) -> Iterator[Violation]:
    mode, chosen = spec.get("submissionMode", "K8sJobMode"), spec.get("clusterSelector")
    if mode not in MODES:
        yield Violation("spec.submissionMode", f"{mode!r} is not one of {', '.join(MODES)}")
    if not chosen and not spec.get("rayClusterSpec"):
        yield Violation("spec.rayClusterSpec", "is required if there is no clusterSelector")
    if chosen is not None and chosen and not chosen.get("ray.io/cluster"):
        yield Violation("spec.clusterSelector", "names no cluster: set the key ray.io/cluster")
    if not spec.get("entrypoint") and mode != "InteractiveMode" and not spec.get("submitterPodTemplate"):
        yield Violation("spec.entrypoint", "is required: without it the job has nothing to run")
    retries = spec.get("backoffLimit", 0)
    if retries < 0:
        yield Violation("spec.backoffLimit", "must not be negative")
    if retries > 0 and chosen:
        yield Violation("spec.backoffLimit", "each retry starts a new cluster: not allowed with clusterSelector")
    if retries > 0 and mode == "InteractiveMode":
        yield Violation("spec.backoffLimit", "not allowed with submissionMode: InteractiveMode")
    if mode == "SidecarMode":
        for field in ("submitterPodTemplate", "submitterConfig"):
            if spec.get(field) is not None:
                yield Violation(f"spec.{field}", "not allowed with submissionMode: SidecarMode")
        if chosen:
            yield Violation("spec.clusterSelector", "not allowed with submissionMode: SidecarMode")
        if spec.get("rayClusterSpec") and _restarts(spec["rayClusterSpec"]["headGroupSpec"]):
            yield Violation(
                "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy", "SidecarMode needs Never, or no policy"
            )
    try:
        environment = yaml.safe_load(spec.get("runtimeEnvYAML") or "{}")
    except yaml.YAMLError as error:
        yield Violation("spec.runtimeEnvYAML", f"is not YAML: {str(error).splitlines()[0]}")
    else:
        if not isinstance(environment, dict):
            yield Violation("spec.runtimeEnvYAML", "is not a mapping")


def _end_of_job(spec: Json) -> Iterator[Violation]:
    shuts_down = spec.get("shutdownAfterJobFinishes", False)
    if spec.get("suspend") and not shuts_down:
        yield Violation("spec.suspend", "needs shutdownAfterJobFinishes: true")
    if spec.get("suspend") and spec.get("clusterSelector"):
        yield Violation("spec.suspend", "not allowed with clusterSelector")
    ttl = spec.get("ttlSecondsAfterFinished", 0)
    if ttl < 0:
        yield Violation("spec.ttlSecondsAfterFinished", "must not be negative")
    if ttl > 0 and not shuts_down:
        yield Violation("spec.ttlSecondsAfterFinished", "needs shutdownAfterJobFinishes: true")
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field) is not None and spec[field] <= 0:
            yield Violation(f"spec.{field}", "must be positive")


def _deletion(spec: Json) -> Iterator[Violation]:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    where, rules = "spec.deletionStrategy", strategy.get("deletionRules") or []
    legacy = [key for key in ("onSuccess", "onFailure") if key in strategy]
    if rules and legacy:
        yield Violation(f"{where}.deletionRules", "not allowed together with onSuccess and onFailure")
    if not rules and len(legacy) < 2:
        yield Violation(where, "needs deletionRules, or both onSuccess and onFailure")
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield Violation(f"{where}.deletionRules", "not allowed with shutdownAfterJobFinishes: true")
    scales = (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling", False)
    for key in legacy:
        yield from _deletion_policy(spec, strategy[key].get("policy"), f"{where}.{key}.policy", scales)
        if strategy[key].get("policy") == "DeleteNone" and spec.get("shutdownAfterJobFinishes"):
            yield Violation(f"{where}.{key}.policy", "DeleteNone contradicts shutdownAfterJobFinishes: true")
    times: dict[tuple[str, str], dict[str, int]] = {}
    for number, rule in enumerate(rules):
        at, condition = f"{where}.deletionRules[{number}]", rule["condition"]
        yield from _deletion_policy(spec, rule["policy"], f"{at}.policy", scales)
        states = [(key, condition[key]) for key in ("jobStatus", "jobDeploymentStatus") if condition.get(key)]
        if len(states) != 1:
            yield Violation(f"{at}.condition", "needs either jobStatus or jobDeploymentStatus")
            continue
        known = times.setdefault(states[0], {})
        if rule["policy"] in known:
            yield Violation(f"{at}.policy", f"{rule['policy']} appears twice for {states[0][1]}")
        known[rule["policy"]] = condition.get("ttlSeconds", 0)
    for (_, state), known in times.items():
        in_order = [known[policy] for policy in DELETION_ORDER if policy in known]
        if in_order != sorted(in_order):
            yield Violation(
                f"{where}.deletionRules",
                f"for {state}, ttlSeconds must increase from workers to cluster to the job itself",
            )


def _deletion_policy(spec: Json, policy: str | None, where: str, scales: bool) -> Iterator[Violation]:
    if policy is None:
        yield Violation(where, "is required, but missing")
    if policy in ("DeleteCluster", "DeleteWorkers") and spec.get("clusterSelector"):
        yield Violation(where, f"{policy} is not allowed for a cluster that clusterSelector names")
    if policy == "DeleteWorkers" and scales:
        yield Violation(where, "DeleteWorkers is not allowed for a cluster with autoscaling")


def _ray_cluster(manifest: Json) -> Iterator[Violation]:
    yield from _name(manifest["metadata"].get("name"), MAX_RAYCLUSTER_NAME)
    yield from _cluster(manifest["spec"], manifest["metadata"].get("annotations") or {}, "spec")
    yield from _kueue(manifest["metadata"], manifest["spec"], "spec")


def _kueue(metadata: Json, spec: Json, where: str) -> Iterator[Violation]:
    """Check what the webhooks of Kueue 0.17 require of a cluster in a queue."""
    if not (metadata.get("labels") or {}).get(KUEUE_QUEUE):
        return
    workers = spec.get("workerGroupSpecs") or []
    if len(workers) > MAX_KUEUE_GROUPS:
        yield Violation(f"{where}.workerGroupSpecs", f"{len(workers)} groups: Kueue admits at most {MAX_KUEUE_GROUPS}")
    for number, group in enumerate(workers):
        if group["groupName"] == "head":
            yield Violation(f"{where}.workerGroupSpecs[{number}].groupName", "Kueue uses this name for Ray's head")
    elastic = (metadata.get("annotations") or {}).get(ELASTIC_JOB) == "true"
    if spec.get("enableInTreeAutoscaling") and not elastic:
        yield Violation(
            f"{where}.enableInTreeAutoscaling",
            f"Kueue admits a changing number of pods only with the annotation {ELASTIC_JOB}: 'true'",
        )
    groups = {"headGroupSpec": spec["headGroupSpec"]}
    groups |= {f"workerGroupSpecs[{number}]": group for number, group in enumerate(workers)}
    for at, group in groups.items() if elastic else ():
        annotations = (group["template"].get("metadata") or {}).get("annotations") or {}
        for key in KUEUE_TOPOLOGY:
            if key in annotations:
                yield Violation(f"{where}.{at}.template.metadata.annotations.{key}", "not allowed in an elastic job")


def _cluster(spec: Json, annotations: dict[str, str], where: str) -> Iterator[Violation]:
    scales = spec.get("enableInTreeAutoscaling", False)
    yield from _group(spec["headGroupSpec"], f"{where}.headGroupSpec")
    names = set()
    for number, group in enumerate(spec.get("workerGroupSpecs") or []):
        at = f"{where}.workerGroupSpecs[{number}]"
        yield from _group(group, at)
        yield from _bounds(group, at)
        if group["groupName"] in names:
            yield Violation(f"{at}.groupName", f"{group['groupName']!r} appears twice")
        names.add(group["groupName"])
        if scales and group.get("suspend"):
            yield Violation(f"{at}.suspend", "not allowed with autoscaling")
        if (group.get("idleTimeoutSeconds") is not None or group.get("priority")) and not _is_v2(spec):
            field = "idleTimeoutSeconds" if group.get("idleTimeoutSeconds") is not None else "priority"
            yield Violation(f"{at}.{field}", "needs autoscalerOptions.version: v2")
        if (group.get("idleTimeoutSeconds") or 0) < 0:
            yield Violation(f"{at}.idleTimeoutSeconds", "must not be negative")
        if group.get("priority") and _version(spec) < (2, 56):
            yield Violation(f"{at}.priority", "needs rayVersion 2.56 or later")
    yield from _autoscaler(spec, where)
    yield from _authentication(spec, where)
    yield from _fault_tolerance(spec, annotations, where)
    for field, gate in FEATURE_GATES.items():
        if spec.get(field) is not None:
            yield Violation(
                f"{where}.{field}", f"needs the operator's feature gate {gate}, which is disabled by default"
            )


def _group(group: Json, where: str) -> Iterator[Violation]:
    start = group.get("rayStartParams") or {}
    if not group["template"]["spec"].get("containers"):
        yield Violation(
            f"{where}.template.spec.containers", "at least one container is expected, and the first must be Ray's"
        )
    if group.get("resources") and any(start.get(key) for key in SIZES_OF_START):
        yield Violation(f"{where}.resources", "rayStartParams sets resources as well: use one of the two")
    if "labels" in start:
        yield Violation(f"{where}.rayStartParams.labels", "is not supported: use the group's own field labels")
    for key, value in (group.get("labels") or {}).items():
        if not _LABEL_KEY.fullmatch(key):
            yield Violation(f"{where}.labels.{key}", "the key is not a valid Kubernetes label")
        if not _LABEL_VALUE.fullmatch(value):
            yield Violation(f"{where}.labels.{key}", f"{value!r} is not a valid value of a Kubernetes label")


def _bounds(group: Json, where: str) -> Iterator[Violation]:
    low, high = group.get("minReplicas", 0), group.get("maxReplicas", MAX_REPLICAS)
    for field in ("minReplicas", "maxReplicas", "replicas"):
        if group.get(field, 0) < 0:
            yield Violation(f"{where}.{field}", "must not be negative")
    if low > high:
        yield Violation(f"{where}.minReplicas", f"{low} is more than maxReplicas={high}")
    elif "replicas" in group and not low <= group["replicas"] <= high:
        yield Violation(
            f"{where}.replicas", f"{group['replicas']} is not between minReplicas={low} and maxReplicas={high}"
        )


def _autoscaler(spec: Json, where: str) -> Iterator[Violation]:
    options = spec.get("autoscalerOptions") or {}
    own = _environment(spec["headGroupSpec"])
    if not spec.get("enableInTreeAutoscaling") and own.get(AUTOSCALER_V2) in ("1", "true"):
        yield Violation(f"{where}.enableInTreeAutoscaling", f"must be true, because {AUTOSCALER_V2} is set")
    if spec.get("enableInTreeAutoscaling") and "version" in options and AUTOSCALER_V2 in own:
        yield Violation(
            f"{where}.autoscalerOptions.version", f"the head's {AUTOSCALER_V2} sets it as well: leave that variable out"
        )
    if spec.get("enableInTreeAutoscaling") and _is_v2(spec):
        groups = {f"workerGroupSpecs[{n}]": g for n, g in enumerate(spec.get("workerGroupSpecs") or [])}
        for name, group in {"headGroupSpec": spec["headGroupSpec"], **groups}.items():
            if _restarts(group):
                at = f"{where}.{name}.template.spec.restartPolicy"
                yield Violation(at, "version v2 of the autoscaler needs Never, or no policy")
    if (options.get("idleTimeoutSeconds") or 0) < 0:
        yield Violation(f"{where}.autoscalerOptions.idleTimeoutSeconds", "must not be negative")
    if any(e["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for e in options.get("env") or []):
        yield Violation(
            f"{where}.autoscalerOptions.env", "KUBERAY_GEN_AUTOSCALER_START_CMD is reserved for the operator"
        )


def _authentication(spec: Json, where: str) -> Iterator[Violation]:
    options = spec.get("authOptions") or {}
    if options.get("mode") == "token" and _version(spec) < (2, 52):
        yield Violation(f"{where}.rayVersion", "authOptions.mode: token needs this field, with 2.52.0 or later")
    if _is_token_of_kubernetes(spec):
        at = f"{where}.authOptions.enableK8sTokenAuth"
        if options.get("mode") != "token":
            yield Violation(at, "needs mode: token")
        elif _version(spec) < (2, 55):
            yield Violation(at, "needs rayVersion 2.55.0 or later")
        if options.get("secretName"):
            yield Violation(f"{where}.authOptions.secretName", "not allowed with enableK8sTokenAuth")


def _fault_tolerance(spec: Json, annotations: dict[str, str], where: str) -> Iterator[Violation]:
    options, head = spec.get("gcsFaultToleranceOptions"), spec["headGroupSpec"]
    start, own = head.get("rayStartParams") or {}, _environment(head)
    if options is None:
        if "RAY_REDIS_ADDRESS" in own and annotations.get("ray.io/ft-enabled", "").lower() != "true":
            yield Violation(f"{where}.gcsFaultToleranceOptions", "the head's RAY_REDIS_ADDRESS needs it")
        return
    if options.get("backend") == "rocksdb":
        gate = "GCSFaultToleranceEmbeddedStorage"
        at = f"{where}.gcsFaultToleranceOptions.backend"
        yield Violation(at, f"rocksdb needs the operator's feature gate {gate}, which is disabled by default")
    for key in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if annotations.get(key):
            yield Violation(f"metadata.annotations.{key}", "not allowed with gcsFaultToleranceOptions")
    for key in ("redis-password", "redis-username"):
        if start.get(key):
            yield Violation(f"{where}.headGroupSpec.rayStartParams.{key}", "not allowed with gcsFaultToleranceOptions")
    for key in ("REDIS_PASSWORD", "REDIS_USERNAME", "RAY_REDIS_ADDRESS"):
        if key in own:
            at = f"{where}.headGroupSpec.template.spec.containers[0].env"
            yield Violation(at, f"{key}: not allowed with gcsFaultToleranceOptions")


def _name(name: str | None, longest: int) -> Iterator[Violation]:
    if name is None:  # the API server generates one
        return
    if len(name) > longest:
        yield Violation("metadata.name", f"{len(name)} characters: the operator allows at most {longest}")
    elif not _DNS_1035.fullmatch(name):
        yield Violation(
            "metadata.name", f"{name!r} is not a letter followed by letters, digits and -, all in lower case (DNS-1035)"
        )


def _environment(group: Json) -> dict[str, str]:
    containers = group["template"]["spec"].get("containers") or [{}]
    return {e["name"]: e.get("value", "") for e in containers[0].get("env") or []}


def _restarts(group: Json) -> bool:
    return group["template"]["spec"].get("restartPolicy", "Never") != "Never"


def _is_v2(spec: Json) -> bool:
    return (spec.get("autoscalerOptions") or {}).get("version") == "v2"


def _is_token_of_kubernetes(spec: Json) -> bool:
    return (spec.get("authOptions") or {}).get("enableK8sTokenAuth", False)


def _version(spec: Json) -> tuple[int, ...]:
    """Return the first two numbers of rayVersion. A missing or invalid version is (0, 0), older than every other."""
    match = re.match(r"v?(\d+)\.(\d+)", spec.get("rayVersion") or "")
    return (int(match[1]), int(match[2])) if match else (0, 0)
