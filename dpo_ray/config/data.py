"""The recipe section `data`: which rows are read, which are used, and how they are processed before training."""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from .base import MOST_TOKENS, StrictModel, field_error
from .sources import Sources

EVAL = "eval"
NAMED_TEMPLATE = re.compile(r"name:(\w[\w.-]*)", re.ASCII)  # one of several templates of a tokenizer
TEMPLATE_DATE = datetime.date(2024, 7, 26)


def names_no_file(chat_template: str) -> bool:
    """Return whether a recipe's `chat_template` is a keyword such as `auto`, and not the path of a file."""
    return chat_template in ("auto", "plain") or NAMED_TEMPLATE.fullmatch(chat_template) is not None


class PairingConfig(StrictModel):
    """How completions with scores, ranks or verdicts become preferences."""

    pairs: Literal["best_worst", "all", "adjacent", "list"] = "best_worst"
    """How pairs are made from K > 2 completions. best_worst: the best and the worst completion. all: each completion with
    every worse one. adjacent: each completion with the next one in the ranking. list: no pairs, but the whole ranking,
    for objectives that learn from lists."""

    min_margin: float = Field(default=0.0, ge=0)
    """Smallest difference between the two scores of a pair. Pairs with a smaller difference are dropped. Two equal
    scores are always a tie."""

    ties: Literal["drop", "keep"] = "drop"
    """Rows with two equally good completions. drop: leave the row out. keep: train on it with the label 1/2, the
    probability that chosen is better."""

    annotators: Literal["probability", "majority", "unanimous"] = "probability"
    """Pairs that several annotators have judged. probability: the mean of their verdicts is a soft label, the probability
    that chosen is better; a tie counts as one half. majority: the verdict of the majority is the label. unanimous: only
    pairs on which all agree are used."""


ControlCharacters = Literal["quarantine", "clean", "keep"]


class RulesConfig(StrictModel):
    """Rules that leave out rows although they are valid. The data report counts these rows for each rule separately."""

    special_tokens: Literal["quarantine", "allow"] = "quarantine"
    """Rows whose text contains the spelling of a special token, which the tokenizer would read as that token."""

    dropped_content: Literal["quarantine", "keep"] = "quarantine"
    """Rows with content that the chat template does not write, such as tool calls, names or reasoning. keep: train on
    what the template writes."""

    control_characters: ControlCharacters = "quarantine"
    """Rows whose text contains control characters, such as form feeds or escape sequences of a terminal. clean: remove
    the characters, but replace form feeds and vertical tabs by line ends. keep: train on the text as it is."""

    conflicts: Literal["drop", "keep"] = "drop"
    """Pairs that the data also contains with chosen and rejected swapped. drop: leave out both pairs."""

    leakage: Literal["drop", "keep"] = "drop"
    """Training rows whose prompt is also in the held-out data. drop: leave these rows out of training."""

    near_duplicates: float | None = Field(default=None, gt=0, le=1)
    """Leave out rows whose similarity to an earlier row is at least this value (Jaccard similarity of their 5-grams of
    tokens, estimated by MinHash; 0.8 is usual). Exact duplicates are always left out. null: near duplicates are kept."""

    filters: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")], ...] = ()
    """Your own functions, as `module:function`. A function is called with the prompt (text or messages) and the list of
    completions (text). It returns True to keep the row. To leave the row out, it returns False or the reason as text."""


def _shape_of_eval(value: Any) -> str:
    is_sets = isinstance(value, dict) and not {"type", "path"} & value.keys()
    return "sets" if is_sets else "sources"


SetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
EvalSources = Annotated[
    Annotated[Sources, Tag("sources")] | Annotated[dict[SetName, Sources], Tag("sets")], Discriminator(_shape_of_eval)
]


class DataConfig(StrictModel):
    """Which data is read, how the chat template writes it, which rows are used, and how long they may be."""

    train: Sources
    """Training data: a path or glob, `hub:NAME`, `synthetic`, a mapping with `type`, or a list of these."""

    eval: EvalSources = ()
    """Held-out data, in the same forms as `train`; or several named sets, as a mapping from NAME to sources. Without
    held-out data no held-out accuracy is measured."""

    chat_template: str = "auto"
    """auto: the tokenizer's own template. name:NAME: the template NAME, if the tokenizer has several templates. plain:
    no template; the text is used as it is. Any other value is the path of a Jinja file."""

    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Further variables for the template, such as enable_thinking. Variables that a row sets take precedence."""

    chat_template_date: datetime.date = TEMPLATE_DATE
    """The date that a template gets when it asks for today's date. The date is fixed, so that the same data gives the
    same tokens on every day."""

    max_length_tokens: int = Field(default=1024, gt=1, le=MOST_TOKENS)
    """Largest number of tokens of prompt and completion together."""

    max_prompt_tokens: int | None = Field(default=None, gt=0, le=MOST_TOKENS)
    """Largest number of tokens of a prompt; null: no limit. With truncation=keep_end, the start of a longer prompt is
    cut off. With the other values of truncation, rows with a longer prompt are left out."""

    truncation: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """Rows that are too long. keep_start: cut off the end of the completion. keep_end: cut off the start of the prompt.
    drop: leave the row out."""

    pairing: PairingConfig = PairingConfig()
    rules: RulesConfig = RulesConfig()

    max_quarantined_fraction: float = Field(default=0.01, ge=0, le=1)
    """Largest allowed share of invalid rows, for the training rows and for each held-out set. If the share is larger, the
    run stops before anything expensive starts. Rows that a rule of the recipe leaves out do not count as invalid."""

    rows_per_part: int = Field(default=2048, gt=0, le=10_000_000)
    """Largest number of rows in one Parquet file (part) of token ids. Rows are tokenized in batches of this size."""

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
                    f"chat_template_kwargs.{name}",
                    "each row sets this variable by itself, so no value for all rows is possible: remove it",
                )
        for split, sources in {"train": self.train, **self.eval_sets}.items():
            if not sources:
                raise field_error(split.replace("_", ".", 1), "no source is set")
            if len({source.weight is None for source in sources}) > 1:
                raise field_error(
                    split.replace("_", ".", 1),
                    "some sources have a weight and others have none: set a weight for all or none",
                )
        return self
