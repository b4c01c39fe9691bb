"""Log-probs of completion tokens from a causal language model, without the [tokens, vocabulary] matrix."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import shared_prefix
from .head import head_scores
from .packed_rows import Layout, PackedRows
from .segment_index import SegmentIndex


class TokenScores(NamedTuple):
    """What a forward pass says of completion tokens, all float32 [rows] in the order of `rows.target`.

    A tuple, as FSDP2 finds the tensors in a module's output.
    """

    logps: Tensor
    entropy: Tensor | None = None  # of the next-token distribution, in nats; without gradient
    log_collision: Tensor | None = None  # log of the sum over the vocabulary of p^2; without gradient
    router_loss: Tensor | None = None  # scalar: how unevenly a mixture of experts uses them; in training mode alone


class TokenLogps(nn.Module):
    """A causal language model that answers with the log-prob of every completion token of a packed micro-batch.

    It is one module so that FSDP2 gathers the head's (and tied embedding's) weight once for the whole forward.
    """

    def __init__(self, model: PreTrainedModel, chunk_tokens: int = 1024, layout: Layout = "shared") -> None:
        super().__init__()
        self.model = model
        self.layout: Layout = layout  # in which the model takes its micro-batches
        self.chunk_tokens = chunk_tokens
        config = model.config.get_text_config()
        self.logit_softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Granite divides its logits by logits_scaling, Cohere multiplies them by logit_scale.
        self.logit_scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        # Mixtures of experts that are trained with a loss of their own bring it in their module.
        own = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        self._router_loss = own if getattr(model, "num_experts", None) else None

    def forward(self, rows: PackedRows, with_statistics: bool = False) -> TokenScores:
        """Score every completion token; with the entropy and the collision probability where they are asked for."""
        with_router = self._router_loss is not None and self.training and torch.is_grad_enabled()
        output = self._backbone(rows, with_router)
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, rows.predictor)  # [rows, hidden]
        head = self.model.get_output_embeddings()
        assert head is not None  # noqa: S101 - a causal language model has a head
        scores = head_scores(
            hidden,
            head.weight,
            getattr(head, "bias", None),  # few models have one (Phi)
            rows.target,
            self.chunk_tokens,
            self.logit_scale,
            self.logit_softcap,
            with_statistics=with_statistics,
        )
        routed = with_router and output.router_logits  # a mixture may have dense blocks alone
        return TokenScores(*scores, self._balance(output.router_logits, rows.mask) if routed else None)

    def _backbone(self, rows: PackedRows, with_router: bool) -> Any:
        inputs: dict[str, Any] = {"input_ids": rows.input_ids, "use_cache": False}
        if rows.mask is not None:  # positions begin at 0 in each row, as models have them by themselves
            inputs["attention_mask"] = rows.mask
        else:
            inputs["position_ids"] = rows.position_ids
            # A model's own attention sees by them, without a mask, that a row holds several sequences.
            if rows.segments is not None and self.model.config._attn_implementation == shared_prefix.IMPLEMENTATION:
                inputs["segments"] = SegmentIndex(rows.segments, rows.input_ids.device)
        if with_router:
            inputs["output_router_logits"] = True
        return self.model.get_decoder()(**inputs)

    def _balance(self, router_logits: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """Apply the model's own auxiliary loss to the logits of its routers, each [tokens, experts]; padding left out.

        A prompt that is shared counts once. Source: equations 4 to 6 of Fedus et al. 2021 (2101.03961).
        """
        model: Any = self.model
        assert self._router_loss is not None  # noqa: S101
        return self._router_loss(router_logits, model.num_experts, model.num_experts_per_tok, mask)


def sum_by_completion(token_logps: Tensor, rows: PackedRows) -> Tensor:
    """Sum token log-probs [rows] over each completion: float32 [completions].

    The running sum is kept in float64: over hundreds of tokens a float32 one loses 1e-4 nats, which beta and the
    difference of two such sums turn into a visible error of the loss.
    """
    sums = torch.zeros(len(rows.lengths), dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, rows.completion_of_row, token_logps.double()).float()
