"""The section `data`: what is read, what is admitted, and how rows are processed before training."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from .base import StrictModel, field_error
from .sources import Sources

EVAL = "eval"
TEMPLATE_DATE = datetime.date(2024, 7, 26)


class PairingConfig(StrictModel):
    """How completions with scores, ranks or verdicts become preferences."""

    pairs: Literal["best_worst", "all", "adjacent", "list"] = "best_worst"
    """Pairs that are made of K > 2 completions: the best with the worst; each with every worse one; each with the next;
    or the whole ranked list, for listwise objectives."""

    min_margin: float = Field(default=0.0, ge=0)
    """Smallest difference of scores for a pair. Two equal scores are a tie, whatever this value is."""

    ties: Literal["drop", "keep"] = "drop"
    """Two equally good completions: leave the row out, or train on it with probability 1/2."""

    annotators: Literal["probability", "majority", "unanimous"] = "probability"
    """Several verdicts on a pair: use their mean as the probability that chosen is better (a soft label; a tie counts
    as one half), the verdict of the majority, or only unanimous verdicts."""


class RulesConfig(StrictModel):
    """Rules by which valid rows are left out as well; each rule has its own reason code in the data report."""

    special_tokens: Literal["quarantine", "allow"] = "quarantine"
    """Rows whose text contains one of the tokenizer's special tokens, which would be read as such a token."""

    dropped_content: Literal["quarantine", "keep"] = "quarantine"
    """Rows of which the chat template does not write everything, such as tool calls, names or reasoning. With keep, the
    rest of such a row is trained on."""

    conflicts: Literal["drop", "keep"] = "drop"
    """Pairs that the data also contains with chosen and rejected swapped: leave out both."""

    leakage: Literal["drop", "keep"] = "drop"
    """Training rows whose prompt is also in the held-out data: leave them out of training."""

    near_duplicates: float | None = Field(default=None, gt=0, le=1)
    """Leave out rows whose similarity to an earlier row is at least this value (Jaccard similarity of their 5-grams of
    tokens, estimated by MinHash; 0.8 is usual). Exact duplicates are always left out. Not set: no search."""

    filters: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")], ...] = ()
    """Your own functions, as `module:function`. Each is called with the prompt (text or messages) and the list of
    completions (text). It returns True to keep the row, or False or a text with the reason to leave it out."""


def _shape_of_eval(value: Any) -> str:
    is_sets = isinstance(value, dict) and not {"type", "path"} & value.keys()
    return "sets" if is_sets else "sources"


SetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
EvalSources = Annotated[
    Annotated[Sources, Tag("sources")] | Annotated[dict[SetName, Sources], Tag("sets")], Discriminator(_shape_of_eval)
]


class DataConfig(StrictModel):
    """Which data is read, how it is rendered, what is admitted, and how long it may be."""

    train: Sources
    """Training data: a path or glob, `hub:NAME`, `synthetic`, a mapping with `type`, or a list of these."""

    eval: EvalSources = ()
    """Held-out data, in the same forms, or several named sets, `NAME: sources`. Without it no held-out accuracy is
    measured."""

    chat_template: str = "auto"
    """auto: the tokenizer's own template. plain: the text as it is, without a template. Otherwise the path of a Jinja
    file."""

    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Further variables for the template, such as enable_thinking; those of a row take precedence."""

    chat_template_date: datetime.date = TEMPLATE_DATE
    """The date for templates that use today's date, so that the same data gives the same tokens on every day."""

    max_length_tokens: int = Field(default=1024, gt=1)
    """Maximum length of prompt + completion."""

    max_prompt_tokens: int | None = Field(default=None, gt=0)
    """Maximum length of a prompt. Of a longer one, keep_end keeps the end; otherwise the row is left out. Not set: no
    limit."""

    truncation: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """Rows that are too long: cut off the end of the completion, cut off the start of the prompt, or leave the row
    out."""

    pairing: PairingConfig = PairingConfig()
    rules: RulesConfig = RulesConfig()

    max_quarantined_fraction: float = Field(default=0.01, ge=0, le=1)
    """Largest share of invalid rows, of the training rows or of a held-out set. If there are more, the run stops before
    anything expensive starts. Rows that your own rules leave out do not count."""

    rows_per_part: int = Field(default=2048, gt=0)
    """Rows of one Parquet part: the unit of work, and of what is repeated after a restart."""

    @property
    def eval_sets(self) -> dict[str, Sources]:
        """Return the held-out data by the name of its split: `eval`, or `eval_NAME` for each set."""
        if isinstance(self.eval, dict):
            return {f"{EVAL}_{name}": sources for name, sources in self.eval.items()}
        return {EVAL: self.eval} if self.eval else {}

    @model_validator(mode="after")
    def _sources_agree(self) -> DataConfig:
        for name in ("messages", "tools", "add_generation_prompt"):
            if name in self.chat_template_kwargs:
                raise field_error(
                    f"chat_template_kwargs.{name}", "this is part of the conversation and is set by the rows"
                )
        for split, sources in {"train": self.train, **self.eval_sets}.items():
            if not sources:
                raise field_error(split.replace("_", ".", 1), "no source is set")
            if len({source.weight is None for source in sources}) > 1:
                raise field_error(split.replace("_", ".", 1), "some sources have a weight and others have none")
        return self
