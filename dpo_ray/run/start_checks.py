"""Checks of what stages need to run: packages, CPUs, GPUs, memory, disk space, and valid first rows of the data.

`validate` makes these checks for all stages, `plan` and `run` for the stages that are not done. The nodes of a cluster
are checked after the connection to it (`cluster/placement.py`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

import torch

from dpo_ray.artifacts.places import run_storage
from dpo_ray.cluster.requests import local_memory_bytes, missing_here
from dpo_ray.config.model import is_hub_name
from dpo_ray.config.objective import uses_reference
from dpo_ray.config.recipe import Recipe
from dpo_ray.config.train import STATE_BYTES
from dpo_ray.data.first_pass import PrepareTask
from dpo_ray.data.first_rows import check_admitted, first_rows
from dpo_ray.errors import ConfigError, SetupError
from dpo_ray.models.load import model_directory
from dpo_ray.schedule.usable import check_first_groups

from .planning import stages_of
from .preflight import Checked, hardware, nearest_existing

BITSANDBYTES = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit")  # optimizers that use its kernels
PROCESS_BYTES = 256 << 20  # what a process that has imported torch takes at least
FLOAT32_BYTES = 4
VALUE_BYTES = {"float32": 4, "bfloat16": 2}


def check_start(recipe: Recipe, checked: Checked, stages: Collection[str] | None = None) -> None:
    """Check what `stages` need to run. Default: all stages of the recipe.

    Raises:
        ConfigError, DataError, SetupError: the first problem that is found.
    """
    wanted = stages_of(recipe) if stages is None else stages
    if not wanted:
        return
    if recipe.ray.address == "local":
        check_packages(recipe)
        _check_processes(recipe)
        _check_room(recipe, wanted)
        if "train" in wanted:
            _check_free_space(recipe, checked)
    if "prepare" in wanted and not is_hub_name(recipe.model.path):
        _check_first_rows(recipe, checked)


def check_packages(recipe: Recipe) -> None:
    """Check that the optional packages that this recipe needs are installed.

    Raises:
        SetupError: a package is not installed; the message names it.
    """
    scores = uses_reference(recipe.train.objective) and recipe.reference.engine == "vllm"
    if (scores or recipe.evaluate.sample_prompts or recipe.online) and find_spec("vllm") is None:
        raise SetupError(
            "vLLM is not installed",
            where="reference.engine, evaluate.sample_prompts",
            fix="pip install 'dpo-ray[cpu]' or 'dpo-ray[gpu]'; or set reference.engine=trainer and evaluate.sample_prompts=0",
        )
    by_bitsandbytes = recipe.train.quantization or recipe.train.optimizer.type in BITSANDBYTES
    if by_bitsandbytes and find_spec("bitsandbytes") is None:
        raise SetupError(
            "bitsandbytes is not installed",
            where=f"train.optimizer.type={recipe.train.optimizer.type}, train.quantization={recipe.train.quantization}",
            fix="pip install 'dpo-ray[quantized]'; or use another optimizer and no quantization",
        )


def _check_processes(recipe: Recipe) -> None:
    """Raise ConfigError if the recipe requests more processes than fit in this machine's memory with a tiny model."""
    judge = recipe.cluster.roles.judge.count or 0
    most = local_memory_bytes() // PROCESS_BYTES
    for field, count in {
        "train.workers": recipe.train.workers,
        "reference.replicas": recipe.reference.replicas,
        "cluster.roles.judge.count": judge if recipe.online is not None else 0,
    }.items():
        if count > most:
            raise ConfigError(
                f"{count:,} processes do not fit in the memory of this machine, which holds at most {most:,}",
                where=f"{field}={count}",
                fix="lower this number, or name a cluster in ray.address",
            )


def _check_room(recipe: Recipe, stages: Collection[str]) -> None:
    where = hardware(recipe)
    lacks = missing_here(recipe, stages, where.worker.gpus, where.engine.gpus, torch.cuda.device_count())
    if lacks:
        raise ConfigError(
            "this machine can never hold what the recipe requests: " + "; ".join(lack.what for lack in lacks),
            where=", ".join(dict.fromkeys(lack.field for lack in lacks)),
            fix="lower the cpus, gpus or memory_gib in these sections; or name a cluster in ray.address",
        )


def _check_free_space(recipe: Recipe, checked: Checked) -> None:
    """Raise SetupError if one checkpoint and the policy do not fit on the disk of the output."""
    if checked.parameters is None or checked.trained is None:
        return
    t, place = recipe.train, run_storage(recipe)
    alone = t.lora is not None and not t.lora.merge
    policy = FLOAT32_BYTES * checked.trained if alone else VALUE_BYTES[hardware(recipe).dtype] * checked.parameters
    checkpoint = round((FLOAT32_BYTES + STATE_BYTES[t.optimizer.type]) * checked.trained)
    if place.is_local:
        _require_free(nearest_existing(place.local_path()), checkpoint + policy, f"output={recipe.output}")
    _require_free(Path(tempfile.gettempdir()), policy, "TMPDIR")  # where the policy is written before it is committed


def _require_free(directory: Path, needed_bytes: int, where: str) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise SetupError(
            f"a checkpoint and the policy take {needed_bytes / 1e9:,.1f} GB, and `{directory}` has {free / 1e9:,.1f} GB free",
            where=where,
            fix="free space there, or choose another disk",
        )


def _check_first_rows(recipe: Recipe, checked: Checked) -> None:
    """Render and tokenize the first rows of each source, to find a wrong chat template or data format at once."""
    task = PrepareTask(str(model_directory(recipe.model)), checked.template, recipe.data, checked.filters)
    found = list(first_rows(checked.shards, task))
    check_admitted(found, recipe.data.max_quarantined_fraction)
    for source in found:
        check_first_groups(source.split, source.groups, recipe.train.objective)
