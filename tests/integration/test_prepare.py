"""The stage `prepare` on a real Ray: what a new shard costs, what stops a run, and every row accounted for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.places import artifact_store, run_storage
from dpo_ray.config.load import apply_overrides, validate_recipe
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import DataError
from dpo_ray.observe.progress import Reporter
from dpo_ray.run import offline
from dpo_ray.run.planning import make_plan
from tests.integration.conftest import small_recipe

pytestmark = pytest.mark.usefixtures("ray_cluster")


def write_rows(path: Path, numbers: range, bad: int = 0) -> str:
    rows = [json.dumps({"prompt": f"Say {i}.", "chosen": " good", "rejected": " bad"}) for i in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in [*rows, *["not JSON"] * bad]))
    return str(path)


def recipe(tmp_path: Path, train: str, *overrides: str) -> Recipe:
    return small_recipe(
        tmp_path / "out", f"data.train={train}", "data.eval=[]", "train.eval_every_steps=null", *overrides
    )


def shard_artifacts(made: Recipe) -> dict[str, float]:
    """Name the shards' artifacts with the time of their commit."""
    root = Path(artifact_store(made).root.local_path())
    return {p.name: (p / "manifest.json").stat().st_mtime_ns for p in root.glob("shard-*")}


def prepared(made: Recipe) -> Artifact:
    return offline.prepared(made, Reporter())[1]


def test_a_new_shard_is_tokenized_alone(tmp_path):
    for i in range(3):
        write_rows(tmp_path / f"data/{i}.jsonl", range(10 * i, 10 * i + 10))
    made = recipe(tmp_path, str(tmp_path / "data"))
    first = prepared(made)
    before = shard_artifacts(made)
    assert len(before) == 3
    write_rows(tmp_path / "data/3.jsonl", range(25, 40))  # five of its rows are known
    assert "1 of 4 shards to tokenize" in make_plan(made).stages["prepare"].reason
    second = prepared(made)
    after = shard_artifacts(made)
    assert {name: after[name] for name in before} == before
    assert len(after) == 4
    assert (first.manifest.rows["train/admitted"], second.manifest.rows["train/admitted"]) == (30, 40)
    assert second.manifest.rows["train/duplicates"] == 5


def test_rules_over_all_rows_cost_no_tokenization(tmp_path):
    made = recipe(tmp_path, write_rows(tmp_path / "a.jsonl", range(40)))
    prepared(made)
    before = shard_artifacts(made)
    capped = recipe(tmp_path, f"{{path: {tmp_path / 'a.jsonl'}, max_groups: 7}}", "data.rules.conflicts=keep")
    assert prepared(capped).manifest.rows["train/admitted"] == 7
    assert shard_artifacts(made) == before


def test_too_many_unsound_rows_stop_the_run_before_the_reference(tmp_path):
    made = recipe(tmp_path, write_rows(tmp_path / "a.jsonl", range(40), bad=2))
    with pytest.raises(DataError, match=r"2 of 42 rows .* are unsound, more than the allowed 1.0%") as caught:
        offline.offline(made, Reporter())
    assert "inspect data" in caught.value.fix
    assert make_plan(made).stages["reference"].state == "missing"
    assert not Path(str(tmp_path / "out/reference-store")).exists()
    assert prepared(made).manifest.rows["train/quarantined"] == 2  # a look at them is not refused
    lenient = validate_recipe(
        apply_overrides(made.model_dump(mode="json"), ["data.max_quarantined_fraction=0.1", "reference.engine=trainer"])
    )
    assert make_plan(lenient).stages["prepare"].state == "done"
    assert run_storage(lenient).uri == run_storage(made).uri


def test_a_template_that_always_exceeds_its_limits_stops_the_run(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content * 10**10 }}")
    made = recipe(tmp_path, write_rows(tmp_path / "rows.jsonl", range(100)), f"data.chat_template={template}")
    with pytest.raises(DataError, match=r"more than 20 rows.*needed more than 1,024 MiB of memory"):
        prepared(made)


def test_pieces_of_one_file_give_what_the_whole_gives(tmp_path, monkeypatch):
    from dpo_ray.data import stage

    path = write_rows(tmp_path / "a.jsonl", range(300), bad=1)
    whole = prepared(recipe(tmp_path, path, "output=" + str(tmp_path / "whole")))
    cut = stage.pieces
    monkeypatch.setattr(stage, "pieces", lambda shard: cut(shard, piece_bytes=2000))  # the driver cuts
    pieces = prepared(recipe(tmp_path, path, "output=" + str(tmp_path / "pieces")))
    assert len(pieces.names("train/")) > len(whole.names("train/")) == 1
    assert pieces.manifest.rows == whole.manifest.rows
    ids = [[g for n in a.names("train/") for g in _ids(a, n)] for a in (whole, pieces)]
    assert ids[0] == ids[1]
    assert [_ordinals(a) for a in (whole, pieces)] == [[300], [300]]


def _ids(artifact: Artifact, name: str) -> list[bytes]:
    from dpo_ray.artifacts.tables import read_table

    return read_table(artifact, name, ["group_id"])["group_id"].to_pylist()


def _ordinals(artifact: Artifact) -> list[int]:
    from dpo_ray.report.samples import quarantine_examples

    return [row["ordinal"] for rows in quarantine_examples(artifact, 9).values() for row in rows]
