"""Export of metrics through Ray. The agent of each node serves them to Prometheus, on the node's metrics port."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from dpo_ray.observe.metrics import Metric


class RayExporter:
    """Exports metrics of this process. Setting a value only changes memory; Ray sends all values every ten seconds.

    If Ray's metrics are switched off, the values go nowhere.
    """

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Set a gauge. Ray forgets it after two of its reports, so this must be called again and again."""
        if metric.name not in self._gauges:
            self._gauges[metric.name] = Gauge(metric.name, metric.description, ("run", *metric.labels))
        self._gauges[metric.name].set(float(value), dict(labels))

    def add(self, metric: Metric, amount: float, labels: Mapping[str, str]) -> None:
        """Increase a counter by `amount`, which is above 0. The agent keeps the sum, even when this process has ended."""
        if metric.name not in self._counters:
            self._counters[metric.name] = Counter(metric.name, metric.description, ("run", *metric.labels))
        self._counters[metric.name].inc(float(amount), dict(labels))
