"""Computes the log-probs of completion tokens with a causal language model, without a matrix of all logits."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import attention
from .attention import SegmentIndex
from .head import head_scores
from .packed_rows import Layout, PackedRows


class TokenScores(NamedTuple):
    """The scores of completion tokens from a forward pass: float32 [rows], in the order of `PackedRows.target`.

    It is a NamedTuple, because FSDP2 must find the tensors in a module's output.
    """

    logps: Tensor
    entropy: Tensor | None = None  # of the next-token distribution, in nats; without gradient
    log_collision: Tensor | None = None  # log of the sum over the vocabulary of p^2; without gradient
    router_loss: Tensor | None = None  # scalar: load-balancing loss of a mixture of experts; only in training mode


class TokenLogps(nn.Module):
    """A causal language model that returns the log-prob of every completion token of a packed micro-batch.

    The model and the computation of log-probs are one module. So FSDP2 gathers the weight of the head (often tied to the
    embedding) only once per forward pass.
    """

    def __init__(self, model: PreTrainedModel, chunk_tokens: int = 1024, layout: Layout = "shared") -> None:
        super().__init__()
        self.model = model
        self.layout: Layout = layout  # the layout of the rows that `forward` receives
        self.chunk_tokens = chunk_tokens
        config = model.config.get_text_config()
        self.logit_softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Granite divides its logits by logits_scaling, Cohere multiplies them by logit_scale.
        self.logit_scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        # A mixture of experts with an auxiliary loss defines it in its own Python module.
        own = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        self._router_loss = own if getattr(model, "num_experts", None) else None

    def forward(self, rows: PackedRows, with_statistics: bool = False) -> TokenScores:
        """Compute the log-prob of every completion token. `with_statistics` adds entropy and collision probability."""
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
        routed = with_router and output.router_logits  # a mixture of experts may have only dense blocks
        return TokenScores(*scores, self._balance(output.router_logits, rows.mask) if routed else None)

    def _backbone(self, rows: PackedRows, with_router: bool) -> Any:
        inputs: dict[str, Any] = {"input_ids": rows.input_ids, "use_cache": False}
        if rows.mask is not None:  # positions begin at 0 in each row, which is the models' default
            inputs["attention_mask"] = rows.mask
        else:
            inputs["position_ids"] = rows.position_ids
            # Without a mask, a model's own attention recognises the sequences of a row by their positions.
            if rows.segments is not None and self.model.config._attn_implementation == attention.IMPLEMENTATION:
                inputs["segments"] = SegmentIndex(rows.segments, rows.input_ids.device)
        if with_router:
            inputs["output_router_logits"] = True
        return self.model.get_decoder()(**inputs)

    def _balance(self, router_logits: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """Compute the model's own load-balancing loss. `router_logits` has a tensor [tokens, experts] for each layer.

        Padding tokens do not count, and the tokens of a shared prompt count once. Source: equations 4 to 6 of Fedus et
        al. 2021 (2101.03961).
        """
        model: Any = self.model
        assert self._router_loss is not None  # noqa: S101
        return self._router_loss(router_logits, model.num_experts, model.num_experts_per_tok, mask)


def sum_by_completion(token_logps: Tensor, rows: PackedRows) -> Tensor:
    """Sum token log-probs [rows] over each completion: float32 [completions].

    The running sum is in float64. In float32 it would lose 1e-4 nats over hundreds of tokens. Losses use the difference of two
    sums, in which this error would be visible.
    """
    sums = torch.zeros(len(rows.lengths), dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, rows.completion_of_row, token_logps.double()).float()
