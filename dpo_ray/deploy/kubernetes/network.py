"""The ports that pods of a run may use, besides DNS, to connect to servers outside of the run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from urllib.parse import urlsplit

from dpo_ray.config.judge import RewardModelJudge
from dpo_ray.config.model import is_hub_name
from dpo_ray.config.recipe import Recipe
from dpo_ray.deploy.shared_paths import named_places

HTTPS_PORT, HTTP_PORT = 443, 80
API_SERVER_PORTS = (443, 6443)  # of its service, and of the API server itself, which some networks see instead
OBJECT_STORES = ("s3", "gs", "hf")


def egress_ports(recipe: Recipe) -> list[int]:
    """Return the allowed ports: the judges' ports, and the ports in the recipe (default: the ports that the run needs).

    A run needs the hub's port if it reads a model or data there, the port of each object store and URL that it uses, and the
    ports of the Kubernetes API server if the cluster scales by itself.
    """
    chosen = recipe.cluster.kubernetes.network.egress_ports
    return sorted({*(_needed(recipe) if chosen is None else chosen), *judge_ports(recipe)})


def judge_ports(recipe: Recipe) -> set[int]:
    """Return the ports of the endpoints that the recipe's judges call."""
    judges = recipe.online.judges() if recipe.online is not None else []
    return {_port(url) for judge in judges for url in judge.urls()}


def _needed(recipe: Recipe) -> Iterator[int]:
    if recipe.cluster.kubernetes.autoscaling:
        yield from API_SERVER_PORTS
    if _uses_hub(recipe):
        yield HTTPS_PORT
    for section, key, _ in named_places(recipe.model_dump(mode="json", exclude_none=True)):
        place = section[key]
        for path in place if isinstance(place, list) else [place]:
            if urlsplit(path).scheme in (*OBJECT_STORES, "http", "https"):
                yield _port(path)


def _uses_hub(recipe: Recipe) -> bool:
    """Return whether the policy, a reward model or a data source is downloaded from the Hugging Face hub."""
    online = recipe.online
    judges = [] if online is None else online.judges()
    models = [recipe.model.path, *(judge.path for judge in judges if isinstance(judge, RewardModelJudge))]
    prompts = () if online is None or online.prompts is None else online.prompts
    sources = itertools.chain(recipe.data.train, *recipe.data.eval_sets.values(), prompts)
    return any(map(is_hub_name, models)) or any(source.type == "hub" for source in sources)


def _port(url: str) -> int:
    parts = urlsplit(url)
    if parts.scheme in OBJECT_STORES:
        return HTTPS_PORT
    return parts.port or (HTTPS_PORT if parts.scheme == "https" else HTTP_PORT)
