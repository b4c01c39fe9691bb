"""The recipe section `cluster`: what each kind of worker requests, and the settings of a Kubernetes cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import StrictModel, field_error
from .roles import RolesConfig

MAX_RAYJOB_NAME = 47  # KubeRay adds a suffix, and a label has at most 63 characters

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
"""A Kubernetes name (DNS-1123 label)."""

ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
"""The name of a Kubernetes object (DNS-1123 subdomain)."""

Label = Annotated[
    str,
    Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", max_length=316),
]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", max_length=63)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
Count = Annotated[int, Field(gt=0)]


class Toleration(StrictModel):
    """A Kubernetes toleration, which allows pods to run on nodes with a taint."""

    key: str = Field(min_length=1)
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    """The value of the taint. Required for operator=Equal, and not allowed otherwise."""

    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """The effect of the taint. null: the pods tolerate every effect."""

    @model_validator(mode="after")
    def _value_is_of_equal(self) -> Toleration:
        if (self.operator == "Equal") != (self.value is not None):
            raise field_error("value", "is required for operator=Equal, and not allowed otherwise")
        return self


class PlacementConfig(StrictModel):
    """The conditions for the nodes on which the pods of one group run."""

    node_selector: dict[Label, LabelValue] = Field(default_factory=dict)
    """Labels of Kubernetes nodes, such as {cloud.google.com/gke-accelerator: nvidia-h100-80gb}."""

    tolerations: tuple[Toleration, ...] = ()

    topology_key: Label | None = None
    """Place all pods of the group on nodes with the same value of this label, such as topology.kubernetes.io/zone."""


class HeadConfig(StrictModel):
    """The pod of Ray's head node. The driver also runs on this pod, but data tasks, engines, judges and training
    workers do not."""

    cpus: Count = 2
    memory_gib: Count = 8
    placement: PlacementConfig = PlacementConfig()


class GroupConfig(StrictModel):
    """A group of identical pods. The defaults are derived from what the recipe requests."""

    replicas: Count | None = None
    """Number of pods. Default: the number that the recipe's workers need."""

    min_replicas: int | None = Field(default=None, ge=0)
    """Only with autoscaling: the number of pods that are kept while there is no work. Default: 0."""

    max_replicas: Count | None = None
    """Only with autoscaling: the largest number of pods. Default: the value of `replicas`; a larger number if
    reference.max_replicas allows more engines."""

    cpus: Count | None = None
    """CPUs of one pod. Default: what the recipe's workers on this pod need."""

    memory_gib: Count | None = None
    """Memory of one pod in GiB, of which up to half may be shared memory. Default: what the planner computes for the
    workers on the pod, but at least 64 for each GPU. If the size of the model is not known where the manifests are
    rendered, and for pods that prepare data: 4 for each CPU and 64 for each GPU."""

    gpus: int | None = Field(default=None, ge=0)
    """GPUs of one pod. Default: the number that the recipe's workers on this pod need, but at most 8."""

    devices: dict[Label, Count] = Field(default_factory=dict)
    """Further devices of one pod, as {resource name of the device plugin: number of devices}, such as {rdma/ib: 8} or
    {vpc.amazonaws.com/efa: 4}."""

    placement: PlacementConfig = PlacementConfig()

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> GroupConfig:
        low, high = self.min_replicas or 0, self.max_replicas
        if self.replicas is not None and self.replicas < low:
            raise field_error("replicas", f"{self.replicas} is less than min_replicas={low}")
        if high is not None and high < max(self.replicas or 0, low):
            raise field_error(
                "max_replicas",
                f"{high} is less than {max(self.replicas or 0, low)}, the larger of replicas and min_replicas",
            )
        return self


class StorageConfig(StrictModel):
    """A persistent volume that every pod mounts (ReadWriteMany). If the recipe's `output` is a relative path, this
    path is on the volume."""

    claim: ObjectName = "dpo-ray"
    """The name of the PersistentVolumeClaim."""

    mount: str = Field(default="/mnt/shared", pattern=r"^/[\w.-]+(/[\w.-]+)*$")
    create_gib: Count | None = None
    """Size in GiB of a new claim, whose manifest is rendered with the other manifests. null: the claim already
    exists."""

    storage_class: ObjectName | None = None
    """Storage class of a new claim. Default: the default storage class of the cluster."""

    @model_validator(mode="after")
    def _class_is_of_a_new_claim(self) -> StorageConfig:
        if self.storage_class is not None and self.create_gib is None:
            raise field_error("storage_class", "is only for a new claim: set create_gib")
        return self


class SecretVariable(StrictModel):
    """An environment variable whose value is in a Kubernetes Secret. A recipe never contains the value."""

    variable: Variable
    secret: ObjectName
    key: str = Field(pattern=r"^[-._A-Za-z0-9]+$")


class QueueConfig(StrictModel):
    """The scheduler that starts either all pods of a run or none (gang scheduling)."""

    type: Literal["kueue", "volcano", "yunikorn"]
    name: LabelValue = Field(min_length=1)
    """Name of the queue (for Kueue: of the LocalQueue)."""

    priority_class: ObjectName | None = None
    """Name of a PriorityClass, or for Kueue of a WorkloadPriorityClass."""


class NetworkConfig(StrictModel):
    """The network connections that the pods of the run may have."""

    policy: bool = True
    """Render a NetworkPolicy, which allows only these connections of the run's pods: to each other, from the KubeRay
    operator, from Prometheus, to DNS, and to the ports `egress_ports` of any address."""

    operator_namespace: Name = "kuberay-system"
    """Namespace of the KubeRay operator, which submits the job."""

    monitoring_namespace: Name = "monitoring"
    """Namespace of Prometheus, which reads the metrics from the pods."""

    egress_ports: tuple[Annotated[int, Field(gt=0, lt=65536)], ...] | None = None
    """Ports to which the pods of the run may connect outside the run. The ports of the recipe's LLM judges are always
    added. Default: the ports that the run needs. These are 443 for the Hugging Face hub and object stores, the ports of
    data URLs, and with `autoscaling` 443 and 6443 for the Kubernetes API server. Set this field if an object store uses
    another port."""


class KubernetesConfig(StrictModel):
    """The settings from which `dpo-ray kubernetes render` writes the manifests of a run."""

    name: str | None = Field(default=None, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=MAX_RAYJOB_NAME)
    """Name of the RayJob. Default: the recipe's name, with - instead of _."""

    namespace: Name = "default"
    image: str | None = Field(default=None, min_length=1)
    """Image of every pod. Default: dpo-ray:VERSION-gpu if the recipe uses GPUs, dpo-ray:VERSION-cpu otherwise."""

    image_pull_secrets: tuple[ObjectName, ...] = ()
    service_account: ObjectName | None = None
    """An existing service account, such as one with access to an object store. Default: a new account for the run. Only
    the container of the autoscaler can read the token of the account."""

    head: HeadConfig = HeadConfig()
    cpu: GroupConfig = GroupConfig()
    """Pods that prepare data and run judges without GPUs."""

    engines: GroupConfig | None = GroupConfig()
    """Pods of the engines, which compute the reference's log-probs and sample completions. null: the engines run on the
    pods of `training`."""

    training: GroupConfig = GroupConfig()
    """Pods that train. Their number is fixed, and they start together."""

    gpu_resource: Label = "nvidia.com/gpu"
    scratch_gib: Count = 32
    """The most local disk that a pod may use, for Ray's logs, spilled objects and caches."""

    reserve_scratch: bool = False
    """Also request `scratch_gib` of each pod's node (ephemeral-storage), so that pods start only on nodes that have it.
    With Kueue, the ClusterQueue must then cover this resource, which is not usual."""

    lost_node_seconds: int = Field(default=30, ge=0)
    """Replace a worker pod this long after Kubernetes has found that its node does not answer. Without it, Kubernetes
    waits for 300 seconds, as it does for the pod of the head, because replacing the head ends the work of all pods."""

    autoscaling: bool = True
    """Add and remove pods of `engines` and `cpu` as the work requires. With Kueue this needs its elastic workloads
    (feature gate ElasticJobsViaWorkloadSlices, on by default since Kueue 0.18)."""

    idle_seconds: Count = 300
    """Only with autoscaling: a pod is removed when it has been idle for this time."""

    storage: StorageConfig | None = StorageConfig()
    """The volume that all pods share; null: no volume, so `output` must be at s3:// or gs://."""

    environment: dict[Variable, str] = Field(default_factory=dict)
    """Environment variables of every pod, such as {NCCL_SOCKET_IFNAME: eth0}. Put secrets into `secrets` instead."""

    secrets: tuple[SecretVariable, ...] = ()
    queue: QueueConfig | None = None
    network: NetworkConfig = NetworkConfig()
    pod_monitor: bool = False
    """Render a PodMonitor; the Prometheus operator must be installed."""

    retries: int = Field(default=3, ge=0)
    """How often a failed run is restarted on a new Ray cluster. A restart continues from the committed work."""

    ttl_seconds: int = Field(default=3600, ge=0)
    """Time from the end of the run until the run's Ray cluster is deleted. Until then the dashboard shows the logs."""

    deadline_seconds: Count | None = None
    """The run is stopped after this time. Default: never."""

    start_deadline_seconds: Count | None = None
    """The run is abandoned if it does not start within this time. Default: never."""

    @model_validator(mode="after")
    def _fields_agree(self) -> KubernetesConfig:
        for field in ("min_replicas", "max_replicas"):
            if getattr(self.training, field) is not None:
                raise field_error(f"training.{field}", "the number of training pods is fixed: set training.replicas")
        if self.queue is not None and self.queue.type == "kueue" and self.autoscaling:
            self._check_elastic()
        if not self.autoscaling:
            groups = {"cpu": self.cpu, "engines": self.engines}
            for name, group in groups.items():
                if group is not None and (group.min_replicas is not None or group.max_replicas is not None):
                    raise field_error(
                        f"{name}.replicas",
                        "without autoscaling only replicas is used: leave out min_replicas and max_replicas",
                    )
        twice = {s.variable for s in self.secrets} & set(self.environment)
        if twice:
            raise field_error("environment", f"{sorted(twice)[0]} is also one of `secrets`: set it only once")
        return self

    def _check_elastic(self) -> None:
        """Check that Kueue can admit a run whose number of pods changes: it then places no group by topology."""
        groups = {"head": self.head, "cpu": self.cpu, "engines": self.engines, "training": self.training}
        for name, group in groups.items():
            if group is not None and group.placement.topology_key is not None:
                raise field_error(
                    f"{name}.placement.topology_key",
                    "Kueue places pods by topology only if their number is fixed: set autoscaling to false",
                )


class ClusterConfig(StrictModel):
    """Settings for the cluster on which the recipe runs. They do not change the result of a run."""

    roles: RolesConfig = RolesConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()
