"""Records of failed audits, so that later runs know that an engine's log-probs differ from the trainer's.

A measurement that is over its limits is committed as an artifact `audit` (the record). If a later plan with `on_drift:
use_trainer` finds a record, the trainer scores instead of the engine, and nothing is measured again. The record holds
the measurement and not the verdict, because other limits or another beta can lead to another verdict.

A record applies to one committed artifact `reference`, identified by its key and by the attempt that created it. So the
record no longer applies when data, model, engine, version, dtype or parallelism change, or when the artifact is deleted
and created again. With streaming, a record may be written before the artifact `reference` is committed. Such a record
names no attempt, and applies to every artifact `reference` with its key. No record applies after the trainer's libraries
have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from dpo_ray.artifacts.digest import artifact_key
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.config.objective import is_per_token, reward_beta
from dpo_ray.config.recipe import Recipe

from .audit_limits import Judgement, goes_on, judge

STAGE = "audit"
VERSION = 1
NOT_COMMITTED = ""  # stands for the attempt of a reference that is not committed


def judged(measured: Mapping[str, Any], recipe: Recipe, dtype: str) -> Judgement:
    """Compare a measurement of the audit with the recipe's limits, in the unit of the recipe's objective."""
    objective = recipe.train.objective
    return judge(measured, recipe.reference.audit, dtype, reward_beta(objective), is_per_token(objective))


def rule(recipe: Recipe, dtype: str) -> Callable[[Mapping[str, Any]], bool]:
    """Return a function that decides, from a measurement of the audit, whether training may start.

    The function can be pickled, and unpickling it imports no large library.
    """
    objective = recipe.train.objective
    return partial(goes_on, recipe.reference.audit, dtype, reward_beta(objective), is_per_token(objective))


def remember(
    store: ArtifactStore, reference_key: str, trainer: str, run: str, measured: dict[str, Any], versions: dict[str, str]
) -> None:
    """Commit the record of a measurement that was over its limits, so that later plans find it.

    Args:
        reference_key: key of the artifact `reference` that was measured.
        trainer: version of the trainer's forward pass, with which the stored log-probs were compared.
        run: name of the run that made the measurement.
        versions: version of each library, for the manifest.
    """
    config = {"trainer": trainer}
    inputs = {"reference": reference_key, "attempt": _attempt(store, reference_key)}
    key = artifact_key(STAGE, VERSION, {**config, "measured": measured}, inputs)
    provenance = Provenance(VERSION, inputs, config, versions)
    provenance.commit(store.begin(STAGE, key, run), [], rows={"groups": measured["groups"]}, figures=measured)


def remembered(store: ArtifactStore, reference_key: str, trainer: str, recipe: Recipe, dtype: str) -> Judgement | None:
    """Find a record for this reference whose measurement is over the recipe's limits; None if there is no such record.

    Return the comparison with the limits. If several records match, use any of them.
    """
    attempts = (NOT_COMMITTED, _attempt(store, reference_key))
    for m in store.manifests(STAGE):
        matches = (
            m.stage_version == VERSION and m.config == {"trainer": trainer} and m.inputs["reference"] == reference_key
        )
        if matches and m.inputs["attempt"] in attempts:
            judgement = judged(m.figures, recipe, dtype)
            if not judgement.passed:
                return judgement
    return None


def _attempt(store: ArtifactStore, reference_key: str) -> str:
    reference = store.find("reference", reference_key)
    return NOT_COMMITTED if reference is None else reference.manifest.attempt


def with_trainer(recipe: Recipe) -> Recipe:
    """Return a copy of the recipe in which the trainer computes all reference log-probs before training starts."""
    reference = recipe.reference.model_copy(update={"engine": "trainer", "mode": "ahead", "tensor_parallel": 1})
    return recipe.model_copy(update={"reference": reference})
