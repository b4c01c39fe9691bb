"""The root of a recipe: everything that a run depends on."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from .base import StrictModel, field_error
from .cluster import ClusterConfig
from .data import DataConfig
from .evaluate import EvaluateConfig
from .extension import TRACKERS, installed_names
from .model import ModelConfig
from .objective import kinds_of_groups, uses_reference
from .online import OnlineConfig
from .reference import ReferenceConfig
from .roles import placed
from .train import TrainConfig

if TYPE_CHECKING:
    TrackerName = str
else:
    TrackerName = Literal[("tensorboard", *installed_names(TRACKERS))]

RESERVED_NAMES = ("artifacts", "reference-store", "judgements")


class RayConfig(StrictModel):
    """Where the work runs."""

    address: str = "local"
    """local: a Ray of its own on this machine. Otherwise the address of a running cluster, or `auto` inside one."""

    cpus: int | None = Field(default=None, gt=0)
    """Local only: CPUs that Ray may use; default: the cores of this machine, at least what the recipe asks for."""


class Recipe(StrictModel):
    """One run, from preference data to an aligned policy."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    """The run: its directory is OUTPUT/NAME."""

    output: str = Field(default="runs", min_length=1)
    """A directory or a URI (s3://bucket/prefix, gs://...). Runs under one output share finished artifacts."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    model: ModelConfig
    data: DataConfig
    reference: ReferenceConfig = ReferenceConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    online: OnlineConfig | None = None
    """Rounds of sampling, judging, pairing and training, in place of one training on data.train."""

    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Besides metrics.jsonl, which is always written."""

    ray: RayConfig = RayConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _roles_are_placed(cls, values: Any) -> Any:
        return placed(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _fields_agree(self) -> Recipe:
        if self.name in RESERVED_NAMES:
            raise field_error("name", f"`{self.name}` is the name of a directory that runs share; choose another")
        if self.train.eval_every_steps is not None and not self.data.eval:
            raise field_error(
                "train.eval_every_steps", "there is nothing to evaluate on; set data.eval or leave it out"
            )
        if self.model.adapter is not None and self.train.lora is not None and not self.train.lora.merge:
            raise field_error(
                "train.lora.merge",
                "an adapter of a model that has one itself (model.adapter) cannot stand alone: say true",
            )
        if self.train.quantization and uses_reference(self.train.objective) and self.reference.engine != "trainer":
            raise field_error(
                "reference.engine",
                "say trainer: with train.quantization the reference is the quantized model, and an engine would score another",
            )
        if self.online is not None:
            self._check_online(self.online)
        if self.ray.cpus is not None and self.ray.address == "local" and self.ray.cpus < self.cpus_needed():
            raise field_error(
                "ray.cpus",
                f"{self.ray.cpus} cannot hold what the recipe asks for at once: set at least {self.cpus_needed()}",
            )
        return self

    def _check_online(self, online: OnlineConfig) -> None:
        if not self.data.eval:
            raise field_error("data.eval", "rounds are measured on held-out prompts, and there are none; name some")
        if self.reference.engine != "vllm":
            raise field_error("reference.engine", "the engines that sample score as well: rounds need vllm")
        if self.reference.mode != "ahead":
            raise field_error("reference.mode", "a round's pairs are there before training begins: say ahead")
        if self.reference.audit.on_drift == "use_trainer":
            raise field_error("reference.audit.on_drift", "rounds need the engines' scores: say stop or warn")
        if self.train.quantization is not None:
            raise field_error("train.quantization", "engines do not sample from the quantized model; leave it out")
        kinds = kinds_of_groups(self.train.objective)
        if online.pairing.pairs == "list" and kinds != {"lists"}:
            what = (
                f"the objective {self.train.objective.type} learns from {' and '.join(sorted(kinds))}, not from lists"
            )
            raise field_error("online.pairing.pairs", f"{what}: choose another, or the objective listwise")
        if online.reference == "ema" and self.train.lora is not None and not self.train.lora.merge:
            raise field_error(
                "online.reference", "the mean of adapters is no adapter: set train.lora.merge, or another"
            )
        if online.optimizer == "carry" and self.train.optimizer.type not in ("adamw", "rmsprop"):
            raise field_error("online.optimizer", "only the moments of adamw and rmsprop are carried over: say restart")

    def cpus_needed(self) -> int:
        """Count the CPUs that the recipe's widest moment asks Ray for."""
        return self._cpus(self.train.workers)

    def least_cpus(self) -> int:
        """Count the CPUs without which the recipe would wait for ever: with as few workers as it may train with."""
        return self._cpus(self.train.min_workers or self.train.workers)

    def _cpus(self, workers: int) -> int:
        training = workers * self.train.cpus_per_worker
        by_trainer = training + 1  # and one task that reads
        by_engines = self.reference.replicas * self.reference.cpus_per_replica + 1
        scoring = by_trainer if self.reference.engine == "trainer" else by_engines
        if self.reference.audit.on_drift == "use_trainer":
            scoring = max(scoring, by_trainer)
        if self.reference.mode == "streaming":
            training += scoring  # side by side
        if self.online is not None:  # engines and judges live on while the policy trains, or a task reads
            living = self.reference.replicas * self.reference.cpus_per_replica + self.online.judges_cpus(
                self.cluster.roles.judge
            )
            return ceil(living + max(training, 1))
        sampling = self.cluster.roles.sample.cpus or self.reference.cpus_per_replica
        return ceil(max(scoring, training, sampling, 2))
