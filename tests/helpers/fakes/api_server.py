"""An API server of Kubernetes in miniature: it keeps what is applied, plays a RayJob's states, and runs commands of pods."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .pod_commands import run_command

KINDS = {  # group and version -> plural: kind
    "v1": {
        "serviceaccounts": "ServiceAccount",
        "configmaps": "ConfigMap",
        "persistentvolumeclaims": "PersistentVolumeClaim",
        "pods": "Pod",
        "events": "Event",
    },
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "ray.io/v1": {"rayjobs": "RayJob", "rayclusters": "RayCluster"},
    "kueue.x-k8s.io/v1beta1": {"workloads": "Workload"},
}


class Server:
    """What is stored, by kind and name; what was asked; what the RayJob's status will be; what goes wrong."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.requests: list[tuple[str, str]] = []
        self.states: list[dict[str, Any]] = []
        self.refuse: tuple[int, str] | None = None  # of what is applied
        self.forbidden: set[str] = set()  # plurals that must not be read
        self.kinds = dict(KINDS)
        self.steps: list[Callable[[Server], None]] = []  # what happens at each question about a RayJob
        self.failures: list[int] = []  # the next answers; 0: the connection is cut
        self.token: str | None = None  # the only login that is accepted
        self.cascades = True  # the pods of a RayJob are deleted with it
        self.phase = "Running"  # of pods that are created
        self.pod_root: Path | None = None  # stands for the root directory of every pod

    def answer(self, method: str, target: str, body: Any) -> tuple[int, Any]:
        url = urlsplit(target)
        parts = [unquote(p) for p in url.path.split("/") if p]
        self.requests.append((method, url.path))
        version = "/".join(parts[1 : parts.index("namespaces")])
        plural, *rest = parts[parts.index("namespaces") + 2 :]
        if plural not in self.kinds.get(version, {}):
            return 404, "404 page not found\n"
        kind = self.kinds[version][plural]
        if method == "GET" and plural in self.forbidden:
            return 403, _status(403, f"{plural} is forbidden")
        if method == "POST":
            body.setdefault("status", {"phase": self.phase} if kind == "Pod" else {})
            return 201, self.objects.setdefault((kind, body["metadata"]["name"]), body)
        if not rest:
            return 200, {"kind": f"{kind}List", "items": self._listed(kind, parse_qs(url.query))}
        return self._one(method, (kind, rest[0]), plural, body)

    def _one(self, method: str, key: tuple[str, str], plural: str, body: Any) -> tuple[int, Any]:
        if method == "PATCH":
            if self.refuse is not None:
                return self.refuse[0], _status(*self.refuse)
            known = self.objects.get(key)
            self.objects[key] = _merged(known, body) if known and "apiVersion" not in body else body
            return 200, self.objects[key]
        if key[0] == "RayJob" and method == "GET" and self.steps:
            self.steps.pop(0)(self)
        if key not in self.objects:
            return 404, _status(404, f"{plural} {key[1]!r} not found")
        if method == "DELETE":
            if key[0] == "RayJob" and self.cascades:
                for pod in self._listed("Pod", {"labelSelector": [f"dpo-ray/run={key[1]}"]}):
                    del self.objects["Pod", pod["metadata"]["name"]]
            return 200, self.objects.pop(key)
        found = dict(self.objects[key])
        if key[0] == "RayJob" and self.states:
            found["status"] = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return 200, found

    def _listed(self, kind: str, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        labels = dict(
            pair.split("=") for text in query.get("labelSelector", []) for pair in text.split(",") if "=" in pair
        )
        fields = dict(pair.split("=") for text in query.get("fieldSelector", []) for pair in text.split(","))
        objects = [o for (k, _), o in list(self.objects.items()) if k == kind]
        return [o for o in objects if labels.items() <= (o["metadata"].get("labels") or {}).items() and _has(o, fields)]


def _has(found: dict[str, Any], fields: dict[str, str]) -> bool:
    for path, value in fields.items():
        part: Any = found
        for name in path.split("."):
            part = part.get(name, {})
        if part != value:
            return False
    return True


def _merged(known: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    parts = {k: _merged(known.get(k) or {}, v) if isinstance(v, dict) else v for k, v in change.items()}
    return known | parts


def _status(code: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}


def write_kubeconfig(file: Path, port: int, token: str | None = None) -> None:
    """Write a kubeconfig for a server on this machine, with a login if there is one."""
    user = {"token": token} if token else {}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "made",
        "contexts": [{"name": "made", "context": {"cluster": "made", "user": "made", "namespace": "lab"}}],
        "clusters": [{"name": "made", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "made", "user": user}],
    }
    file.write_text(yaml.safe_dump(content))


@contextmanager
def api_server(kubeconfig: Path) -> Iterator[Server]:
    """Serve on a port of its own, which `kubeconfig` then names."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self) -> None:
            failure = state.failures.pop(0) if state.failures else None
            if failure == 0:
                self.close_connection = True
                self.connection.close()
                return
            length = int(self.headers.get("Content-Length") or 0)
            body = yaml.safe_load(self.rfile.read(length)) if length else None
            if state.token is not None and self.headers.get("Authorization") != f"Bearer {state.token}":
                failure = 401
            if failure is not None:
                self._send(failure, _status(failure, "not now"))
            elif "/exec?" in self.path:
                self._exec()
            else:
                self._send(*state.answer(self.command, self.path, body))

        def _exec(self) -> None:
            url = urlsplit(self.path)
            pod = url.path.split("/")[-2]
            state.requests.append(("EXEC", url.path))
            if "exec" in state.forbidden or ("Pod", pod) not in state.objects:
                code, words = (403, "pods/exec is forbidden") if "exec" in state.forbidden else (404, "no such pod")
                self._send(code, _status(code, words))
                return
            self.close_connection = True
            run_command(self, parse_qs(url.query), state.pod_root)

        def _send(self, code: int, content: Any) -> None:
            text = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PATCH = do_DELETE = do_POST = _reply

        def log_message(self, format: str, *args: Any) -> None:
            """Write no log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    write_kubeconfig(kubeconfig, server.server_port)
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
