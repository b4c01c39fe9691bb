"""Where preference data comes from, and how a row of it says its preference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from .base import StrictModel
from .extension import FORMATS, installed_names

BuiltInFormat = Literal[
    "auto",
    "text",
    "messages",
    "implicit_messages",
    "implicit_text",
    "hh",
    "unpaired",
    "scored",
    "verdicts",
    "alpaca",
    "sharegpt",
    "axolotl",
    "nemo",
    "swift",
    "compared",
]
if TYPE_CHECKING:
    RowFormat = str
else:
    RowFormat = Literal[(*get_args(BuiltInFormat), *installed_names(FORMATS, get_args(BuiltInFormat)))]


class Columns(StrictModel):
    """Name the columns of a source that calls them otherwise. What is left out has the format's own name."""

    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    completion: str | None = None
    """Of an unpaired row."""

    completions: str | tuple[str, ...] | None = None
    """The list of completions; or a column for each of them, as PandaLM has."""

    label: str | None = None
    """Of an unpaired row: whether its completion is good."""

    scores: str | tuple[str, ...] | None = None
    """The list of scores beside a list of completions; or the score's name within a completion; or a column for each."""

    ranks: str | None = None
    """As `scores`, where the lowest is the best."""

    annotators: tuple[str, ...] | None = None
    """Columns of one verdict each: 0 a tie, otherwise the number of the better completion, from 1; null for none."""

    preference: str | None = None
    """Of compared rows: which of two completions is better. A name that ends with _id counts from 0; in others, words such
    as model_a, b or tie."""

    query: str | None = None
    """Of swift rows without messages: the user's last turn."""

    system: str | None = None
    history: str | None = None
    """Earlier turns of alpaca rows: a list of [user, assistant]."""

    input: str | None = None
    """Of alpaca and verdict rows: text that belongs to the instruction."""

    tools: str | None = None
    """JSON schemas of the tools that the chat template lists; a list, or JSON text."""

    chat_template_kwargs: str | None = None
    """A mapping of further variables for the chat template."""


class RowSource(StrictModel):
    """What every source of rows can say about them."""

    name: str | None = Field(default=None, min_length=1)
    """What accounts, reports and metrics call this source; left out: each file by its own name."""

    format: RowFormat = "auto"
    """How a row says its preference. auto recognises each row by itself; docs/recipes.md shows a row of each."""

    columns: Columns = Columns()

    criteria: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    """Of completions with several ratings (helpfulness, honesty, ...): their weights in the score.
    Left out: the overall score."""

    weight: float | None = Field(default=None, gt=0)
    """Share among the sources of its set, relative to their weights; all of them have one, or none has.
    As many groups are taken as that allows without taking any twice. Left out: all groups of all sources."""

    max_groups: int | None = Field(default=None, gt=0)
    """Take at most so many groups: a fair sample of the source, always the same."""


class FilesSource(RowSource):
    """Read files: JSON Lines, a JSON list, CSV or TSV (each plain, .gz or .zst), Parquet, Arrow, or what `datasets` saved."""

    type: Literal["files"] = "files"
    path: str | tuple[str, ...]
    """A file, a glob or a directory, here or at s3://, gs:// or hf://datasets/NAME@REVISION/; one file at https://; or a
    list of these. The end of a file's name says its kind; a directory may hold several kinds."""

    split: Literal["train", "validation", "test"] | None = None
    """Of a directory whose files or folders are named by their split (train.jsonl, test/...): read this one alone."""


class HubSource(RowSource):
    """Read a data set of the Hugging Face hub, which is downloaded as a whole at first; hf:// reads its files as they are."""

    type: Literal["hub"] = "hub"
    path: str = Field(min_length=1)
    """The data set's name, such as HuggingFaceH4/ultrafeedback_binarized."""

    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    """A branch, tag or, best, a 40-hex commit: only a commit makes the run reproducible."""


class SyntheticSource(StrictModel):
    """Make reviews by a small grammar, labelled by Bradley-Terry with a known reward (needs no network)."""

    type: Literal["synthetic"] = "synthetic"
    pairs: int = Field(default=2000, gt=0, le=100_000_000)
    """Training and held-out pairs are disjoint: which they are follows from where this source stands."""

    seed: int = 0
    name: str | None = Field(default=None, min_length=1)
    weight: float | None = Field(default=None, gt=0)
    """As of files."""

    max_groups: int | None = Field(default=None, gt=0)


def _source_from_string(value: Any) -> Any:
    """Accept a plain string (or list of strings) as the path of files, `hub:NAME` as a hub data set, `synthetic`."""
    if isinstance(value, str):
        if value == "synthetic":
            return {"type": "synthetic"}
        if value.startswith("hub:"):
            return {"type": "hub", "path": value.removeprefix("hub:")}
        return {"type": "files", "path": value}
    if isinstance(value, dict) and "type" not in value and "path" in value:
        return {"type": "files", **value}
    return value


SourceSection = FilesSource | HubSource | SyntheticSource
Source = Annotated[
    SourceSection,
    Field(discriminator="type"),
    BeforeValidator(_source_from_string, json_schema_input_type=str | SourceSection),
]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | dict | StrictModel) else value


Sources = Annotated[
    tuple[Source, ...],
    BeforeValidator(_as_list, json_schema_input_type=str | SourceSection | tuple[str | SourceSection, ...]),
]
