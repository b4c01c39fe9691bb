"""Log-probs of completion tokens from a causal language model, without the [tokens, vocabulary] matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .packed_rows import PackedRows


class TokenLogps(nn.Module):
    """A causal language model that answers with the log-prob of every completion token of a packed micro-batch.

    It is one module so that FSDP2 gathers the head's (and tied embedding's) weight once for the whole forward.
    """

    def __init__(self, model: PreTrainedModel, chunk_tokens: int = 1024) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        config = model.config.get_text_config()
        self.logit_softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Granite divides its logits by logits_scaling, Cohere multiplies them by logit_scale.
        self.logit_scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )

    def forward(self, rows: PackedRows) -> Tensor:
        """Return token log-probs, float32 [rows], in the order of `rows.target`."""
        backbone = self.model.get_decoder()
        hidden = backbone(
            input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False, segments=rows.segments
        ).last_hidden_state[0]  # [tokens, hidden]
        hidden = hidden.index_select(0, rows.predictor)  # [rows, hidden]
        head = self.model.get_output_embeddings()
        assert head is not None  # noqa: S101 - a causal language model has a head
        bias = getattr(head, "bias", None)  # few models have one (Phi)
        if len(hidden) <= self.chunk_tokens or not torch.is_grad_enabled():
            return torch.cat([self._logps(h, t, head.weight, bias) for h, t in self._chunks(hidden, rows.target)])
        # The chunks' logits are recomputed in backward; kept, they would be the matrix again.
        return torch.cat(
            [
                checkpoint(self._logps, h, t, head.weight, bias, use_reentrant=False)
                for h, t in self._chunks(hidden, rows.target)
            ]
        )

    def _chunks(self, hidden: Tensor, target: Tensor):
        return zip(hidden.split(self.chunk_tokens), target.split(self.chunk_tokens), strict=True)

    def _logps(self, hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = F.linear(hidden, weight, bias).float()  # [chunk, vocabulary]
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits.gather(1, target[:, None])[:, 0] - torch.logsumexp(logits, dim=1)


def sum_by_completion(token_logps: Tensor, rows: PackedRows) -> Tensor:
    """Sum token log-probs [rows] over each completion: float32 [completions].

    The running sum is kept in float64: over hundreds of tokens a float32 one loses 1e-4 nats, which beta and the
    difference of two such sums turn into a visible error of the loss.
    """
    sums = torch.zeros(len(rows.lengths), dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, rows.completion_of_row, token_logps.double()).float()
