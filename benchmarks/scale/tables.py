"""The figures of the simulation as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.scale.figures import Figures, Schedule
from dpo_ray.schedule.stage import MOST_PACKED_AT_ONCE

GIB, GB, MB = 2**30, 1e9, 1e6


def tables(found: Figures) -> str:
    """Write all tables, each under its heading."""
    parts = {
        "Balance between ranks (replayed)": _balance(found),
        "Order of the groups (measured; the last row extrapolated)": _orders(found),
        "Pieces of the code (measured)": _pieces(found),
        f"Schedule of {found.order.groups:,} groups (projected from the pieces, hours of one core)": _schedules(
            found.schedules
        ),
        f"Data plane of {found.order.groups:,} groups (counted; times and peaks projected)": _plane(found),
        "Checkpoints (sizes counted; times projected)": _checkpoints(found),
        "Failures (closed form)": _survivals(found),
    }
    return "\n\n".join(f"### {heading}\n\n{table}" for heading, table in parts.items())


def _table(heads: str, rows: Iterable[Iterable[str]]) -> str:
    count = heads.count("|") + 1
    lines = [f"| {heads} |", "|" + "---|" * count]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _balance(found: Figures) -> str:
    return _table(
        "data | ranks | groups a step | steps replayed | micro-batches a rank | of these fillers | budget unused "
        "| most / mean, as estimated | in FLOPs | with waits | worst step",
        (
            [
                case.lengths.name,
                f"{case.ranks:,}",
                f"{case.groups_per_step:,}",
                f"{b.steps}",
                f"{b.micro_batches:.2f}",
                f"{b.fillers:.1%}",
                f"{b.unused:.0%}",
                *(f"{value:.3f}" for value in (b.estimate, b.flops, b.lockstep, b.worst_lockstep)),
            ]
            for case, b in found.balance
        ),
    )


def _orders(found: Figures) -> str:
    return _table(
        "groups | CPU time | peak memory | a group",
        (
            [
                f"{o.groups:,}" + ("" if o.is_measured else " (extrapolated)"),
                f"{o.seconds:,.1f} s",
                f"{o.peak_bytes / GIB:.2f} GiB",
                f"{o.peak_bytes / o.groups:.0f} bytes",
            ]
            for o in (*found.pieces.orders, found.order)
        ),
    )


def _pieces(found: Figures) -> str:
    p, c = found.pieces, found.checkpoints
    packed = [
        (f"`write_bucket`, {one.data}", f"{1e6 * one.group_seconds:.0f} us a group, {1e3 * one.rank_step_seconds:.2f} ms a rank "
         f"and step; memory: {one.group_bytes / 1e3:.0f} kB a group of the bucket, {one.step_group_bytes / 1e3:.0f} kB a group "
         f"of the step, {one.rank_bytes / 1e3:.0f} kB a rank")
        for one in p.packed
    ]  # fmt: skip
    dealt = [
        (f"`deal_rows`, {packed.data}", f"{1e6 * one.row_seconds:.1f} us a row of {one.row_bytes:,.0f} bytes; "
         f"{1e6 * one.piece_seconds:.0f} us and {one.piece_bytes:,.0f} bytes on disk a piece of a file")
        for one, packed in zip(p.dealt, p.packed, strict=True)
    ]  # fmt: skip
    rows = [
        *dealt,
        *packed,
        (
            "schedule's manifest",
            f"{p.manifest_bytes:.0f} bytes a file; read in {1e6 * p.manifest_seconds:.0f} us "
            f"to {p.manifest_memory_bytes:,.0f} bytes of memory",
        ),
        ("`StoreIndex.of`", f"{1e6 * p.index_seconds:.2f} us and at its peak {p.index_peak_bytes:.0f} bytes a key"),
        (
            "`select`",
            f"{1e6 * p.select_seconds:.2f} us and at its peak {p.select_peak_bytes:.0f} bytes a row besides its columns",
        ),
        ("DCP's global plan", f"{1e6 * c.plan_seconds:.0f} us an item"),
        ("DCP's `.metadata`", f"{c.metadata_bytes:.0f} bytes and {1e6 * c.metadata_seconds:.0f} us an item"),
        ("sha256 of a file", f"{c.digest_bytes_per_second / GB:.2f} GB/s, one thread"),
    ]
    return _table("piece | cost", rows)


def _schedules(schedules: Iterable[Schedule]) -> str:
    return _table(
        "data | ranks | groups a step | steps | buckets | open files | dealing | its scratch beyond the rows "
        f"| packing | by {MOST_PACKED_AT_ONCE} tasks | largest bucket | files | manifest | its memory in each worker",
        (
            [
                s.packed.data,
                f"{s.plane.ranks:,}",
                f"{s.plane.groups_per_step:,}",
                f"{s.plane.steps:,}",
                f"{s.plane.buckets:,}",
                f"{max(s.plane.dealings)}",
                f"{s.dealing_hours:.1f} h",
                f"{s.dealing_bytes / GIB:,.0f} GiB",
                f"{s.packing_hours:.1f} h",
                f"{s.packing_hours / MOST_PACKED_AT_ONCE:.1f} h",
                f"{s.bucket_bytes / GIB:,.1f} GiB",
                f"{s.plane.schedule_files:,}",
                f"{s.manifest_bytes / MB:.1f} MB",
                f"{s.manifest_memory_bytes / MB:,.0f} MB",
            ]
            for s in schedules
        ),
    )


def _plane(found: Figures) -> str:
    plane, p = found.schedules[0].plane, found.pieces
    keys = 2 * plane.groups
    rows = [
        ("Parquet parts of the shards, of the tokens and of the reference, each", f"{plane.parts:,}"),
        ("tasks that merge, and that look up", f"{plane.merge_tasks:,} and {plane.look_up_tasks:,}"),
        ("segments of the reference store (granules)", f"{plane.segments:,}"),
        ("columns of the rules over all rows, on the driver", f"{plane.candidate_bytes / GIB:.1f} GiB"),
        (
            "the rules: time, and memory besides",
            f"{plane.groups * p.select_seconds / 60:.0f} min, {plane.groups * p.select_peak_bytes / GIB:.1f} GiB",
        ),
        ("index of the store, on every node that looks up", f"{plane.index_bytes / GIB:.1f} GiB"),
        (
            "making it: time, and peak memory",
            f"{keys * p.index_seconds / 60:.0f} min, {keys * p.index_peak_bytes / GIB:.1f} GiB",
        ),
    ]
    return _table("what | figure", rows)


def _checkpoints(found: Figures) -> str:
    return _table(
        "model | ranks | sharded over | total | a rank | files | `.metadata` "
        "| training stands still | plan, once a start | write | digests | `.metadata` is written | committed after but for the plan",
        (
            [
                c.model.name,
                f"{c.ranks:,}",
                f"{c.shards:,}",
                f"{c.model.state_bytes / GB:,.0f} GB",
                f"{c.rank_bytes / GB:.2f} GB",
                f"{c.files:,}",
                f"{c.metadata_bytes / MB:,.0f} MB",
                f"{c.copy_seconds:.2f} s",
                *(
                    f"{s:,.0f} s"
                    for s in (c.plan_seconds, c.write_seconds, c.digest_seconds, c.metadata_seconds, c.commit_seconds)
                ),
            ]
            for c in (s.checkpoint for s in found.survivals)
        ),
    )


def _survivals(found: Figures) -> str:
    return _table(
        "model | ranks | sharded over | failures a day | sqrt(2CM) | interval | lost a failure | restart | goodput "
        "| goodput at 100 steps | stalls there",
        (
            [
                s.checkpoint.model.name,
                f"{s.checkpoint.ranks:,}",
                f"{s.checkpoint.shards:,}",
                f"{86_400 / s.mtbf_seconds:.3f}",
                f"{s.young_seconds:,.0f} s",
                f"{s.best.interval_seconds:,.0f} s",
                f"{s.best.lost_seconds / 60:.1f} min",
                f"{s.best.restart_seconds / 60:.1f} min",
                f"{s.best.goodput():.2%}",
                f"{s.default.goodput():.2%} ({s.default.interval_seconds:,.0f} s)",
                f"{s.default.stalled_seconds:,.0f} s",
            ]
            for s in found.survivals
        ),
    )
