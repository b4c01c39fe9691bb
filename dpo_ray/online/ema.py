"""The stage `ema`: the running mean of the promoted policies' weights, which the next round uses as reference model."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging


def run(mean: Path, policy: Path, decay: float, staging: Staging, provenance: Provenance) -> Artifact:
    """Compute new weights, decay * mean + (1 - decay) * policy, and commit them as the artifact `ema`.

    The sum is computed in float32, one file after the other, and stored in the dtypes of the policy.

    Args:
        mean: directory of the previous mean in Hugging Face format.
        policy: directory of the promoted policy, of the same architecture. Its weights may be divided into files in another way.
    """
    entries = []
    with tempfile.TemporaryDirectory(prefix="dpo-ray-ema-") as scratch:
        for file in sorted(f for f in policy.iterdir() if f.is_file()):
            target = Path(scratch) / file.name
            if file.suffix == ".safetensors":
                _average(file, mean, decay, target)
            else:
                shutil.copy2(file, target)
            entries.append(staging.upload(f"policy/{file.name}", target))
            target.unlink()
    return provenance.commit(staging, entries, rows={}, figures={})


def _average(file: Path, mean: Path, decay: float, target: Path) -> None:
    places = {name: other for other in sorted(mean.glob("*.safetensors")) for name in _names(other)}
    averaged = {}
    with safe_open(file, "pt") as ours:
        for name in ours.keys():  # noqa: SIM118 - a safetensors file is no mapping
            own = ours.get_tensor(name)
            with safe_open(places[name], "pt") as theirs:
                before = theirs.get_tensor(name)
            averaged[name] = torch.lerp(own.float(), before.float(), decay).to(own.dtype)
    save_file(averaged, target, metadata={"format": "pt"})


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as weights:
        return list(weights.keys())
