"""Somebody who has only the rights that cluster/kuberay/README.md lists, and somebody who may not see pods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.helpers.real_cluster import ROOT, SMALL, RealCluster

RECIPE = str(ROOT / "pipelines" / "quickstart.yaml")
APPLY = [
    {"apiGroups": ["ray.io"], "resources": ["rayjobs", "rayclusters"], "verbs": ["get", "patch", "create", "delete"]},
    {"apiGroups": [""], "resources": ["serviceaccounts", "configmaps"], "verbs": ["get", "patch", "create"]},
    {"apiGroups": [""], "resources": ["persistentvolumeclaims"], "verbs": ["get", "patch", "create"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["get", "patch", "create"]},
]
WATCH = [
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]},
    {"apiGroups": [""], "resources": ["events", "persistentvolumeclaims"], "verbs": ["list"]},
    {"apiGroups": [""], "resources": ["pods/exec"], "verbs": ["get", "create"]},
]


def test_the_listed_rights_are_enough_to_apply_and_to_follow(here: RealCluster, tmp_path: Path) -> None:
    text = _followed(here, _user(here, tmp_path, "listed", [*APPLY, *WATCH]), "listed")
    assert "train: started" in text
    assert "cannot be read" not in text


def test_without_the_right_to_see_pods_the_states_are_shown(here: RealCluster, tmp_path: Path) -> None:
    text = _followed(here, _user(here, tmp_path, "blind", APPLY), "blind")
    assert "the pods cannot be read, only the run's state; it needs the right to `list` pods" in text
    assert "train: started" not in text


def test_without_any_right_the_refusal_names_the_page(here: RealCluster, tmp_path: Path) -> None:
    user = _user(here, tmp_path, "nobody", [])
    done = user.dpo_ray("kubernetes", "apply", RECIPE, *user.overrides("nobody", *SMALL))
    assert done.returncode == 9
    assert "403" in done.stderr
    assert "cluster/kuberay/README.md" in done.stderr


def _followed(here: RealCluster, user: RealCluster, name: str) -> str:
    """Apply a recipe as this user and follow it to its end; return what was printed."""
    command = user.start("kubernetes", "apply", RECIPE, *user.overrides(name, *SMALL), "--wait")
    try:
        assert command.end(600) == 0, command.text
        return command.text
    finally:
        here.dpo_ray("kubernetes", "delete", name, "--namespace", here.namespace)


def _user(here: RealCluster, directory: Path, name: str, rules: list[dict[str, Any]]) -> RealCluster:
    """Make a service account with these rights; return the cluster as its owner has it."""
    from kubernetes import client

    api, namespace = here.connection.client(), here.namespace
    core, access = client.CoreV1Api(api), client.RbacAuthorizationV1Api(api)
    core.create_namespaced_service_account(namespace, {"metadata": {"name": f"user-{name}"}})
    access.create_namespaced_role(namespace, {"metadata": {"name": f"user-{name}"}, "rules": rules})
    binding = {
        "metadata": {"name": f"user-{name}"},
        "subjects": [{"kind": "ServiceAccount", "name": f"user-{name}", "namespace": namespace}],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": f"user-{name}"},
    }
    access.create_namespaced_role_binding(namespace, binding)
    request = {"spec": {"expirationSeconds": 3600}}
    made: Any = core.create_namespaced_service_account_token(f"user-{name}", namespace, request)
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": _server(api.configuration)}],
        "users": [{"name": "u", "user": {"token": made.status.token}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
        "current-context": "c",
    }
    file = directory / "kubeconfig"
    file.write_text(yaml.safe_dump(config))
    return RealCluster(here.connection, namespace, here.image, directory, {"KUBECONFIG": str(file)})


def _server(configuration: Any) -> dict[str, str]:
    authority = {"certificate-authority": configuration.ssl_ca_cert} if configuration.ssl_ca_cert else {}
    return {"server": configuration.host} | authority
