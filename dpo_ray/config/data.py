"""What is read, what is admitted, and what is done to a row before training sees it."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from .base import StrictModel, field_error
from .sources import Sources

EVAL = "eval"


class PairingConfig(StrictModel):
    """Say how completions with scores, ranks or verdicts become preferences."""

    pairs: Literal["best_worst", "all", "adjacent", "list"] = "best_worst"
    """Of K > 2 completions: the best against the worst; every better against every worse; each against the next;
    or the whole ranked list, for listwise objectives."""

    min_margin: float = Field(default=0.0, ge=0)
    """Smallest difference of scores that makes a pair. A pair of equal scores is a tie, whatever this is."""

    ties: Literal["drop", "keep"] = "drop"
    """Of two completions that are as good as each other: leave the row out, or train on it with probability 1/2."""

    annotators: Literal["probability", "majority", "unanimous"] = "probability"
    """Of several verdicts on a pair: their mean as the probability that chosen is better (a soft label; a tie counts
    half); what most say; or only what all say."""


class RulesConfig(StrictModel):
    """Say which sound rows are left out nevertheless; each rule has its own reason in the account."""

    special_tokens: Literal["quarantine", "allow"] = "quarantine"
    """Text of a row that spells one of the tokenizer's special tokens, and so would be read as one."""

    conflicts: Literal["drop", "keep"] = "drop"
    """Pairs that the data also holds the other way round: leave out both."""

    leakage: Literal["drop", "keep"] = "drop"
    """Training rows whose prompt is also one of held-out data: leave them out of training."""

    near_duplicates: float | None = Field(default=None, gt=0, le=1)
    """Rows that are as similar as this to an earlier one (Jaccard similarity of their 5-grams of tokens, estimated by
    MinHash; 0.8 is usual): leave them out. Exact duplicates are always left out. Unset: no search."""

    filters: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")], ...] = ()
    """Functions of yours, as `module:function`. Each is called with the prompt (text or messages) and the list of
    completions (text); it returns True to keep the row, False or a text that says why to leave it out."""


def _shape_of_eval(value: Any) -> str:
    is_sets = isinstance(value, dict) and not {"type", "path"} & value.keys()
    return "sets" if is_sets else "sources"


SetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
EvalSources = Annotated[
    Annotated[Sources, Tag("sources")] | Annotated[dict[SetName, Sources], Tag("sets")], Discriminator(_shape_of_eval)
]


class DataConfig(StrictModel):
    """Say what is read, how it is rendered, what is admitted, and how long it may be."""

    train: Sources
    """Training data: a path or glob, `hub:NAME`, `synthetic`, a mapping with `type`, or a list of these."""

    eval: EvalSources = ()
    """Held-out data, in the same forms; or several sets by name, `NAME: sources`. Without it there is no held-out
    accuracy."""

    chat_template: str = "auto"
    """auto: the tokenizer's own template. plain: text as it is, no template. Otherwise the path of a Jinja file."""

    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Further variables for the template, such as enable_thinking; a row's own go before them."""

    chat_template_date: datetime.date = datetime.date(2024, 7, 26)
    """What a template that asks for today's date is told, so that the same data gives the same tokens on every day."""

    max_length_tokens: int = Field(default=1024, gt=1)
    """Longest prompt + completion."""

    max_prompt_tokens: int | None = Field(default=None, gt=0)
    """Longest prompt; of a longer one, keep_end keeps the end, otherwise the row is left out. Unset: no limit of its own."""

    truncation: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """Too long: cut the completion's end, cut the prompt's start, or leave the row out."""

    pairing: PairingConfig = PairingConfig()
    rules: RulesConfig = RulesConfig()

    max_quarantined_fraction: float = Field(default=0.01, ge=0, le=1)
    """Of the rows of training or of a held-out set, the largest share that may be unsound; more stop the run before anything
    expensive. What your own rules leave out does not count."""

    rows_per_part: int = Field(default=2048, gt=0)
    """Rows of one Parquet part: the granule of work and of restarts."""

    @property
    def eval_sets(self) -> dict[str, Sources]:
        """Held-out data by the name of its split: `eval`, or `eval_NAME` for each set."""
        if isinstance(self.eval, dict):
            return {f"{EVAL}_{name}": sources for name, sources in self.eval.items()}
        return {EVAL: self.eval} if self.eval else {}

    @model_validator(mode="after")
    def _sources_agree(self) -> DataConfig:
        for name in ("messages", "tools", "add_generation_prompt"):
            if name in self.chat_template_kwargs:
                raise field_error(f"chat_template_kwargs.{name}", "this is the conversation's own; rows say it")
        for split, sources in {"train": self.train, **self.eval_sets}.items():
            if not sources:
                raise field_error(split.replace("_", ".", 1), "no source is given")
            if len({source.weight is None for source in sources}) > 1:
                raise field_error(split.replace("_", ".", 1), "some sources have a weight and some have none")
        return self
