"""Log-probs of completion tokens from a causal language model, without the [tokens, vocabulary] matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .packed_rows import Layout, PackedRows


class TokenScores(NamedTuple):
    """What a forward pass says of completion tokens, all float32 [rows] in the order of `rows.target`.

    A tuple, as FSDP2 finds the tensors in a module's output.
    """

    logps: Tensor
    entropy: Tensor | None = None  # of the next-token distribution, in nats; without gradient
    log_collision: Tensor | None = None  # log of the sum over the vocabulary of p^2; without gradient
    router_loss: Tensor | None = None  # scalar: how unevenly a mixture of experts uses them


class TokenLogps(nn.Module):
    """A causal language model that answers with the log-prob of every completion token of a packed micro-batch.

    It is one module so that FSDP2 gathers the head's (and tied embedding's) weight once for the whole forward.
    """

    def __init__(self, model: PreTrainedModel, chunk_tokens: int = 1024, layout: Layout = "shared") -> None:
        super().__init__()
        self.model = model
        self.layout: Layout = layout
        self.chunk_tokens = chunk_tokens
        config = model.config.get_text_config()
        self.logit_softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Granite divides its logits by logits_scaling, Cohere multiplies them by logit_scale.
        self.logit_scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )

    def forward(self, rows: PackedRows, with_statistics: bool = False) -> TokenScores:
        """Score every completion token; with the entropy and the collision probability where they are asked for."""
        backbone = self.model.get_decoder()
        tokens = {"input_ids": rows.input_ids, "position_ids": rows.position_ids, "use_cache": False}
        if rows.mask is None:
            hidden = backbone(**tokens, segments=rows.segments).last_hidden_state
        else:
            hidden = backbone(**tokens, attention_mask=rows.mask).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, rows.predictor)  # [rows, hidden]
        head = self.model.get_output_embeddings()
        assert head is not None  # noqa: S101 - a causal language model has a head
        bias = getattr(head, "bias", None)  # few models have one (Phi)
        statistics = self._statistics(hidden, rows.target, head.weight, bias) if with_statistics else (None, None)
        if len(hidden) <= self.chunk_tokens or not torch.is_grad_enabled():
            logps = [self._logps(h, t, head.weight, bias) for h, t in self._chunks(hidden, rows.target)]
        else:  # the chunks' logits are recomputed in backward; kept, they would be the matrix again
            logps = [
                checkpoint(self._logps, h, t, head.weight, bias, use_reentrant=False)
                for h, t in self._chunks(hidden, rows.target)
            ]
        return TokenScores(torch.cat(logps), *statistics)

    @torch.no_grad()
    def _statistics(self, hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        entropy, collision = [], []
        for h, _ in self._chunks(hidden, target):
            logp = self._logits(h, weight, bias).log_softmax(dim=1)  # [chunk, vocabulary]
            entropy.append(-(logp.exp() * logp).sum(dim=1))
            collision.append((2 * logp).logsumexp(dim=1))
        return torch.cat(entropy), torch.cat(collision)

    def _chunks(self, hidden: Tensor, target: Tensor):
        return zip(hidden.split(self.chunk_tokens), target.split(self.chunk_tokens), strict=True)

    def _logps(self, hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = self._logits(hidden, weight, bias)
        return logits.gather(1, target[:, None])[:, 0] - torch.logsumexp(logits, dim=1)

    def _logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = F.linear(hidden, weight, bias).float()  # [chunk, vocabulary]
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits


def sum_by_completion(token_logps: Tensor, rows: PackedRows) -> Tensor:
    """Sum token log-probs [rows] over each completion: float32 [completions].

    The running sum is kept in float64: over hundreds of tokens a float32 one loses 1e-4 nats, which beta and the
    difference of two such sums turn into a visible error of the loss.
    """
    sums = torch.zeros(len(rows.lengths), dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, rows.completion_of_row, token_logps.double()).float()
