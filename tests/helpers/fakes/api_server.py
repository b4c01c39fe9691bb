"""An API server of Kubernetes in miniature: it keeps what is applied, and plays a RayJob's states one a question."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

KINDS = {  # group and version -> plural: kind
    "v1": {
        "serviceaccounts": "ServiceAccount",
        "configmaps": "ConfigMap",
        "persistentvolumeclaims": "PersistentVolumeClaim",
    },
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "ray.io/v1": {"rayjobs": "RayJob", "rayclusters": "RayCluster"},
}


class Server:
    """What is stored, by kind and name; what was asked; what the RayJob's status will be."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.requests: list[tuple[str, str]] = []
        self.states: list[dict[str, Any]] = []
        self.refuse: tuple[int, str] | None = None  # of what is applied
        self.kinds = dict(KINDS)

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        parts = [p for p in path.partition("?")[0].split("/") if p]
        if "namespaces" not in parts:
            return self._discovery(parts)
        self.requests.append((method, path.partition("?")[0]))
        version = "/".join(parts[1 : parts.index("namespaces")])
        plural, name = parts[parts.index("namespaces") + 2 :]
        key = (self.kinds[version][plural], name)
        if method == "PATCH":
            if self.refuse is not None:
                return self.refuse[0], _status(*self.refuse)
            self.objects[key] = body
            return 200, body
        if key not in self.objects:
            return 404, _status(404, f"{plural} {name!r} not found")
        if method == "DELETE":
            return 200, self.objects.pop(key)
        found = dict(self.objects[key])
        if key[0] == "RayJob" and self.states:
            found["status"] = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return 200, found

    def _discovery(self, parts: list[str]) -> tuple[int, Any]:
        if parts == ["version"]:
            return 200, {"major": "1", "minor": "34"}
        if parts == ["api"]:
            return 200, {"kind": "APIVersions", "versions": ["v1"]}
        if parts == ["apis"]:
            groups = [v.split("/") for v in self.kinds if "/" in v]
            versions = [(g, {"groupVersion": f"{g}/{v}", "version": v}) for g, v in groups]
            listed = [{"name": g, "versions": [v], "preferredVersion": v} for g, v in versions]
            return 200, {"kind": "APIGroupList", "groups": listed}
        version = "/".join(parts[1:])
        resources = [
            {"name": plural, "singularName": "", "namespaced": True, "kind": kind, "verbs": ["get", "patch", "delete"]}
            for plural, kind in self.kinds.get(version, {}).items()
        ]
        return 200, {"kind": "APIResourceList", "groupVersion": version, "resources": resources}


def _status(code: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}


@contextmanager
def api_server(kubeconfig: Path) -> Iterator[Server]:
    """Serve on a port of its own, which `kubeconfig` then names."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = yaml.safe_load(self.rfile.read(length)) if length else None
            code, content = state.answer(self.command, self.path, body)
            text = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PATCH = do_DELETE = _reply

        def log_message(self, format: str, *args: Any) -> None:
            """Write no log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kubeconfig.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "made",
                "contexts": [{"name": "made", "context": {"cluster": "made", "user": "made"}}],
                "clusters": [{"name": "made", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
                "users": [{"name": "made", "user": {}}],
            }
        )
    )
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
