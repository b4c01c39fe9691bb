"""Placement of CPU work on nodes and CPUs: a setting of Ray Data, which our plain Ray tasks follow as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.data import DataContext, ExecutionResources

from dpo_ray.config.roles import PrepareRole


@contextmanager
def cpu_work_on(role: PrepareRole) -> Iterator[None]:
    """Inside the `with` block, run Ray Data's CPU work on the nodes and CPUs of the role `prepare`."""
    options = DataContext.get_current().execution_options
    before = options.label_selector, options.resource_limits
    options.label_selector = dict(role.node_labels) or None
    if role.count is not None:
        options.resource_limits = ExecutionResources(cpu=role.count * role.cpus)
    try:
        yield
    finally:
        options.label_selector, options.resource_limits = before


def cpu_labels() -> dict[str, str] | None:
    """Return the node labels that `cpu_work_on` has set, for plain Ray tasks that use only CPUs; or None."""
    return DataContext.get_current().execution_options.label_selector
