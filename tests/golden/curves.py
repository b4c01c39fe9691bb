"""The golden data: where they are, the settings of each case, and what of TRL's curves can be compared.

The directory with rows, curves and model is GOLDEN_DIR (default ../shared/golden beside the repository). Its README.md states
how the curves were made.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).resolve().parents[3] / "shared" / "golden"))
Curve = list[dict[str, float]]  # the metrics of each step

# What README.md of the golden directory says of each case; every other is the loss of its name at beta 0.1.
CASES: dict[str, dict[str, Any]] = {
    "exo_pair": {"objective": {"type": "exo_pair", "label_smoothing": 1e-3}},
    "robust": {"objective": {"type": "robust", "label_smoothing": 0.1}},
    "sigmoid_norm": {"objective": {"type": "sigmoid_norm", "beta": 0.1}},
    "mpo": {
        "objective": {
            "type": "sum",
            "terms": [
                {"weight": 0.8, "objective": {"type": "sigmoid"}},
                {"weight": 0.2, "objective": {"type": "bco_pair"}},
                {"weight": 1.0, "objective": {"type": "sft"}},
            ],
        }
    },
    "forward_kl": {"shaping": {"divergence": "forward_kl"}},
    "js": {"shaping": {"divergence": "js"}},
    "ld": {"shaping": {"ld_alpha": 0.5}},
    "wpo": {"shaping": {"wpo": True}},
}
NOT_OF_LOSS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


def is_there() -> bool:
    return (GOLDEN / "rows.json").exists()


def rows() -> list[dict[str, Any]]:
    return json.loads((GOLDEN / "rows.json").read_text())


def curves() -> dict[str, Curve]:
    """Return the steps of each case as far as they can be compared."""
    path = GOLDEN / "trl-1.16-curves.json"
    return {case: comparable(curve) for case, curve in json.loads(path.read_text()).items()} if path.exists() else {}


def comparable(curve: Curve) -> Curve:
    """Return the steps until TRL's own arithmetic overflows.

    `forward_kl` overflows in TRL in its second step: the loss is reported as 0 and the gradient as NaN or infinite. In
    dpo_ray exponents are bounded, and training goes on. What TRL measured in that step before the loss is compared, what
    came after it is not.
    """
    finite = next((i for i, step in enumerate(curve) if not math.isfinite(step["grad_norm"])), len(curve))
    return curve[:finite] + [{name: step[name] for name in NOT_OF_LOSS} for step in curve[finite : finite + 1]]


def settings_of(case: str) -> dict[str, Any]:
    """Return the fields of TrainConfig that a case sets."""
    return {"objective": {"type": case} if case not in CASES else {"type": "sigmoid"}} | CASES.get(case, {})
