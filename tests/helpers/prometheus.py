"""Metrics as a Prometheus server sees them: what the metrics port of a node serves, and a real server that scrapes it."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers.local_cluster import free_port

OWN_LABELS = {"run", "stage", "split", "outcome", "state", "source", "during", "error", "statistic", "against"}
Series = tuple[str, tuple[tuple[str, str], ...]]
"""The name of a metric, and its labels without those of Ray."""


def fetch(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5) as answer:
        return answer.read().decode()


def parsed(text: str) -> dict[Series, float]:
    """Return the samples of dpo_ray's metrics in a text that a metrics port serves."""
    samples: dict[Series, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_dpo_ray_"):
                labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k in OWN_LABELS))
                samples[sample.name, labels] = sample.value
    return samples


@dataclass
class Scrapes:
    """Reads a metrics port again and again, in a thread. Each scrape has the values of that moment."""

    target: str
    scrapes: list[dict[Series, float]] = field(default_factory=list)

    def values(self, name: str, **labels: str) -> list[float]:
        """Return the value of one series in each scrape that has it."""
        key = f"ray_dpo_ray_{name}", tuple(sorted(labels.items()))
        return [scrape[key] for scrape in self.scrapes if key in scrape]

    def once(self) -> None:
        with suppress(OSError):  # Ray may be too busy to answer
            self.scrapes.append(parsed(fetch(f"http://{self.target}/metrics")))

    @contextmanager
    def running(self, every_seconds: float = 0.5) -> Iterator[None]:
        end = threading.Event()

        def scrape() -> None:
            while not end.wait(every_seconds):
                self.once()

        thread = threading.Thread(target=scrape, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus server."""

    url: str

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """Return the result of a query now, or at a Unix time; fail if Prometheus refuses it."""
        parameters = {"query": expression} | ({} if at is None else {"time": str(at)})
        answer = json.loads(fetch(f"{self.url}/api/v1/query?{urllib.parse.urlencode(parameters)}"))
        assert answer["status"] == "success", answer
        return answer["data"]["result"]


@contextmanager
def prometheus_server(directory: Path, target: str, scrape_interval: str = "1s") -> Iterator[Prometheus | None]:
    """Start a Prometheus that scrapes one metrics port; yield None if Prometheus is not installed."""
    program = shutil.which("prometheus")
    if program is None:
        yield None
        return
    config = {
        "global": {"scrape_interval": scrape_interval},
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [target]}]}],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{free_port()}"
    options = [f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/tsdb"]
    with (directory / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [program, *options, f"--web.listen-address={url.removeprefix('http://')}"], stdout=log, stderr=log
        )
    try:
        until = time.monotonic() + 30
        while True:
            assert process.poll() is None, (directory / "prometheus.log").read_text()
            with suppress(OSError):
                fetch(f"{url}/-/ready")
                break
            assert time.monotonic() < until
            time.sleep(0.2)
        yield Prometheus(url)
    finally:
        process.terminate()
        process.wait(20)
