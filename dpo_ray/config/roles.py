"""The roles of a run on a cluster: what each worker of a role requests from Ray, and on which nodes it may run."""

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
"""Labels of Ray nodes with the value that each must have, or a condition: `!value`, `in(a, b)`, `!in(a, b)`."""


class TrainRole(StrictModel):
    """What each training worker requests; `train.workers` is their number."""

    cpus: Cpus = 1
    gpus: Gpus | None = None
    """Default: 1 if the machine that runs the command, or the cluster that `ray.address` names, has GPUs; 0
    otherwise."""

    memory_gib: float | None = Field(default=None, gt=0, le=MOST_GIB)
    """Memory that Ray reserves for each worker; using more is not prevented."""

    node_labels: NodeLabels = Field(default_factory=dict)
    """Place workers only on nodes with these Ray labels, such as {dpo/role: train}. A local Ray ignores them."""


class ReferenceRole(StrictModel):
    """What each engine requests, which also samples in online rounds; `reference.replicas` is their number."""

    cpus: Cpus = 1
    gpus: Gpus | None = None
    """Default: `reference.tensor_parallel` if training workers have GPUs, 0 otherwise."""

    memory_gib: float | None = Field(default=None, gt=0, le=MOST_GIB)
    """Memory that Ray reserves for each engine; using more is not prevented."""

    node_labels: NodeLabels = Field(default_factory=dict)
    """Place engines only on nodes with these Ray labels, such as {dpo/role: reference}. A local Ray ignores them."""


class SampleRole(StrictModel):
    """What each engine requests that samples for an evaluation. Default: what an engine of `reference` requests, in
    the same number, and always with the same GPUs."""

    cpus: Cpus | None = None
    memory_gib: float | None = Field(default=None, gt=0, le=MOST_GIB)
    node_labels: NodeLabels | None = None


class PrepareRole(StrictModel):
    """What each task requests that reads, tokenizes, looks up or joins; no task uses a GPU."""

    count: int | None = Field(default=None, gt=0, le=MOST_PROCESSES)
    """Tokenizing tasks that run at the same time. Default: as many as there are CPUs."""

    cpus: Cpus = 1
    memory_gib: float | None = Field(default=None, gt=0, le=MOST_GIB)
    """Memory that Ray reserves for each task; using more is not prevented."""

    node_labels: NodeLabels = Field(default_factory=dict)
    """Run tasks only on nodes with these Ray labels. A local Ray ignores them."""


class JudgeRole(StrictModel):
    """What each process of a judge requests. Default: what the judge itself declares."""

    count: int | None = Field(default=None, gt=0, le=MOST_PROCESSES)
    """Processes of each judge."""

    cpus: Cpus | None = None
    gpus: Gpus | None = None
    memory_gib: float | None = Field(default=None, gt=0, le=MOST_GIB)
    """Memory that Ray reserves for each process; using more is not prevented."""

    node_labels: NodeLabels = Field(default_factory=dict)
    """Place processes only on nodes with these Ray labels. A local Ray ignores them."""


class RolesConfig(StrictModel):
    """What one worker of each role requests. It depends on the cluster alone, so a profile can be exchanged as a
    whole."""

    prepare: PrepareRole = PrepareRole()
    reference: ReferenceRole = ReferenceRole()
    train: TrainRole = TrainRole()
    sample: SampleRole = SampleRole()
    judge: JudgeRole = JudgeRole()

    def without_labels(self) -> RolesConfig:
        """Return the roles with no condition on nodes."""
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
"""Keys that a recipe cannot have, and the key that says the same, for the text of the error."""
