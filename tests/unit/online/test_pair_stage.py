"""From judged samples to a round's groups: every prompt accounted for, shares of older groups, labels."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.artifacts.tables import parquet_bytes, read_table
from dpo_ray.config.online import OnlineConfig
from dpo_ray.data.schemas import TOKENS, splits
from dpo_ray.errors import DataError
from dpo_ray.online import pair_stage
from dpo_ray.online.judges.protocol import Verdict
from dpo_ray.reference.sampling import SAMPLES, prompt_key

PROVENANCE = Provenance(1, {}, {}, {})


def online(**sections: object) -> OnlineConfig:
    judge = {"type": "function", "function": "dpo_ray.data.synthetic.true_rewards"}
    return OnlineConfig.model_validate({"judge": judge, **sections})


class World:
    """A store with samples of 20 prompts, two each, and prepared groups of 30 others."""

    def __init__(self, root: Path) -> None:
        self.store = ArtifactStore(Storage(root))
        self.prompts = [[5, 6, i] for i in range(20)]
        self.completions = [[[10 + i, 2], [40 + i, 41, 2]] for i in range(20)]
        self.sampled = self.commit("sample", "s", {"samples/0.parquet": self.samples()}, {"prompts": 20}, {})
        parts = {f"{split}/0.parquet": self.groups(split) for split in ("train", "eval")}
        rows = {f"{split}/{what}": 30 for split in ("train", "eval") for what in ("rows_in", "admitted")}
        rows |= {f"{split}/{what}": 0 for split in ("train", "eval") for what in ("quarantined", "duplicates")}
        accounts = [{"split": "eval", "source": "held"}, {"split": "train", "source": "file"}]
        self.prepared = self.commit("prepare", "p", parts, rows, {"accounts": accounts})

    def commit(self, stage: str, key: str, tables: dict[str, pa.Table], rows: dict, figures: dict) -> Artifact:
        staging = self.store.begin(stage, key, "run")
        entries = [staging.write(name, parquet_bytes(t), rows=len(t)) for name, t in tables.items()]
        return PROVENANCE.commit(staging, entries, rows=rows, figures=figures)

    def samples(self) -> pa.Table:
        keys = [prompt_key(ids) for ids in self.prompts]
        columns = {"group_id": keys, "prompt_ids": self.prompts, "completion_ids": self.completions}
        return pa.table({**columns, "ended": [[True, True]] * 20}, schema=SAMPLES)

    def groups(self, split: str) -> pa.Table:
        return pa.Table.from_pylist(
            [
                {
                    "group_id": f"{split}-{i}".encode().ljust(16, b"_"),
                    "source": "file",
                    "prompt_ids": [7, 8, i],
                    "completion_ids": [[9, 2], [11, 2]],
                    "scores": [1.0, 0.0],
                    "chosen": [0],
                    "rejected": [1],
                    "preference_probability": 1.0,
                    "weight": 1.0,
                }
                for i in range(30)
            ],
            schema=TOKENS,
        )

    def verdicts(self) -> dict[bytes, Verdict]:
        """The second completion is better by 1; of prompt 0 both are as good, on prompt 1 the judge abstains."""
        said = [Verdict((0.0, 0.0)), Verdict((None, None), reason="no")] + [Verdict((1.0, 2.0))] * 18
        return {prompt_key(ids): verdict for ids, verdict in zip(self.prompts, said, strict=True)}

    def pair(
        self,
        config: OnlineConfig,
        number: int = 2,
        earlier: tuple[Artifact, ...] = (),
        mismatched_tokens: int | None = None,
    ) -> Artifact:
        staging, verdicts = self.store.begin("pair", f"round{number}", "run"), self.verdicts()
        return pair_stage.run(
            *(number, self.sampled, verdicts, self.prepared, earlier),
            *(config, 0, mismatched_tokens, staging, PROVENANCE),
        )


def rows(artifact: Artifact, split: str = "train") -> list[dict]:
    return [row for name in artifact.names(f"{split}/") for row in read_table(artifact, name).to_pylist()]


def test_every_prompt_becomes_a_group_or_has_a_reason(tmp_path: Path) -> None:
    paired = World(tmp_path).pair(online())
    counts = paired.rows
    assert counts["train/rows_in"] == 20 == counts["train/admitted"] + counts["train/quarantined"]
    assert paired.manifest.figures["dropped"] == {"abstained": 1, "tie": 1}
    assert paired.manifest.figures["pairs"] == counts["train/admitted"] == 18
    for row in rows(paired):
        assert [row["completion_ids"][row[side][0]] for side in ("chosen", "rejected")] == [
            [40 + row["prompt_ids"][2], 41, 2],
            [10 + row["prompt_ids"][2], 2],
        ]


def test_held_out_groups_come_along_byte_by_byte(tmp_path: Path) -> None:
    world = World(tmp_path)
    paired = world.pair(online())
    assert splits(paired) == ["train", "eval"]
    assert paired.read_bytes("eval/0.parquet") == world.prepared.read_bytes("eval/0.parquet")
    assert paired.rows["eval/admitted"] == 30


def test_shares_are_of_all_groups_and_each_round_chooses_anew(tmp_path: Path) -> None:
    world = World(tmp_path)
    first = world.pair(online(), number=1)
    config = online(mix={"offline": 0.25, "earlier_rounds": 0.25})
    second, third = (world.pair(config, number=n, earlier=(first,)) for n in (2, 3))
    for paired in (second, third):
        by_source = [row["source"] for row in rows(paired)]
        own = by_source.count(f"round-{2 if paired is second else 3:03d}")
        assert own == 18
        assert by_source.count("file") == 9  # a quarter of 36
        mixed = paired.manifest.figures["mixed"]
        assert mixed == {"own": 18, "offline": 9, "earlier": 9}
        # What the first round made of the same samples is the same group: it comes once.
        assert paired.rows["train/duplicates"] == 9
        assert paired.rows["train/rows_in"] == paired.rows["train/admitted"] + 2 + 9
    assert {r["group_id"] for r in rows(second) if r["source"] == "file"} != {
        r["group_id"] for r in rows(third) if r["source"] == "file"
    }


def test_labels_are_the_probabilities_of_bradley_and_terry(tmp_path: Path) -> None:
    paired = World(tmp_path).pair(online(pairing={"labels": "bradley_terry"}))
    for row in rows(paired):
        assert row["preference_probability"] == pytest.approx(1 / (1 + math.exp(-1.0)), abs=1e-7)


def test_a_length_penalty_turns_the_order_of_scores_too(tmp_path: Path) -> None:
    """3 tokens at 1.5 each cost the second completion more than it was better."""
    paired = World(tmp_path).pair(online(pairing={"length_penalty": 1.5}))
    row = rows(paired)[-1]
    assert row["completion_ids"][row["chosen"][0]] == [10 + row["prompt_ids"][2], 2]
    assert row["scores"] == sorted(row["scores"], reverse=True)


def test_too_few_pairs_stop_the_round_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"18 pairs, fewer than online.pairing.min_pairs=19") as error:
        World(tmp_path).pair(online(pairing={"min_pairs": 19}))
    assert "(1 prompts)" in str(error.value)


def test_groups_get_a_completion_of_another_prompt_where_the_objective_needs_one(tmp_path: Path) -> None:
    """KTO estimates the divergence on them; without one its estimate would be of nothing."""
    for row in rows(World(tmp_path).pair(online(), mismatched_tokens=100)):
        *own, stranger = row["completion_ids"]
        number = row["prompt_ids"][2]
        assert sorted(own) == [[10 + number, 2], [40 + number, 41, 2]]
        assert stranger not in own
        assert [math.isnan(score) for score in row["scores"]] == [False, False, True]
