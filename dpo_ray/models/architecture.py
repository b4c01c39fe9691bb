"""Refuses architectures whose log-probs or exported weights would be wrong without an error.

Only config files and the names of weights are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dpo_ray.errors import ConfigError

# Weights of the parts of a model that read images, videos or sound.
_MEDIA = re.compile(r"(^|\.|_)(visual|vision|image|video|audio|multi_modal)", re.IGNORECASE)


def check_attention(config: PreTrainedConfig, where: str) -> None:
    """Check that each token sees the earlier tokens of its sequence (all of them, or a window), and no later tokens.

    Raises:
        ConfigError: tokens see later tokens; or the attention is sparse, and a learned index chooses the tokens that a
            token sees among all tokens of a packed row (DeepSeek V3.2, GLM 5). The log-probs of a sequence would then
            depend on other sequences of the row.
    """
    text = config.get_text_config()
    if getattr(text, "use_bidirectional_attention", None) is True:
        raise refused(
            config.model_type, "its tokens see the tokens that follow them (use_bidirectional_attention)", where
        )
    if getattr(text, "index_topk", None) is not None:
        raise refused(
            config.model_type,
            f"its sparse attention chooses {text.index_topk} tokens among all tokens of a row (index_topk), so the "
            "log-probs of a sequence depend on the sequences beside it",
            where,
        )


def check_media_parts(config: PreTrainedConfig, weights: Iterable[str], where: str) -> None:
    """Check that transformers can load the model for text, and that no weights for images or sound are lost by that.

    Args:
        weights: the names of all tensors in the model's files.

    Raises:
        ConfigError: there is no causal language model of this architecture; or transformers loads only the weights for text,
            and ignores the weights for images or sound.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise refused(config.model_type, "transformers has no causal language model of this architecture", where)
    ignored = [
        re.compile(pattern) for pattern in getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or ()
    ]
    for name in weights:
        if _MEDIA.search(name) and any(pattern.search(name) for pattern in ignored):
            raise ConfigError(
                f"the exported policy would lose the part of `{config.model_type}` that reads images or sound (`{name}` "
                "and others): transformers loads the text part alone",
                where=where,
                fix="use a text model, or save the text part of this model as a model of its own (model.save_pretrained)",
            )


def refused(model_type: str, reason: str, where: str) -> ConfigError:
    """Build the error for an architecture that cannot be trained."""
    return ConfigError(
        f"the architecture `{model_type}` cannot be trained: {reason}",
        where=where,
        fix="use a decoder whose tokens interact only in attention, such as Llama, Mistral, Qwen, Gemma, Phi",
    )
