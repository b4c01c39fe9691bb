"""The model card that goes with an exported policy."""

from __future__ import annotations

from collections.abc import Mapping

from dpo_ray.config.model import ModelConfig


def model_card(
    name: str,
    model: ModelConfig,
    objective: str,
    rows: Mapping[str, int],
    steps: int,
    final: Mapping[str, float],
    heldout: Mapping[str, float],
    recipe_yaml: str,
    versions: Mapping[str, str],
) -> str:
    """Write a card in the hub's format: what was trained on what, with which figures, and the whole recipe."""
    measured = {**{k: v for k, v in final.items() if k.startswith(("loss", "rewards/"))}, **heldout}
    table = "\n".join(f"| `{k}` | {v:.4f} |" for k, v in measured.items())
    counts = ", ".join(
        f"{rows.get(f'train/{what}', 0):,} {words}"
        for what, words in (
            ("rows_in", "rows in"),
            ("admitted", "admitted"),
            ("quarantined", "quarantined"),
            ("duplicates", "duplicates dropped"),
        )
    )
    tools = ", ".join(f"{k} {v}" for k, v in versions.items())
    base = f"`{model.path}`" + (f" with the LoRA adapter `{model.adapter}` merged into it" if model.adapter else "")
    return f"""---
base_model: {model.path}
library_name: transformers
tags: [dpo-ray, preference-optimization, {objective}]
---

# {name}

{base}, aligned with preference data by the `{objective}` objective in {steps:,} optimizer steps, with
[dpo-ray](https://pypi.org/project/dpo-ray/). The reference model is the base model{" with that adapter" if model.adapter else ""}.

## Data
Training: {counts}.

## Figures
The last training step, and (`eval_`) the held-out data at the end.

| measure | value |
|---|---|
{table}

## Recipe
```yaml
{recipe_yaml.strip()}
```

Made with {tools}.
"""
