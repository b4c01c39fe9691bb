"""The roles of a run on a cluster: how many workers each has, what each requests, and on which nodes it may run."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from .base import StrictModel, field_error

_NAME = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
NodeLabels = dict[
    Annotated[str, Field(pattern=rf"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?{_NAME}$")],
    Annotated[str, Field(pattern=rf"^(!?({_NAME})?|!?in\({_NAME}(, *{_NAME})*\))$")],
]
"""Labels of Ray nodes with the value that each must have, or a condition: `!value`, `in(a, b)`, `!in(a, b)`."""


class RoleConfig(StrictModel):
    """The resources that a role requests. Fields that are not set come from other sections of the recipe or from
    defaults."""

    count: int | None = Field(default=None, gt=0)
    """Workers, engines or concurrent tasks."""

    cpus: float | None = Field(default=None, gt=0)
    """CPUs of each."""

    gpus: float | None = Field(default=None, ge=0)
    memory_gib: float | None = Field(default=None, gt=0)
    """Memory that Ray reserves for each; using more is not prevented."""

    node_labels: NodeLabels | None = None
    """Only nodes with these Ray labels, such as {dpo/role: train}. A local Ray ignores them."""


class RolesConfig(StrictModel):
    """One entry for each role. It replaces the values of the role's own section, so that a profile can be exchanged as
    a whole; values of that section that are set on the command line take precedence."""

    prepare: RoleConfig = RoleConfig()
    """Tasks that read, tokenize, look up and join. count: concurrent tokenizing tasks; default: as many as there are
    CPUs."""

    reference: RoleConfig = RoleConfig()
    """Engines, which also sample in online rounds: `reference.replicas`, `reference.cpus_per_replica`, ..."""

    train: RoleConfig = RoleConfig()
    """Training workers: `train.workers`, `train.cpus_per_worker`, ..."""

    sample: RoleConfig = RoleConfig()
    """The engines that sample for an evaluation. Default: what an engine of `reference` requests."""

    judge: RoleConfig = RoleConfig()
    """The processes of each judge."""

    @model_validator(mode="after")
    def _fields_are_of_the_role(self) -> RolesConfig:
        if self.prepare.gpus:
            raise field_error("prepare.gpus", "this role uses no GPU: leave it out")
        if self.sample.count is not None:
            raise field_error("sample.count", "an evaluation uses as many engines as `reference`: leave it out")
        if self.sample.gpus is not None:
            raise field_error(
                "sample.gpus", "an evaluation engine has as many as an engine of `reference`: leave it out"
            )
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
"""The fields of a role that also exist in a section of the recipe, with their names in that section."""


def spread_roles(values: dict[str, Any]) -> dict[str, Any]:
    """Move the values in `cluster.roles` of roles that have a section into that section.

    Wrong values are left in place, for the validation of `cluster.roles` to report.
    """
    cluster = values.get("cluster")
    entries = cluster.get("roles") if isinstance(cluster, dict) else getattr(cluster, "roles", None)
    try:
        roles = RolesConfig.model_validate(entries or {})
    except ValidationError:
        return values
    result = dict(values)
    for name, fields in SECTIONS.items():
        role = getattr(roles, name).model_dump(exclude_none=True)
        section = result.get(name) or {}
        if isinstance(section, StrictModel):
            section = section.model_dump(exclude_unset=True)
        if role and isinstance(section, dict):
            result[name] = section | {fields[field]: value for field, value in role.items()}
    if not cluster or not entries:
        return values
    left = roles.model_dump(exclude_unset=True, exclude=set(SECTIONS))
    others = cluster.model_dump(exclude_unset=True) if isinstance(cluster, StrictModel) else cluster
    return result | {"cluster": {**others, "roles": left}}
