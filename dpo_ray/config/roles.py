"""The roles of a run on a cluster: how many workers each has, what one asks for, and on which nodes it may be."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from .base import StrictModel, field_error

_NAME = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
NodeLabels = dict[
    Annotated[str, Field(pattern=rf"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?{_NAME}$")],
    Annotated[str, Field(pattern=rf"^(!?({_NAME})?|!?in\({_NAME}(, *{_NAME})*\))$")],
]
"""Labels of Ray nodes, and the value that each must have, or `!value`, `in(a, b)`, `!in(a, b)`."""


class RoleConfig(StrictModel):
    """What a role asks the cluster for. What is left out is as the recipe says elsewhere, or as the role has it by itself."""

    count: int | None = Field(default=None, gt=0)
    """Workers, engines or tasks at once."""

    cpus: float | None = Field(default=None, gt=0)
    """Of each."""

    gpus: float | None = Field(default=None, ge=0)
    memory_gib: float | None = Field(default=None, gt=0)
    """Memory that Ray sets aside for each; more than it says is not prevented."""

    node_labels: NodeLabels | None = None
    """Only nodes with these Ray labels, such as {dpo/role: train}. On a Ray of this machine alone they do not count."""


class RolesConfig(StrictModel):
    """One entry for each role. It takes the place of what the role's own section says, so a profile can be exchanged as a whole;
    what the command line sets of that section goes before it."""

    prepare: RoleConfig = RoleConfig()
    """Tasks that read, tokenize, look up and join. count: tokenizing tasks at once; default: as the cluster has CPUs."""

    reference: RoleConfig = RoleConfig()
    """Engines, which in rounds sample as well: `reference.replicas`, `reference.cpus_per_replica`, ..."""

    train: RoleConfig = RoleConfig()
    """Training workers: `train.workers`, `train.cpus_per_worker`, ..."""

    sample: RoleConfig = RoleConfig()
    """The engines that sample for an evaluation; default: what an engine of `reference` asks for."""

    judge: RoleConfig = RoleConfig()
    """Processes of each judge."""

    @model_validator(mode="after")
    def _fields_are_of_the_role(self) -> RolesConfig:
        if self.prepare.gpus:
            raise field_error("prepare.gpus", "this work uses no GPU: leave it out")
        if self.sample.count is not None:
            raise field_error("sample.count", "an evaluation has as many engines as `reference`: leave it out")
        if self.sample.gpus is not None:
            raise field_error("sample.gpus", "as many as an engine of `reference` has: leave it out")
        return self


SECTIONS = {
    "reference": {
        "count": "replicas",
        "cpus": "cpus_per_replica",
        "gpus": "gpus_per_replica",
        "memory_gib": "memory_gib_per_replica",
        "node_labels": "node_labels",
    },
    "train": {
        "count": "workers",
        "cpus": "cpus_per_worker",
        "gpus": "gpus_per_worker",
        "memory_gib": "memory_gib_per_worker",
        "node_labels": "node_labels",
    },
}
"""Fields of a role that a section of the recipe has as well, by the section's name for them."""


def placed(values: dict[str, Any]) -> dict[str, Any]:
    """Move what `cluster.roles` says of roles with a section into that section; what is wrong is left to its own validation."""
    cluster = values.get("cluster")
    given = cluster.get("roles") if isinstance(cluster, dict) else getattr(cluster, "roles", None)
    try:
        roles = RolesConfig.model_validate(given or {})
    except ValidationError:
        return values
    result = dict(values)
    for name, fields in SECTIONS.items():
        said = getattr(roles, name).model_dump(exclude_none=True)
        section = result.get(name) or {}
        if isinstance(section, StrictModel):
            section = section.model_dump(exclude_unset=True)
        if said and isinstance(section, dict):
            result[name] = section | {fields[field]: value for field, value in said.items()}
    if not cluster or not given:
        return values
    left = roles.model_dump(exclude_unset=True, exclude=set(SECTIONS))
    others = cluster.model_dump(exclude_unset=True) if isinstance(cluster, StrictModel) else cluster
    return result | {"cluster": {**others, "roles": left}}
