"""Records of reference log-probs that drift from the trainer's: how they are judged and stored, and who scores instead.

A measurement that was over its limits is committed as an artifact `audit`, so that later plans use it without measuring
again: with `on_drift: use_trainer` they plan with the trainer's own scores, from the first stage that uses them. The
record holds the measurement and not the verdict: a recipe with other limits, or another beta, judges it again.

A record applies to one committed reference, identified by its key and by the attempt that created it. So it is void
when data, model, engine, version, dtype or parallelism change, and when the reference artifact is deleted and created
again. A record that streaming wrote before the reference was committed identifies it by the key alone, since the commit
may come while training is already stopping. All records are void when the trainer's libraries change.
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
    """Compare a measurement with a recipe's limits, for its objective."""
    objective = recipe.train.objective
    return judge(measured, recipe.reference.audit, dtype, reward_beta(objective), is_per_token(objective))


def rule(recipe: Recipe, dtype: str) -> Callable[[Mapping[str, Any]], bool]:
    """Return the function that decides whether to train after a measurement. It pickles and is cheap to unpickle."""
    objective = recipe.train.objective
    return partial(goes_on, recipe.reference.audit, dtype, reward_beta(objective), is_per_token(objective))


def remember(
    store: ArtifactStore, reference_key: str, trainer: str, run: str, measured: dict[str, Any], versions: dict[str, str]
) -> None:
    """Commit a measurement that was over its limits, for later plans.

    Args:
        trainer: version of the forward pass with which the stored log-probs were compared.
        run: name of the run that measured.
    """
    config = {"trainer": trainer}
    inputs = {"reference": reference_key, "attempt": _attempt(store, reference_key)}
    key = artifact_key(STAGE, VERSION, {**config, "measured": measured}, inputs)
    provenance = Provenance(VERSION, inputs, config, versions)
    provenance.commit(store.begin(STAGE, key, run), [], rows={"groups": measured["groups"]}, figures=measured)


def remembered(store: ArtifactStore, reference_key: str, trainer: str, recipe: Recipe, dtype: str) -> Judgement | None:
    """Find a measurement of this reference that is over the recipe's limits; if there are several, any one of them."""
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
    """Return a copy of the recipe in which the trainer scores, ahead of training, instead of the recipe's engine."""
    reference = recipe.reference.model_copy(update={"engine": "trainer", "mode": "ahead", "tensor_parallel": 1})
    return recipe.model_copy(update={"reference": reference})
