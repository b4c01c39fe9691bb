"""Print how much each golden curve amplifies rounding on this machine, and what tolerance follows, as a Markdown table.

    python -m tests.golden.sensitivity          # a minute or two on two cores; GOLDEN_DIR: another directory of curves

Every weight is moved by ULPS (16) units in its last place, up or down at random, which is one millionth of it. One unit is
too little to be a measure: the sum of a completion's log-probs is a float32 of hundreds, whose own last place is 3e-5, so that
most of such small movements vanish before the loss, and now and then one does not. With one unit the gradient norm of
`nca_pair` moved by 0.02, 0.53 and 0.71 plain tolerances in three draws, and by up to 1.3 from one way of rounding to another;
with 16 units by 1.5, 1.5 and 1.7 in three draws.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from .curves import GOLDEN, Curve, curves, is_there
from .golden_process import ULPS
from .tolerance import MARGIN, RELATIVE, allowed, amplifies, widenings
from .trained import DRAWS, Trained, train_cases

STEPS = (1, 2, 3, 5, 8)


def main() -> None:
    if not is_there():
        sys.exit(f"no golden curves in {GOLDEN}: set GOLDEN_DIR")
    with tempfile.TemporaryDirectory(prefix="golden-sensitivity-") as scratch:
        trained = train_cases(Path(scratch), alone="shared", draws=DRAWS)
    print("\n".join(table(trained)))


def table(trained: Trained) -> list[str]:
    """Return the table's lines: a row for each curve, those that amplify rounding most last."""
    columns = [f"step {step}" for step in STEPS]
    header = ["curve", *columns, "amplifies", "tolerance of the last step", "from TRL, in tolerances"]
    moved = {case: trained.movements(case) for case in curves()}
    rows = [
        [
            f"`{case}`",
            *(f"{moved[case][step - 1]:.2f}" if step <= len(moved[case]) else "" for step in STEPS),
            "yes" if amplifies(moved[case]) else "no",
            f"{widenings(moved[case])[-1] * RELATIVE['grad_norm']:.1e}",
            f"{distance(trained.alone[case], curves()[case], widenings(moved[case])):.2f}",
        ]
        for case in sorted(moved, key=lambda case: moved[case][-1])
    ]
    note = (
        f"Movement under {ULPS} units in the last place of every weight, in plain tolerances (5e-5 of the gradient norm and "
        f"the loss, 1e-4 of rewards), the largest so far of {len(DRAWS)} draws. A curve amplifies rounding where {MARGIN:g} "
        "times its movement is more than 1; so much wider is then its tolerance."
    )
    return [note, "", *(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))]


def distance(measured: Curve, curve: Curve, wider: list[float]) -> float:
    """Compute how far the metric that is furthest from TRL's is from it, in tolerances of its step."""
    return max(
        abs(step[name] - value) / allowed(name, value, factor)
        for step, expected, factor in zip(measured, curve, wider, strict=False)
        for name, value in expected.items()
        if allowed(name, value, factor)
    )


if __name__ == "__main__":
    main()
