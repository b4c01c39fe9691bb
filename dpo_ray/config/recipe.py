"""The recipe, with all its sections: everything that a run depends on."""

from __future__ import annotations

import re
from math import ceil
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from .base import StrictModel, field_error
from .cluster import ClusterConfig
from .data import DataConfig
from .evaluate import EvaluateConfig
from .extension import TRACKERS, installed_names
from .judge import VerifierJudge
from .model import ModelConfig
from .objective import kinds_of_groups, uses_reference
from .online import OnlineConfig
from .reference import ReferenceConfig
from .train import TrainConfig

if TYPE_CHECKING:
    TrackerName = str
else:
    TrackerName = Literal[("tensorboard", *installed_names(TRACKERS, ("tensorboard",)))]

RESERVED_NAMES = ("artifacts", "reference-store", "judgements")


class RayConfig(StrictModel):
    """The Ray cluster on which the work runs."""

    address: str = "local"
    """local: start a new Ray cluster on this machine. auto: use the running cluster of which this machine is a node.
    HOST:PORT: use the running cluster at this address."""

    @field_validator("address")
    @classmethod
    def _is_an_address(cls, address: str) -> str:
        if address not in ("local", "auto") and not re.fullmatch(r"[^\s/]+:\d+", address):
            raise ValueError(f"local, auto or HOST:PORT is expected; got {address!r}")
        return address

    cpus: int | None = Field(default=None, gt=0)
    """Only for address=local: CPUs that Ray may use. Default: the cores of this machine, but at least as many as the recipe
    requests."""


class Recipe(StrictModel):
    """One run, from preference data to an aligned policy."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    """Name of the run; its directory is OUTPUT/NAME."""

    output: str = Field(default="runs", min_length=1)
    """A directory or a URI (s3://bucket/prefix, gs://...). Runs with the same output share finished artifacts."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    model: ModelConfig
    data: DataConfig
    reference: ReferenceConfig = ReferenceConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    online: OnlineConfig | None = None
    """Rounds of sampling, judging, pairing and training, instead of one training on data.train."""

    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """The tools that also receive the metrics. The file metrics.jsonl is always written."""

    ray: RayConfig = RayConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _fields_agree(self) -> Recipe:
        if self.name in RESERVED_NAMES:
            raise field_error(
                "name", f"`{self.name}` is the name of a directory that all runs share: choose another name"
            )
        if not self.data.eval and "sample_prompts" not in self.evaluate.model_fields_set:
            # There are no prompts. A frozen model can be completed only like this, and only while it is validated.
            object.__setattr__(self, "evaluate", self.evaluate.model_copy(update={"sample_prompts": 0}))
        if self.train.eval_every_steps is not None and not self.data.eval:
            raise field_error(
                "train.eval_every_steps",
                "there is no held-out data: set data.eval, or leave out train.eval_every_steps",
            )
        parallel, engine_gpus = self.reference.tensor_parallel, self.cluster.roles.reference.gpus
        if engine_gpus and engine_gpus < parallel:
            raise field_error(
                "cluster.roles.reference.gpus", f"{engine_gpus:g} is less than reference.tensor_parallel={parallel}"
            )
        if self.model.adapter is not None and self.train.lora is not None and not self.train.lora.merge:
            raise field_error(
                "train.lora.merge",
                "an adapter that is trained on top of model.adapter cannot be exported alone: set merge to true",
            )
        if self.train.quantization and uses_reference(self.train.objective) and self.reference.engine != "trainer":
            raise field_error(
                "reference.engine",
                "with train.quantization the reference is the quantized model, which vllm cannot run: set engine to "
                "trainer",
            )
        if self.online is not None:
            self._check_online(self.online)
        if self.ray.cpus is not None and self.ray.address == "local" and self.ray.cpus < self.cpus_needed():
            raise field_error(
                "ray.cpus",
                f"{self.ray.cpus} CPUs are fewer than the recipe requests at the same time: set at least {self.cpus_needed()}",
            )
        return self

    def _check_online(self, online: OnlineConfig) -> None:
        if not self.data.eval:
            raise field_error(
                "data.eval", "rounds are evaluated on held-out prompts, and there are none: set data.eval"
            )
        if self.reference.engine != "vllm":
            raise field_error(
                "reference.engine", "rounds need vllm: the engines that sample also compute the reference's log-probs"
            )
        if self.reference.mode != "ahead":
            raise field_error(
                "reference.mode",
                "streaming is not possible, as a round trains only when all its pairs are known: set mode to ahead",
            )
        if self.reference.audit.on_drift == "use_trainer":
            raise field_error(
                "reference.audit.on_drift", "rounds need the log-probs of the engines: set on_drift to stop or warn"
            )
        if self.train.quantization is not None:
            raise field_error(
                "train.quantization", "engines cannot sample from a quantized model: leave out train.quantization"
            )
        if online.prompts is None and isinstance(online.judge, VerifierJudge):
            raise field_error(
                "online.prompts",
                "a verifier needs reference answers, which data.train does not have: set online.prompts",
            )
        kinds = kinds_of_groups(self.train.objective)
        if online.pairing.pairs == "list" and kinds != {"lists"}:
            what = (
                f"the objective {self.train.objective.type} learns from {' and '.join(sorted(kinds))}, not from lists"
            )
            raise field_error("online.pairing.pairs", f"{what}: choose another value, or the objective listwise")
        if online.reference == "ema" and self.train.lora is not None and not self.train.lora.merge:
            raise field_error(
                "online.reference",
                "ema needs merged weights, because a mean of adapters is not an adapter: set train.lora.merge=true, or "
                "online.reference to initial or previous",
            )
        if online.optimizer == "carry" and self.train.optimizer.type not in ("adamw", "rmsprop"):
            raise field_error(
                "online.optimizer",
                "only the moments of adamw and rmsprop can be carried over: set optimizer to restart",
            )

    def cpus_needed(self) -> int:
        """Return the largest number of CPUs that the recipe requests from Ray at the same time."""
        return self._cpus(self.train.workers)

    def least_cpus(self) -> int:
        """Return how many CPUs the recipe requests if training runs with the fewest workers (`train.min_workers`).

        If Ray has fewer CPUs than that, the run would wait for CPUs forever.
        """
        return self._cpus(self.train.min_workers or self.train.workers)

    def _cpus(self, workers: int) -> int:
        roles = self.cluster.roles
        training = workers * roles.train.cpus
        reading = max(1, roles.prepare.cpus)  # one task that reads data
        by_trainer = training + reading
        engines = self.reference.replicas * roles.reference.cpus
        by_engines = engines + reading
        scoring = by_trainer if self.reference.engine == "trainer" else by_engines
        if self.reference.audit.on_drift == "use_trainer":
            scoring = max(scoring, by_trainer)
        if self.reference.mode == "streaming":
            training += scoring  # both run concurrently
        if self.online is not None:  # engines and judges keep running while the policy trains or a task reads data
            return ceil(engines + self.online.judges_cpus(roles.judge) + max(training, reading))
        sampling = roles.sample.cpus or roles.reference.cpus
        return ceil(max(scoring, training, sampling, reading, 2))
