"""The simulation of scale against what it stands for: the project's own schedule, closed forms, and its own constants."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.scale import data as scale_data
from benchmarks.scale.checkpoints import LLAMA_7B, Checkpoint, Measured, committing, metadata_writing, planning
from benchmarks.scale.data import Plane
from benchmarks.scale.failures import Training, daly_interval, mtbf_seconds, young_interval
from benchmarks.scale.indexes import indexing, selecting
from benchmarks.scale.schedule import dealing, ordering, token_table
from benchmarks.scale.steps import HH, ULTRAFEEDBACK, Case, Lengths, dealt, measure, replay
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.schedule import buckets
from dpo_ray.schedule.build import Packing, build_split
from dpo_ray.schedule.files import read_steps
from dpo_ray.schedule.order import step_groups

HOUR = 3600.0


@pytest.mark.parametrize(("ranks", "budget"), [(1, 600), (3, 600), (8, 2000), (40, 600)])
def test_the_simulation_deals_what_the_schedule_holds(tmp_path: Path, ranks: int, budget: int) -> None:
    """Every micro-batch of every rank that is read back from a schedule on disk, by its groups; fillers too."""
    lengths = HH.draw(70, seed=1)
    table = token_table(lengths)
    ids = table["group_id"].to_pylist()
    steps = list(step_groups(ids, 7, 24, 1, None))  # the last is short: with 40 ranks there are fillers
    staging = ArtifactStore(Storage(tmp_path)).begin("schedule", "k", "run")
    entries = build_split("train", [lambda: table], steps, Packing(ranks, budget), staging)
    rows = {"train/steps": len(steps)}
    schedule = Provenance(1, {}, {}, {}).commit(staging, entries, rows=rows, figures={})
    simulated = [dealt(lengths[step], ranks, budget) for step in steps]
    for rank in range(ranks):
        for number, share in enumerate(read_steps(schedule, "train", rank)):
            expected = [[ids[steps[number][i]] for i in batch] for batch in simulated[number][rank]]
            assert [list(m.group_ids) if m.weight.any() else [] for m in share.micro_batches] == expected
            tokens = [len(m.input_ids) for m in share.micro_batches if m.weight.any()]
            assert tokens == [
                lengths[[steps[number][i] for i in batch]].sum() for batch in simulated[number][rank] if batch
            ]


def test_what_is_measured_of_a_step_is_what_can_be_counted_by_hand() -> None:
    """Four equal groups of 400 tokens: two ranks with a budget of 800 are even and full; three are not."""
    lengths = np.full((4, 3), [200, 100, 100])
    assert measure(lengths, 2, 800) == pytest.approx((1, 0, 0, 1, 1, 1))
    micro_batches, fillers, unused, estimate, flops, lockstep = measure(lengths, 3, 400)
    assert (micro_batches, fillers, unused) == pytest.approx((2, 2 / 6, 2 / 6))
    assert (estimate, flops) == pytest.approx((2 / (4 / 3), 2 / (4 / 3)))
    assert lockstep == pytest.approx(1.5)  # two micro-batches after each other, where 4/3 of one is the mean
    assert measure(lengths, 1, 100)[:3] == pytest.approx((4, 0, 0))  # longer than the budget: alone, and nothing unused


def test_waiting_after_each_micro_batch_costs_no_less_than_waiting_after_the_step() -> None:
    for lengths, ranks in ((HH, 4), (ULTRAFEEDBACK, 16)):
        balance = replay(Case(lengths, ranks, 24 * ranks))
        assert 1 <= balance.flops <= balance.lockstep <= balance.worst_lockstep
        assert balance == replay(Case(lengths, ranks, 24 * ranks))


@pytest.mark.parametrize("lengths", [HH, ULTRAFEEDBACK])
def test_lengths_have_the_medians_that_they_say_and_fit(lengths: Lengths) -> None:
    drawn = lengths.draw(20_000, seed=0)
    assert drawn.min() >= 1
    assert (drawn[:, 0] + drawn[:, 1:].max(axis=1)).max() <= lengths.max_length_tokens
    assert np.median(drawn, axis=0) == pytest.approx(lengths.medians, rel=0.05)


def training(interval_seconds: float, pause: float = 20.0, commit: float = 60.0, mtbf: float = 5 * HOUR) -> Training:
    return Training(mtbf, interval_seconds, pause, commit, restart_seconds=300.0)


@pytest.mark.parametrize("interval_seconds", [400.0, 1500.0, 4000.0])  # the first is shorter than a commit: it stalls
def test_goodput_is_that_of_drawn_failures(interval_seconds: float) -> None:
    one = training(interval_seconds, commit=1500.0)
    assert one.stalled_seconds == max(0.0, 1500.0 - interval_seconds)
    assert one.simulated_goodput(400_000, seed=0) == pytest.approx(one.goodput(), rel=5e-3)


@pytest.mark.parametrize(("pause", "mtbf"), [(1.0, HOUR), (20.0, 5 * HOUR), (300.0, 2 * HOUR)])
def test_the_best_interval_is_young_s_to_first_order_and_daly_s_more_closely(pause: float, mtbf: float) -> None:
    """Against every interval on a fine grid; commits take no time, so that none stalls."""
    grid = np.geomspace(10, 5 * mtbf, 20_000)
    best = grid[np.argmax([training(t, pause, 0.0, mtbf).goodput() for t in grid])]
    young, daly = young_interval(pause, mtbf), daly_interval(pause, mtbf)
    assert daly == pytest.approx(best, rel=2e-3)
    assert young == pytest.approx(best, rel=2 * math.sqrt(pause / (2 * mtbf)))
    assert young == pytest.approx(math.sqrt(2 * pause * mtbf))


def test_lost_work_is_that_of_the_first_order() -> None:
    """1 - goodput = C / (T + C) + (lost + R) / M, where all are small beside M."""
    one = training(2000.0, mtbf=1000 * HOUR)
    waste = 20 / 2020 + (one.lost_seconds + 300) / one.mtbf_seconds
    assert 1 - one.goodput() == pytest.approx(waste, rel=1e-2)


def test_failures_are_those_of_the_source() -> None:
    assert 54 * 86_400 / mtbf_seconds(16_384) == pytest.approx(419)
    assert mtbf_seconds(4_096) == pytest.approx(4 * mtbf_seconds(16_384))


def test_a_checkpoint_holds_each_byte_once() -> None:
    measured = Measured(1e-5, 100.0, 1e-6, 1e9)
    full, hybrid = (Checkpoint(LLAMA_7B, 512, h, measured) for h in (False, True))
    assert full.rank_bytes * full.ranks == pytest.approx(12 * 6.74e9)
    assert hybrid.rank_bytes * 8 == pytest.approx(12 * 6.74e9)
    assert (full.files, hybrid.files) == (1025, 1025)
    assert hybrid.copy_seconds == pytest.approx(64 * full.copy_seconds)
    assert hybrid.metadata_bytes < full.metadata_bytes


def test_pieces_run_the_real_code_and_return_what_they_should(tmp_path: Path) -> None:
    assert ordering(1000, 64, tmp_path)() == 16
    assert indexing(3000, 1000)() == 1000
    assert selecting(500)() == 500
    assert planning(4, 5)() == 20
    assert 1000 < metadata_writing(4, 5, tmp_path)() < 20_000
    committing(1000, tmp_path)()
    manifest = json.loads((tmp_path / "step-000000001.json").read_text())
    assert list(manifest["files"]) == ["__0_0.distcp"]
    (tmp_path / "dealt").mkdir()
    assert dealing(HH.draw(64, 0), 10, 2, tmp_path / "dealt")() > 0
    assert len(list((tmp_path / "dealt").iterdir())) == 10


def test_counts_of_the_data_plane() -> None:
    plane = Plane(groups=1_000_000, ranks=16, groups_per_step=128)
    assert (plane.parts, plane.segments, plane.steps) == (489, 977, 7813)
    # 4 + 8 + ... + 64 steps in five buckets, then 128 a bucket
    assert plane.buckets == 5 + math.ceil((7813 - 124) / 128)
    assert plane.schedule_files == 16 * plane.buckets
    assert plane.bucket_groups == 128 * 128
    assert plane.index_bytes == 48_000_000
    assert plane.dealings == [66]


def test_a_bucket_of_large_steps_has_fewer() -> None:
    plane = Plane(groups=100_000_000, ranks=4096, groups_per_step=32_768)
    assert (plane.bucket_steps, plane.bucket_groups) == (8, 262_144)
    assert plane.buckets == 1 + math.ceil((3052 - 4) / 8)


def test_pieces_are_those_that_dealing_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in the files of the real thing, dealt to three at a time."""
    for module in (scale_data, buckets):
        monkeypatch.setattr(module, "MOST_OPEN_FILES", 3)
    plane = Plane(groups=2000, ranks=1, groups_per_step=25)
    order = np.random.default_rng(0).permutation(plane.groups).reshape(-1, 25).tolist()
    of_buckets = buckets.buckets_of("train", order)
    assert (plane.buckets, len(of_buckets)) == (5, 5)
    files = buckets.deal_rows([lambda: pa.table({"x": range(2000)})], of_buckets, tmp_path)
    pieces = 0
    for file in files:
        with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as reader:
            pieces += sum(1 for _ in reader)
    assert plane.dealings == [3, 2]
    assert plane.dealt_pieces(8)[-1] == pytest.approx(6)  # as if the last file of three were shared too
    assert pieces == 5
