"""The sources of preference data, and how the columns of a row state the preference."""

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
    """The names of a source's columns, if they differ from the usual names of the format. null: the usual name."""

    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    completion: str | None = None
    """The column with the only completion of an unpaired row."""

    completions: str | tuple[str, ...] | None = None
    """The column with the list of completions; or a list of columns, one for each completion, as in PandaLM's data."""

    label: str | None = None
    """The column that states whether the completion of an unpaired row is good."""

    scores: str | tuple[str, ...] | None = None
    """The column with the list of scores; or the key of the score, if each completion is a mapping; or a list of
    columns, one for each completion."""

    ranks: str | None = None
    """Like `scores`, but for ranks instead of scores. The completion with the lowest rank is the best."""

    annotators: tuple[str, ...] | None = None
    """Columns, each with one annotator's verdict: 0 is a tie, 1 or 2 is the better completion, null is no verdict."""

    preference: str | None = None
    """The column that names the better of the two completions of a compared row. If the column's name ends with _id,
    its values are 0 or 1. In preference_strength and overall_preference, a negative value means that the first
    completion is better. In any other column, the values are words such as model_a, b or tie."""

    query: str | None = None
    """The column with the user's last turn, in a row of the format swift that has no messages."""

    system: str | None = None
    history: str | None = None
    """The column with the earlier turns of an Alpaca row, as a list of [user, assistant]."""

    input: str | None = None
    """The column with additional text for the instruction, in an Alpaca row or a row with verdicts."""

    tools: str | None = None
    """The column with the JSON schemas of tools, as a list or as JSON text. The chat template writes them into the
    prompt."""

    chat_template_kwargs: str | None = None
    """The column with further variables for the chat template, as a mapping."""


class RowSource(StrictModel):
    """The fields of every source that reads rows: its name, the format of its rows, and how many of them are used."""

    name: str | None = Field(default=None, min_length=1)
    """Name of this source in reports and metrics. null: reports and metrics name each file separately."""

    format: RowFormat = "auto"
    """Format of the rows. auto: the format of each row is recognised separately. docs/recipes.md shows a row of each
    format."""

    columns: Columns = Columns()

    criteria: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    """Weights of the ratings (helpfulness, honesty, ...) in the score of a completion that has several ratings. Empty: the
    overall score is used."""

    weight: float | None = Field(default=None, gt=0)
    """Weight of this source in the mixture. Either all sources of a set have a weight, or none has. The groups of the
    sources are used in proportion to the weights: as many as possible without using a group twice. null: all groups are
    used."""

    max_groups: int | None = Field(default=None, gt=0)
    """Largest number of groups that are used. If the source has more, a random sample is used, which is the same in
    every run."""


class FilesSource(RowSource):
    """Files of rows: JSON Lines, a JSON list, CSV or TSV (all plain, .gz or .zst), Parquet, Arrow, or a data set that
    `datasets` saved."""

    type: Literal["files"] = "files"
    path: str | tuple[str, ...]
    """A file, a glob or a directory, each on a disk or at s3://, gs:// or hf://datasets/NAME@REVISION/; or one file at
    https://; or a list of these. The ending of a file's name determines the kind of the file. A directory may contain
    files of several kinds."""

    split: Literal["train", "validation", "test"] | None = None
    """Read only the files of this split. The split of a file is shown by a word in the name of the file or of its
    folder, such as train.jsonl or test/. null: read all files, which must then not belong to several splits."""


class HubSource(RowSource):
    """A data set of the Hugging Face hub. The whole data set is downloaded before its first row is read.

    To download only some files of a data set, use `type: files` with a `path` that begins with hf://datasets/.
    """

    type: Literal["hub"] = "hub"
    path: str = Field(min_length=1)
    """Name of the data set, such as HuggingFaceH4/ultrafeedback_binarized."""

    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    """A branch, a tag or, preferably, a commit of 40 hex digits: only a commit makes the run reproducible."""


class SyntheticSource(StrictModel):
    """Synthetic reviews, made from a small grammar. Labels follow a Bradley-Terry model with a known reward."""

    type: Literal["synthetic"] = "synthetic"
    pairs: int = Field(default=2000, gt=0, le=100_000_000)
    """Number of pairs. A source under data.train never has a pair of a source under data.eval."""

    seed: int = 0
    name: str | None = Field(default=None, min_length=1)
    weight: float | None = Field(default=None, gt=0)
    """Weight of this source in the mixture, with the same meaning as for a source of files."""

    max_groups: int | None = Field(default=None, gt=0)


def _source_from_string(value: Any) -> Any:
    """Convert a string to the fields of a source: `synthetic`, `hub:NAME`, or otherwise the path of files.

    Add `type: files` to a mapping that has a `path`, but no `type`.
    """
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
