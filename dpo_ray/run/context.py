"""The context of a run: what its stages share while the driver holds the run's lease, and how a run is opened."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.lease import Lease
from dpo_ray.artifacts.places import artifact_store, reference_root, run_storage
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.cluster.pod import pod_name
from dpo_ray.cluster.ray_metrics import RayExporter
from dpo_ray.cluster.session import session
from dpo_ray.config.model import ModelConfig
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import ArtifactError, StoppedError
from dpo_ray.models.adapter import CONFIG as ADAPTER_CONFIG
from dpo_ray.models.adapter import adapter_directory
from dpo_ray.models.load import model_directory, model_identity
from dpo_ray.observe.metrics import LEASE_HELD, LEASE_TOKEN, OUTPUT_FREE, OUTPUT_SIZE, RUN_FAILURES
from dpo_ray.observe.progress import Reporter
from dpo_ray.observe.recorder import count, record, recording
from dpo_ray.reference.completions import EngineModel
from dpo_ray.reference.scorer import ScorerSettings
from dpo_ray.reference.store.store import ReferenceStore

from . import planning
from .job import driver_job
from .planning import Plan
from .redact import without_secrets


@dataclass(frozen=True)
class RunContext:
    """What the stages of a run share while the driver holds the run's lease and is connected to Ray.

    Each round of an online run has its own context.
    """

    plan: Plan
    reporter: Reporter
    lease: Lease

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def directory(self) -> Storage:
        """Return the directory of the run, with its recipe, metrics, checkpoints and pages."""
        return run_storage(self.recipe)

    @property
    def artifacts(self) -> ArtifactStore:
        return artifact_store(self.recipe)

    @cached_property
    def model_directory(self) -> Path:
        return model_directory(self.recipe.model)

    @cached_property
    def adapter_directory(self) -> Path | None:
        return adapter_directory(self.recipe.model)

    @cached_property
    def reference_store(self) -> ReferenceStore:
        """Open the stored log-probs of this run's model, as computed with this run's engine, data type and device."""
        return ReferenceStore(reference_root(self.recipe), self.plan.model_digest, self.plan.numerics)

    def find(self, stage: str) -> Artifact | None:
        """Return a stage's committed artifact, or None if there is none that may be used (see `planning.found`)."""
        return planning.found(self.plan, stage)

    def begin(self, stage: str) -> Staging:
        """Begin to write the artifact of a stage, under the stage's key in the plan.

        Raises:
            LeaseError: another driver has taken over the run.
        """
        return self.begin_key(stage, self.plan.stages[stage].key)

    def begin_key(self, stage: str, key: str) -> Staging:
        """Begin to write an artifact under a key that need not be in the plan.

        Raises:
            LeaseError: another driver has taken over the run.
        """
        self.lease.check()
        return self.artifacts.begin(stage, key, self.recipe.name)

    def provenance(self, stage: str) -> Provenance:
        """Return what a stage's artifact records about its making: version, inputs and configuration, from the plan."""
        planned = self.plan.stages[stage]
        return self.provenance_of(planning.VERSIONS[stage], planned.inputs, planned.config)

    def provenance_of(self, version: int, inputs: dict[str, str], config: dict[str, Any]) -> Provenance:
        """Return the provenance of an artifact of this run. Its commit first checks that the run's lease is held."""
        return Provenance(version, inputs, config, planning.versions(), self.lease.check)

    def scorer_settings(self, extra_tokens: int = 0) -> ScorerSettings:
        """Return the settings of an engine (or trainer) that computes log-probs with the reference model.

        Args:
            extra_tokens: by how many tokens a sequence may be longer than `data.max_length_tokens`, for sampling.
        """
        reference, hardware, adapter = self.recipe.reference, self.plan.hardware, self.adapter_directory
        return ScorerSettings(
            engine=reference.engine,
            model_dir=str(self.model_directory),
            dtype=hardware.dtype,
            device=hardware.device,
            max_length_tokens=self.recipe.data.max_length_tokens + extra_tokens,
            max_batched_tokens=reference.max_batched_tokens,
            gpu_memory_fraction=reference.gpu_memory_fraction,
            share_prompt=reference.share_prompt,
            tensor_parallel=reference.tensor_parallel,
            adapter_dir=str(adapter) if adapter else None,
        )

    def reference_model(self, extra_tokens: int = 0) -> EngineModel:
        """Return the reference model in the form that vLLM's engines load, to sample and to compute log-probs."""
        store = self.reference_store
        if (
            store.numerics.engine != "vllm"
        ):  # the trainer computes the reference: vLLM's log-probs are stored separately
            numerics = replace(store.numerics, engine="vllm", version=planning.engine_version("vllm"))
            store = replace(store, numerics=numerics)
        return EngineModel(self.scorer_settings(extra_tokens=extra_tokens), store)

    def policy_model(self, trained: Artifact, extra_tokens: int = 0) -> EngineModel:
        """Return the policy in an artifact of the stage `train`, in the form that vLLM's engines load."""
        reference, directory = self.reference_model(extra_tokens), policy_directory(trained)
        if is_adapter(trained):  # it belongs to the recipe's model, which is the engines' base model
            settings = replace(reference.settings, adapter_dir=str(directory))
            model = self.recipe.model.model_copy(update={"adapter": str(directory)})
        else:
            settings = replace(reference.settings, model_dir=str(directory), adapter_dir=None)
            model = ModelConfig(path=str(directory))
        return EngineModel(settings, replace(reference.store, model_digest=model_identity(model)))


@contextmanager
def open_run(recipe: Recipe, plan: Plan, reporter: Reporter, *, verbose: bool) -> Iterator[RunContext]:
    """Open a run for the `with` block: acquire its lease, connect to Ray, and delete what previous attempts left.

    The metrics of the run are exported meanwhile.

    Raises:
        LeaseError: another driver holds the lease.
        InfrastructureError: Ray does not answer, or the output cannot be written.
    """
    directory = run_storage(recipe)
    directory.check_writable()
    job = driver_job()
    rayjob = job.rayjob if job is not None else ""
    held = Lease(directory, job=rayjob, pod=pod_name(), say=lambda line: reporter.say(escape(line)))
    with (
        held as lease,
        session(recipe, verbose=verbose),
        recording(recipe.name, RayExporter(), partial(_look, lease, directory)),
        _counted_failure(),
        lost_files_named(recipe.output),
    ):
        artifact_store(recipe).sweep(recipe.name)
        yield RunContext(plan, reporter, lease)


def _look(lease: Lease, directory: Storage) -> None:
    """Record what nobody reports: whether the lease is held, and the free space of the output."""
    record(LEASE_HELD, not lease.lost)
    record(LEASE_TOKEN, lease.token)
    if directory.is_local:
        with suppress(OSError):
            usage = shutil.disk_usage(directory.local_path())
            record(OUTPUT_FREE, usage.free)
            record(OUTPUT_SIZE, usage.total)


@contextmanager
def _counted_failure() -> Iterator[None]:
    """Count an error that ends the run, by its kind. A stop that was asked for is no failure."""
    try:
        yield
    except StoppedError:
        raise
    except Exception as error:
        count(RUN_FAILURES, error=type(error).__name__)
        raise


@contextmanager
def lost_files_named(output: str) -> Iterator[None]:
    """Turn a FileNotFoundError for a file below the output directory into an ArtifactError that says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        name = str(error.filename or "")
        if not Path(name).is_relative_to(Path(output).absolute()):
            raise
        fix = "if its disk was unmounted, mount it again; then run the same command again, which makes again what is missing"
        raise ArtifactError("a file of this run is gone", where=name, fix=fix) from error


def record_recipe(run: RunContext, recipe: Recipe) -> None:
    """Write the recipe into the run's directory. Only runs that train do this, not `dpo-ray inspect data`."""
    run.directory.write("recipe.yaml", recipe_yaml(recipe).encode())


def recipe_yaml(recipe: Recipe) -> str:
    """Return the recipe with all its values as YAML for people. Passwords and signatures in URLs are removed."""
    return yaml.safe_dump(_without_secrets(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {_without_secrets(k): _without_secrets(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_secrets(v) for v in value]
    return without_secrets(value) if isinstance(value, str) else value


def policy_directory(trained: Artifact) -> Path:
    """Return a local directory with the policy in an artifact. From an object store, the policy is copied first."""
    cache = Path.home() / ".cache" / "dpo_ray" / "artifacts" / f"{trained.stage}-{trained.key}"
    return trained.local_dir("policy", cache)


def is_adapter(trained: Artifact) -> bool:
    """Return whether the policy in an artifact is only a LoRA adapter, without the model's weights."""
    return f"policy/{ADAPTER_CONFIG}" in trained.names()
