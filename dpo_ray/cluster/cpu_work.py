"""Where CPU work runs: Ray Data's own setting for it, which our plain tasks follow as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.data import DataContext, ExecutionResources

from dpo_ray.config.roles import RoleConfig


@contextmanager
def placed_cpu_work(role: RoleConfig) -> Iterator[None]:
    """Have CPU work run as the role `prepare` says, for a while."""
    options = DataContext.get_current().execution_options
    before = options.label_selector, options.resource_limits
    options.label_selector = dict(role.node_labels) if role.node_labels else None
    if role.count is not None:
        options.resource_limits = ExecutionResources(cpu=role.count * (role.cpus or 1.0))
    try:
        yield
    finally:
        options.label_selector, options.resource_limits = before


def cpu_labels() -> dict[str, str] | None:
    """Return the labels of nodes for plain tasks that use CPUs alone."""
    return DataContext.get_current().execution_options.label_selector
