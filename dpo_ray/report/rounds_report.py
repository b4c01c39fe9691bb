"""Building of the page of online rounds, and of their metrics, only from committed artifacts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.places import run_storage
from dpo_ray.online.round_plan import Round, Rounds, online_of
from dpo_ray.online.round_state import Done, state_of
from dpo_ray.run.context import recipe_yaml

from .rounds_page import RoundRow, RoundSample, RoundsPage, rounds_html

PAGE = "rounds.html"
SHOWN_SAMPLES = 6  # prompts whose completions are shown for all rounds


def rounds_page(rounds: Rounds) -> RoundsPage:
    """Gather from committed artifacts everything that the page of rounds shows."""
    recipe = rounds.plan.recipe
    measured = [r for r in rounds.rounds if "evaluate" in r.artifacts]
    created = [a.manifest.created_unix_seconds for r in rounds.rounds for a in r.artifacts.values()]
    online = online_of(recipe)
    return RoundsPage(
        name=recipe.name,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(max(created))) if created else "",
        what=f"{online.rounds} rounds of {recipe.train.objective.type} preference optimisation of {recipe.model.path}: "
        f"{online.prompts_per_round:,} prompts a round, {online.sampling.samples_per_prompt} completions each, "
        f"judged by {online.judge.type}; the reference is {online.reference}",
        rows=[_row(r, rounds) for r in rounds.rounds],
        initial={"kl": 0.0, **measured[0].artifacts["evaluate"].manifest.figures["initial"]} if measured else {},
        samples=_samples(measured),
        stopped=rounds.action.reason if isinstance(rounds.action, Done) else "",
        recipe_yaml=recipe_yaml(recipe),
    )


def write_page(rounds: Rounds) -> str:
    """Write rounds.html into the run's directory, unless it is up to date, and return its path."""
    place = run_storage(rounds.plan.recipe)
    page = rounds_html(rounds_page(rounds)).encode("utf-8", "replace")
    if not (place.exists(PAGE) and place.read_bytes(PAGE) == page):
        place.write(PAGE, page)
    return place.full_path(PAGE)


def figures(rounds: Rounds) -> dict[str, Any]:
    """Return the metrics for the last line that `dpo-ray run` prints for an online run."""
    decided = [r for r in rounds.rounds if r.committed.promoted is not None]
    best = rounds.promoted.artifact
    last = next((r for r in decided if r.trained.key == rounds.promoted.key), None)
    measured = last.artifacts["evaluate"].manifest.figures if last else {}
    return {
        "rounds": len(decided),
        "promoted": sum(bool(r.committed.promoted) for r in decided),
        "pairs": sum(r.artifacts["pair"].manifest.figures["pairs"] for r in decided),
        "true_reward": measured.get("true_reward"),
        "win_rate": measured["against_initial"]["rate"] if measured else None,
        "kl": measured.get("kl"),
        "report": run_storage(rounds.plan.recipe).full_path(PAGE),
        "policy": best.storage.full_path(best.entry("policy/README.md").path.rsplit("/", 1)[0]) if best else None,
    }


def _row(shown: Round, rounds: Rounds) -> RoundRow:
    artifacts: dict[str, Artifact] = {str(stage): artifact for stage, artifact in shown.artifacts.items()}
    paired, measured = (artifacts[s].manifest.figures if s in artifacts else {} for s in ("pair", "evaluate"))
    promoted = shown.committed.promoted
    numbers = {r.trained.key: r.number for r in rounds.rounds}
    return RoundRow(
        number=shown.number,
        state=str(state_of(shown.committed, shown.reference is not None)),
        decision="" if promoted is None else "promoted" if promoted else "rejected",
        reasons=tuple(artifacts["promote"].manifest.figures["reasons"]) if "promote" in artifacts else (),
        starts_from=numbers.get(shown.start.key),
        pairs=paired.get("pairs"),
        dropped=paired.get("dropped", {}),
        offline_pairs=paired.get("mixed", {}).get("offline", 0),
        earlier_pairs=paired.get("mixed", {}).get("earlier", 0),
        kl=measured.get("kl"),
        true_reward=measured.get("true_reward"),
        win_rate_initial=_interval(measured.get("against_initial")),
        win_rate_previous=_interval(measured.get("against_previous")),
        heldout_accuracy=measured.get("heldout", {}).get("rewards/accuracies"),
        mean_tokens=measured.get("mean_tokens"),
        distinct_2=measured.get("distinct_2"),
        entropy=measured.get("entropy"),
        truncated_fraction=measured.get("truncated_fraction"),
        seconds={stage: artifact.manifest.seconds for stage, artifact in artifacts.items()},
        tokens=_tokens(artifacts),
        judge_usage=_usage(artifacts),
    )


def _interval(rate: dict[str, Any] | None) -> tuple[float, float, float] | None:
    return None if rate is None or rate["rate"] is None else (rate["rate"], rate["low"], rate["high"])


def _tokens(found: dict[str, Artifact]) -> dict[str, int]:
    figures = {"sample": "tokens", "reference": "tokens", "train": "num_tokens"}
    return {s: int(found[s].manifest.figures[name]) for s, name in figures.items() if s in found}


def _usage(found: dict[str, Artifact]) -> dict[str, float]:
    """Return how much a round's judges were used in total, for judging and for the evaluation."""
    each = [found[s].manifest.figures["usage"] for s in ("judge", "evaluate") if s in found]
    return {name: sum(usage[name] for usage in each) for name in each[0]} if each else {}


def _samples(measured: Sequence[Round]) -> list[RoundSample]:
    """Return some held-out prompts, with the completions of the initial policy and of every round's policy."""
    rows = [[json.loads(x) for x in r.artifacts["evaluate"].read_bytes("samples.jsonl").splitlines()] for r in measured]
    return [
        RoundSample(
            first["prompt"],
            (
                (0, first["initial_completion"], first["initial_true_reward"]),
                *(
                    (r.number, own[i]["completion"], own[i]["true_reward"])
                    for r, own in zip(measured, rows, strict=True)
                ),
            ),
        )
        for i, first in enumerate(rows[0][:SHOWN_SAMPLES] if rows else [])
    ]
