"""Measure dpo_ray's training against TRL's DPOTrainer: the same rows, model, batches and reference values on both sides.

    python -m benchmarks.train                                      # steps: first TRL's environment is made
    python -m benchmarks.train --hh 'hh/train-*.jsonl.gz' --model models/my-llama --json result.json
    python -m benchmarks.train --rounds 1 --steps 2                 # a quick look
    python -m benchmarks.train --end-to-end --hh 'hh/train-*.jsonl.gz' --model models/my-llama
    python -m benchmarks.train --gpu --shape 1b                     # on a machine with CUDA; torch and transformers suffice
    python -m benchmarks.train --gpu --device cpu --shape tiny      # the same code, tiny

Without --end-to-end and --gpu, sides take turns for some rounds, each turn in a fresh process on the same cores;
`dpo_ray_side.py` and `trl_side.py` say what exactly is timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    args = _arguments()
    # Each way needs other packages: a machine with a GPU may have none of those that the others import.
    if args.gpu:
        import train_gpu as way
    elif args.end_to_end:
        import train_end_to_end as way
    else:
        import train_steps as way
    way.run(args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hh", help="glob of files in HH-RLHF's format; default: made rows of its lengths")
    parser.add_argument("--model", type=Path, help="a model directory; default: a random Llama of 6 M parameters")
    parser.add_argument("--pairs-per-step", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-length-tokens", type=int, default=511)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument(
        "--environment", type=Path, help="directory of TRL's virtual environment; default: in the cache"
    )
    parser.add_argument("--cache", type=Path, help="default: ~/.cache/dpo_ray/benchmarks")
    parser.add_argument("--json", type=Path, help="file to write everything measured to")
    steps = parser.add_argument_group("steps")
    steps.add_argument("--rounds", type=int, default=3)
    steps.add_argument("--steps", type=int, default=8, help="counted steps of each turn; default: %(default)s")
    steps.add_argument("--warm-up-steps", type=int, default=2)
    steps.add_argument("--part-tokens", type=int, default=256, help="P = C = R of the made pairs; default: %(default)s")
    steps.add_argument(
        "--trl-micro-batch", type=int, nargs="+", default=[8, 2], help="pairs in one of TRL's forward passes"
    )
    steps.add_argument("--only", choices=["hh", "equal"], help="one kind of rows")
    whole = parser.add_argument_group("end to end")
    whole.add_argument("--end-to-end", action="store_true", help="whole runs, start-up and reference included")
    whole.add_argument("--sides", nargs="+", choices=["dpo_ray", "trl"], default=["dpo_ray", "trl"])
    gpu = parser.add_argument_group("GPU")
    gpu.add_argument("--gpu", action="store_true", help="Llama shapes on one device, in this process")
    gpu.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    gpu.add_argument("--shape", choices=["tiny", "1b", "8b"], default="1b")
    gpu.add_argument("--lengths", nargs="+", choices=["hh", "ultrafeedback"], default=["hh", "ultrafeedback"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
