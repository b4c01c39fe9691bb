"""The model card of an exported policy."""

from __future__ import annotations

from collections.abc import Mapping

from dpo_ray.config.model import ModelConfig
from dpo_ray.config.objective import uses_reference
from dpo_ray.config.train import LoraConfig, TrainConfig


def model_card(
    name: str,
    model: ModelConfig,
    train: TrainConfig,
    rows: Mapping[str, int],
    steps: int,
    final: Mapping[str, float],
    heldout: Mapping[str, float],
    recipe_yaml: str,
    versions: Mapping[str, str],
) -> str:
    """Return the text of the model card in the format of the Hugging Face hub: model, data, metrics, and full recipe.

    Args:
        rows: row counts of the data, such as `train/admitted`.
        final: metrics of the last training step.
        heldout: metrics of the held-out evaluation at the end of training.
        versions: version of each library, by its name.
    """
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
    objective, is_adapter = train.objective.type, train.lora is not None and not train.lora.merge
    reference = f"The reference model is the base model{' with that adapter' if model.adapter else ''}."
    if not uses_reference(train.objective):
        reference = "The objective needs no reference model."
    return f"""---
base_model: {model.path}
library_name: {"peft" if is_adapter else "transformers"}
tags: [dpo-ray, preference-optimization, {objective}{", lora" if train.lora else ""}]
---

# {name}

{base}, aligned with preference data by the `{objective}` objective in {steps:,} optimizer steps, with
[dpo-ray](https://pypi.org/project/dpo-ray/). {reference}{_adapter_words(train.lora)}

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


def _adapter_words(lora: LoraConfig | None) -> str:
    if lora is None:
        return ""
    what = f"a LoRA adapter of rank {lora.rank} (alpha {lora.alpha:g})"
    if lora.merge:
        return f"\nTraining updated only {what}, which was then merged into the model's weights."
    return f"\nTraining updated only {what}. This directory has the adapter alone: load it with PEFT on the base model."
