"""dpo_ray's side of the benchmark `prepare.py`: one run of the stage `prepare`, in a process of its own.

What is timed is `dpo_ray.run.offline.prepared`: plan (with the digest of every file), tokenize, choose among all groups, and
commit the tokens artifact, from an empty output directory. Before the clock come the imports, Ray's start, and a run of a
few rows in the same Ray, after which Ray's workers have imported what they need.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402 - the clock first: imports are measured too
import io  # noqa: E402
import json  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402

import ray  # noqa: E402
from rich.console import Console  # noqa: E402

from benchmarks.common.process_tree import cpu_seconds  # noqa: E402
from benchmarks.common.row_digests import row_digest  # noqa: E402
from dpo_ray.artifacts.artifact import Artifact  # noqa: E402
from dpo_ray.artifacts.tables import read_table  # noqa: E402
from dpo_ray.cluster.session import session  # noqa: E402
from dpo_ray.config.load import validate_recipe  # noqa: E402
from dpo_ray.config.recipe import Recipe  # noqa: E402
from dpo_ray.data.tokenizing.chat import load_tokenizer  # noqa: E402
from dpo_ray.observe.progress import Reporter  # noqa: E402
from dpo_ray.run.offline import prepared  # noqa: E402

IMPORTED = time.perf_counter()
WARM_UP_ROWS = 64
LIBRARIES = ("dpo-ray", "ray", "transformers", "tokenizers", "torch", "pyarrow")


def main() -> None:
    args = _arguments()
    measured, recipe = {}, _recipe("measured", args, args.rows)
    began = time.perf_counter()
    with session(recipe):
        measured["ray_start_seconds"] = time.perf_counter() - began
        if not args.cold:
            _warm_up(args)
            measured["warm_up_seconds"] = time.perf_counter() - began - measured["ray_start_seconds"]
        cpu_before, began = cpu_seconds(), time.perf_counter()
        _, tokens = prepared(recipe, Reporter(Console(file=io.StringIO())))
        measured["seconds"] = time.perf_counter() - began
        measured["cpu_seconds"] = cpu_seconds() - cpu_before
    rows = tokens.manifest.rows
    measured |= {
        "rows_in": rows["train/rows_in"],
        "rows_out": rows["train/admitted"],
        "account": rows,
        "import_seconds": IMPORTED - STARTED,
        "versions": {name: version(name) for name in LIBRARIES},
        "digests": [] if args.no_digests else _digests(tokens, args),
    }
    args.result.write_text(json.dumps(measured))


def _recipe(name: str, args: argparse.Namespace, rows: Sequence[Path]) -> Recipe:
    return validate_recipe(
        {
            "name": name,
            "output": str(args.scratch),
            "model": {"path": str(args.model)},
            "data": {
                "train": [str(path) for path in rows],
                "chat_template": "auto" if args.turns else "plain",
                "max_length_tokens": args.max_length_tokens,
            },
            "reference": {"engine": "trainer"},
            "evaluate": {"sample_prompts": 0},
            "trackers": [],
            "ray": {"cpus": args.cores},
        }
    )


def _warm_up(args: argparse.Namespace) -> None:
    """Start every worker: each imports its modules, and prepares rows of files that are not measured."""
    ray.get([_import_in_worker.remote() for _ in range(args.cores)])
    with args.rows[0].open(encoding="utf-8") as stream:
        lines = [line for _, line in zip(range(args.cores * WARM_UP_ROWS), stream, strict=False)]
    files = [args.scratch / f"warm-up-{i}.jsonl" for i in range(args.cores)]
    for i, path in enumerate(files):
        path.write_text("".join(lines[i :: args.cores]), encoding="utf-8")
    prepared(_recipe("warm-up", args, files), Reporter(Console(file=io.StringIO())))
    ray.get([_import_in_worker.remote() for _ in range(args.cores)])  # Ray may have ended a worker that stood idle


@ray.remote(num_cpus=1)
def _import_in_worker() -> None:
    import dpo_ray.data.first_pass  # noqa: F401 - that it is imported is what is wanted

    time.sleep(2)  # held so long, a worker gets no second of these tasks: each goes to one of its own


def _digests(tokens: Artifact, args: argparse.Namespace) -> list[str]:
    eos = load_tokenizer(str(args.model)).eos_token_id
    end_id = eos if args.turns and isinstance(eos, int) else None
    return [
        row_digest(row["prompt_ids"], row["completion_ids"], args.max_length_tokens, end_id)
        for name in tokens.names("train/")
        for row in read_table(tokens, name, ["prompt_ids", "completion_ids"]).to_pylist()
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--scratch", required=True, type=Path, help="an empty directory, for the output")
    parser.add_argument("--result", required=True, type=Path)
    parser.add_argument("--cores", type=int, default=2, help="CPUs that Ray may use")
    parser.add_argument("--max-length-tokens", type=int, default=1024)
    parser.add_argument(
        "--turns", action="store_true", help="the rows are conversations, rendered by the chat template"
    )
    parser.add_argument("--cold", action="store_true", help="no warm-up: the workers' imports are timed too")
    parser.add_argument("--no-digests", action="store_true", help="do not read the result: memory is measured")
    return parser.parse_args()


if __name__ == "__main__":
    main()
