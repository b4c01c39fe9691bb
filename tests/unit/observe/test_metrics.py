"""The table of metrics, and what is written by it: the page in docs, the dashboard, and the alerts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.observe.metrics import METRICS, ROW_METRICS, markdown_table
from tools.dashboard import DASHBOARD, expression, panels

ROOT = Path(__file__).resolve().parents[3]
ALERTS = ROOT / "cluster/prometheus/alerts.yaml"
CASES = Path(__file__).with_name("alert_cases.yaml")
NAME = re.compile(r"ray_dpo_ray_[a-z_]+")


def rules() -> list[dict[str, Any]]:
    return [rule for group in spec()["groups"] for rule in group["rules"]]


def spec() -> dict[str, Any]:
    return yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["spec"]


def labels_by_name() -> dict[str, set[str]]:
    return {metric.exported_name: {"run", "namespace", *metric.labels} for metric in METRICS}


def test_names_follow_the_conventions_of_prometheus() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert re.fullmatch("dpo_ray_[a-z]+(_[a-z]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert not re.search("_(ms|gib|mib|tflops|percent|minutes|hours)$", metric.name), metric.name
        assert metric.description[0].isupper() or metric.description[0] in "|1", metric.name
        assert "run" not in metric.labels


def test_columns_in_other_units_are_converted_to_base_units() -> None:
    factors = {metric.column: (metric.name, metric.factor) for metric in ROW_METRICS if metric.factor != 1}
    assert factors == {
        "tflops": ("dpo_ray_train_flops_per_second", 1e12),
        "memory_gib": ("dpo_ray_train_memory_peak_bytes", 2**30),
    }


def test_the_page_has_the_metrics_of_the_code_and_the_alerts_of_the_rules() -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert markdown_table() in page
    assert re.findall(r"^\| (DpoRay\w+) \|", page, re.MULTILINE) == [rule["alert"] for rule in rules()]


def test_the_dashboard_uses_metrics_and_labels_of_the_table() -> None:
    known, used = labels_by_name(), set()
    for panel in panels(DASHBOARD):
        for target in panel.targets:
            names = NAME.findall(target.expression)
            assert names, panel.title
            assert known.keys() >= set(names), panel.title
            labels = set(re.findall(r"\{\{(\w+)\}\}", target.legend)) | set(re.findall(r'(\w+)=~?"', target.expression))
            grouped = {g.strip() for by in re.findall(r"by \(([^)]*)\)", target.expression) for g in by.split(",")}
            assert set().union(*(known[name] for name in names)) >= labels | grouped, panel.title
            used |= set(names)
    assert used == known.keys(), "the dashboard lacks a metric"


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    cells = [
        (x, y)
        for panel in panels(DASHBOARD)
        for x in range(panel.x, panel.x + panel.width)
        for y in range(panel.y, panel.y + panel.height)
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_the_variables_of_the_dashboard_are_those_that_the_queries_use() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z_]+)", json.dumps(dashboard["panels"])))
    assert used - {"__rate_interval"} == variables
    for panel in panels(DASHBOARD):
        for target in panel.targets:
            assert "$" not in expression(target.expression, "a")


def test_the_alerts_use_metrics_of_the_table_and_say_what_to_do() -> None:
    known = labels_by_name()
    for rule in rules():
        assert known.keys() >= set(NAME.findall(rule["expr"])), rule["alert"]
        assert NAME.search(rule["expr"])
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert "{{ $labels.run }}" in rule["annotations"]["summary"]
        assert rule["annotations"]["description"].endswith(".")


def promtool(*arguments: str, directory: Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("there is no program `promtool` here (Debian's package prometheus)")
    done = subprocess.run([program, *arguments], cwd=directory, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_alerts_and_they_fire_when_they_should(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec()))
    shutil.copy(CASES, tmp_path / "cases.yaml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yaml", directory=tmp_path)
    promtool("test", "rules", "cases.yaml", directory=tmp_path)


def test_each_alert_is_tried() -> None:
    cases = CASES.read_text(encoding="utf-8")
    assert {rule["alert"] for rule in rules()} == set(re.findall("DpoRay[A-Za-z]+", cases))
