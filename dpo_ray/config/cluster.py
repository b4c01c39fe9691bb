"""Where a recipe runs when it is not this machine: its roles, and the profile of a Kubernetes cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import StrictModel, field_error
from .roles import RolesConfig

MAX_RAYJOB_NAME = 47  # KubeRay adds a suffix, and 63 characters are all that a label holds

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
"""A name of Kubernetes (DNS-1123 label)."""

ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
"""A name of an object (DNS-1123 subdomain)."""

Label = Annotated[
    str,
    Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", max_length=316),
]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", max_length=63)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
Count = Annotated[int, Field(gt=0)]


class Toleration(StrictModel):
    """A taint of nodes that pods accept."""

    key: str = Field(min_length=1)
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    """Of Equal."""

    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """null: all of them."""

    @model_validator(mode="after")
    def _value_is_of_equal(self) -> Toleration:
        if (self.operator == "Equal") != (self.value is not None):
            raise field_error("value", "is needed for operator=Equal, and for nothing else")
        return self


class PlacementConfig(StrictModel):
    """The nodes that take a group's pods."""

    node_selector: dict[Label, LabelValue] = Field(default_factory=dict)
    """Labels of Kubernetes nodes, such as {cloud.google.com/gke-accelerator: nvidia-h100-80gb}."""

    tolerations: tuple[Toleration, ...] = ()

    topology_key: Label | None = None
    """Keep all pods of the group where nodes agree in this label, such as topology.kubernetes.io/zone."""


class HeadConfig(StrictModel):
    """The pod of Ray's head, which also runs the driver; no work of the stages lands there."""

    cpus: Count = 2
    memory_gib: Count = 8
    placement: PlacementConfig = PlacementConfig()


class GroupConfig(StrictModel):
    """Pods that are alike. What is left out follows from what the recipe asks for."""

    replicas: Count | None = None
    """Pods. Default: as many as the recipe's workers need."""

    min_replicas: int | None = Field(default=None, ge=0)
    """Autoscaling only: pods that stay while there is no work. Default: 0."""

    max_replicas: Count | None = None
    """Autoscaling only. Default: replicas, or what the recipe may grow to."""

    cpus: Count | None = None
    """Of one pod. Default: what the recipe's workers on it need."""

    memory_gib: Count | None = None
    """Of one pod, of which half may be shared memory. Default: 4 for each CPU, and 64 for each GPU."""

    gpus: int | None = Field(default=None, ge=0)
    """Of one pod. Default: what the recipe's workers need, up to 8."""

    devices: dict[Label, Count] = Field(default_factory=dict)
    """Further devices of one pod, by the name of their plugin, such as {rdma/ib: 8} or {vpc.amazonaws.com/efa: 4}."""

    placement: PlacementConfig = PlacementConfig()

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> GroupConfig:
        low, high = self.min_replicas or 0, self.max_replicas
        if self.replicas is not None and self.replicas < low:
            raise field_error("replicas", f"at least min_replicas={low} is expected")
        if high is not None and high < max(self.replicas or 0, low):
            raise field_error(
                "max_replicas", f"at least {max(self.replicas or 0, low)} is expected, as many as there are"
            )
        return self


class StorageConfig(StrictModel):
    """A persistent volume that every pod mounts (ReadWriteMany); relative outputs of a recipe are put in it."""

    claim: ObjectName = "dpo-ray"
    """The PersistentVolumeClaim."""

    mount: str = Field(default="/mnt/shared", pattern=r"^/[\w.-]+(/[\w.-]+)*$")
    create_gib: Count | None = None
    """Render the claim as well, of this size; null: it is there."""

    storage_class: ObjectName | None = None
    """Of a claim that is created. Default: the cluster's."""

    @model_validator(mode="after")
    def _class_is_of_a_new_claim(self) -> StorageConfig:
        if self.storage_class is not None and self.create_gib is None:
            raise field_error("storage_class", "is for a claim that is created: set create_gib")
        return self


class SecretVariable(StrictModel):
    """An environment variable whose value a Secret holds; the value never stands in a recipe."""

    variable: Variable
    secret: ObjectName
    key: str = Field(pattern=r"^[-._A-Za-z0-9]+$")


class QueueConfig(StrictModel):
    """The scheduler that starts all pods of a run together or none."""

    type: Literal["kueue", "volcano", "yunikorn"]
    name: LabelValue = Field(min_length=1)
    """The queue (of Kueue: the LocalQueue)."""

    priority_class: ObjectName | None = None
    """Of Kueue a WorkloadPriorityClass, else a PriorityClass."""


class NetworkConfig(StrictModel):
    """Who may talk to the pods, and to whom they may."""

    policy: bool = True
    """Render a NetworkPolicy: pods of the run among themselves, the operator, DNS, and `egress_ports` anywhere."""

    operator_namespace: Name = "kuberay-system"
    """Where the KubeRay operator runs, which submits the job."""

    monitoring_namespace: Name = "monitoring"
    """Where Prometheus runs, which reads the metrics."""

    egress_ports: tuple[Annotated[int, Field(gt=0, lt=65536)], ...] = (443, 6443)
    """Hubs, object stores and the API server of Kubernetes; the ports of a recipe's LLM judges are added."""


class KubernetesConfig(StrictModel):
    """What `dpo-ray kubernetes render` writes into its manifests."""

    name: str | None = Field(default=None, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=MAX_RAYJOB_NAME)
    """Of the RayJob. Default: the recipe's name, with - for _."""

    namespace: Name = "default"
    image: str | None = Field(default=None, min_length=1)
    """Of every pod. Default: dpo-ray:VERSION-gpu where the recipe uses GPUs, dpo-ray:VERSION-cpu otherwise."""

    image_pull_secrets: tuple[ObjectName, ...] = ()
    service_account: ObjectName | None = None
    """One that is there, such as one that an object store knows. Default: one of the run's own. No pod gets its token,
    except the autoscaler's container."""

    head: HeadConfig = HeadConfig()
    cpu: GroupConfig = GroupConfig()
    """Pods that prepare data and run judges without GPUs."""

    engines: GroupConfig | None = GroupConfig()
    """Pods that score with the reference and sample. null: they share those of `training`."""

    training: GroupConfig = GroupConfig()
    """Pods that train: a fixed number, which start together."""

    gpu_resource: Label = "nvidia.com/gpu"
    scratch_gib: Count = 32
    """Local disk of each pod: Ray's logs, spilled objects, caches."""

    autoscaling: bool = True
    """Engines and CPU pods come and go with the work. Not with Kueue, which admits a fixed number."""

    idle_seconds: Count = 300
    """Autoscaling only: a pod without work goes after so long."""

    storage: StorageConfig | None = StorageConfig()
    """null: outputs are at s3:// or gs://."""

    environment: dict[Variable, str] = Field(default_factory=dict)
    """Of every pod, such as {NCCL_SOCKET_IFNAME: eth0}. Secrets do not belong here."""

    secrets: tuple[SecretVariable, ...] = ()
    queue: QueueConfig | None = None
    network: NetworkConfig = NetworkConfig()
    pod_monitor: bool = False
    """Render a PodMonitor; the Prometheus operator must be there."""

    retries: int = Field(default=3, ge=0)
    """Times a failed run is started again, on a new Ray cluster; it goes on from what was committed."""

    ttl_seconds: int = Field(default=3600, ge=0)
    """The Ray cluster is deleted so long after the run's end; until then its dashboard has the logs."""

    deadline_seconds: Count | None = None
    """The run is ended after so long. Default: never."""

    start_deadline_seconds: Count | None = None
    """The run is given up if it does not begin within this time. Default: never."""

    @model_validator(mode="after")
    def _fields_agree(self) -> KubernetesConfig:
        for field in ("min_replicas", "max_replicas"):
            if getattr(self.training, field) is not None:
                raise field_error(f"training.{field}", "training pods are a fixed number: set training.replicas")
        if self.queue is not None and self.queue.type == "kueue" and self.autoscaling:
            raise field_error("autoscaling", "Kueue admits a fixed number of pods: say false")
        if not self.autoscaling:
            groups = {"cpu": self.cpu, "engines": self.engines}
            for name, group in groups.items():
                if group is not None and (group.min_replicas is not None or group.max_replicas is not None):
                    raise field_error(f"{name}.replicas", "without autoscaling this alone counts; leave out the bounds")
        twice = {s.variable for s in self.secrets} & set(self.environment)
        if twice:
            raise field_error("environment", f"{sorted(twice)[0]} is one of `secrets` as well: name it once")
        return self


class ClusterConfig(StrictModel):
    """Profiles of where the recipe runs; its result does not depend on them."""

    roles: RolesConfig = RolesConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()
