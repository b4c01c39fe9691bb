"""The roles (kinds of workers) of a run: what a worker of each role requests from Ray, and on which nodes it may run."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from .base import MOST_CPUS, MOST_GIB, MOST_GPUS, MOST_PROCESSES, StrictModel


def _whole_or_share(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"a whole number of GPUs, or a share of one, is expected; got {gpus:g}")
    return gpus


Cpus = Annotated[float, Field(ge=0.001, le=MOST_CPUS)]
Gpus = Annotated[float, Field(ge=0, le=MOST_GPUS), AfterValidator(_whole_or_share)]

_NAME = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
NodeLabels = dict[
    Annotated[str, Field(pattern=rf"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?{_NAME}$")],
    Annotated[str, Field(pattern=rf"^(!?({_NAME})?|!?in\({_NAME}(, *{_NAME})*\))$")],
]
"""Labels of Ray nodes, with the value that a label must have, or a condition: `!value`, `in(a, b)`, `!in(a, b)`."""


class TrainRole(StrictModel):
    """The resources that each training worker requests. `train.workers` sets the number of workers."""

    cpus: Cpus = 1
    gpus: Gpus | None = None
    """Number of GPUs of each worker. Default: 1 if the cluster at `ray.address` (or this machine, with address=local)
    has GPUs, 0 otherwise."""

    memory_gib: float | None = Field(default=None, gt=0, le=MOST_GIB)
    """Memory that Ray reserves for each worker. Ray does not stop a worker that uses more."""

    node_labels: NodeLabels = Field(default_factory=dict)
    """Place workers only on nodes with these Ray labels, such as {dpo/role: train}. With ray.address=local, labels are
    ignored."""


class ReferenceRole(StrictModel):
    """The resources that each engine requests. Engines compute reference log-probs and, in online rounds, also sample.

    `reference.replicas` sets the number of engines.
    """

    cpus: Cpus = 1
    gpus: Gpus | None = None
    """Number of GPUs of each engine. Default: `reference.tensor_parallel` if training workers have GPUs, 0
    otherwise."""

    memory_gib: float | None = Field(default=None, gt=0, le=MOST_GIB)
    """Memory that Ray reserves for each engine. Ray does not stop an engine that uses more."""

    node_labels: NodeLabels = Field(default_factory=dict)
    """Place engines only on nodes with these Ray labels, such as {dpo/role: reference}. With ray.address=local, labels
    are ignored."""


class SampleRole(StrictModel):
    """The resources that each engine requests when it samples for an evaluation.

    The defaults are the values in `cluster.roles.reference`. The number of engines and of their GPUs is always the same
    as for the role `reference`.
    """

    cpus: Cpus | None = None
    memory_gib: float | None = Field(default=None, gt=0, le=MOST_GIB)
    node_labels: NodeLabels | None = None


class PrepareRole(StrictModel):
    """The resources that each data task requests: tasks that read, tokenize, look up or join data.

    None of these tasks uses a GPU.
    """

    count: int | None = Field(default=None, gt=0, le=MOST_PROCESSES)
    """Tokenizing tasks that run at the same time. Default: as many as there are CPUs."""

    cpus: Cpus = 1
    memory_gib: float | None = Field(default=None, gt=0, le=MOST_GIB)
    """Memory that Ray reserves for each task. Ray does not stop a task that uses more."""

    node_labels: NodeLabels = Field(default_factory=dict)
    """Run tasks only on nodes with these Ray labels. With ray.address=local, labels are ignored."""


class JudgeRole(StrictModel):
    """The resources that each process of a judge requests. The defaults are the values in the judge's own section."""

    count: int | None = Field(default=None, gt=0, le=MOST_PROCESSES)
    """Number of processes of each judge."""

    cpus: Cpus | None = None
    gpus: Gpus | None = None
    memory_gib: float | None = Field(default=None, gt=0, le=MOST_GIB)
    """Memory that Ray reserves for each process. Ray does not stop a process that uses more."""

    node_labels: NodeLabels = Field(default_factory=dict)
    """Place processes only on nodes with these Ray labels. With ray.address=local, labels are ignored."""


class RolesConfig(StrictModel):
    """The resources that a worker of each role requests. They do not change the result, only where and how fast it runs."""

    prepare: PrepareRole = PrepareRole()
    reference: ReferenceRole = ReferenceRole()
    train: TrainRole = TrainRole()
    sample: SampleRole = SampleRole()
    judge: JudgeRole = JudgeRole()

    def without_labels(self) -> RolesConfig:
        """Return a copy of the roles without node labels, so that workers may run on every node."""
        return RolesConfig(
            **{name: getattr(self, name).model_copy(update={"node_labels": {}}) for name in type(self).model_fields}
        )


MOVED_KEYS = {
    "train.cpus_per_worker": "cluster.roles.train.cpus",
    "train.gpus_per_worker": "cluster.roles.train.gpus",
    "train.memory_gib_per_worker": "cluster.roles.train.memory_gib",
    "train.node_labels": "cluster.roles.train.node_labels",
    "reference.cpus_per_replica": "cluster.roles.reference.cpus",
    "reference.gpus_per_replica": "cluster.roles.reference.gpus",
    "reference.memory_gib_per_replica": "cluster.roles.reference.memory_gib",
    "reference.node_labels": "cluster.roles.reference.node_labels",
    "cluster.roles.train.count": "train.workers",
    "cluster.roles.reference.count": "reference.replicas",
    "cluster.roles.sample.count": "reference.replicas",
    "cluster.roles.sample.gpus": "cluster.roles.reference.gpus",
}
"""Keys that a recipe cannot have, each with the key to set instead. The error message names this other key."""
