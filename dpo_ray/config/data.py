"""Where preference data comes from and what is done to a row before training sees it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .base import StrictModel, field_error

RowFormat = Literal["auto", "text", "messages", "implicit_messages", "implicit_text", "hh"]


class Columns(StrictModel):
    """Name the columns of a source that calls them otherwise."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"


class FilesSource(StrictModel):
    """Read JSONL (plain, .gz, .zst), Parquet, or a directory written by `datasets.save_to_disk`."""

    type: Literal["files"] = "files"
    path: str | tuple[str, ...]
    """A file, a glob, a directory or a URI (s3://, gs://); or a list of them."""

    format: RowFormat = "auto"
    """How a row says its preference. auto recognises each row by itself.

    text: prompt, chosen, rejected are strings. messages: they are lists of {role, content}.
    implicit_messages: chosen and rejected are whole conversations that share their beginning.
    hh: chosen and rejected are texts with "\\n\\nHuman:" and "\\n\\nAssistant:" turns (HH-RLHF).
    implicit_text: chosen and rejected are texts whose longest common beginning is the prompt.
    """

    columns: Columns = Columns()


class HubSource(StrictModel):
    """Read a data set of the Hugging Face hub."""

    type: Literal["hub"] = "hub"
    name: str = Field(min_length=1)
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    """A branch, tag or, best, a 40-hex commit: only a commit makes the run reproducible."""

    format: RowFormat = "auto"
    columns: Columns = Columns()


class SyntheticSource(StrictModel):
    """Make reviews by a small grammar, labelled by Bradley-Terry with a known reward (needs no network)."""

    type: Literal["synthetic"] = "synthetic"
    pairs: int = Field(default=2000, gt=0)
    """Training and held-out pairs are disjoint: which they are follows from where this source stands."""

    seed: int = 0


def _source_from_string(value: Any) -> Any:
    """Accept a plain string (or list of strings) as the path of files, `hub:NAME` as a hub data set, `synthetic`."""
    if isinstance(value, str):
        if value == "synthetic":
            return {"type": "synthetic"}
        if value.startswith("hub:"):
            return {"type": "hub", "name": value.removeprefix("hub:")}
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


class DataConfig(StrictModel):
    """Say what is read, how it is rendered, and how long it may be."""

    train: Sources
    """Training data: a path or glob, `hub:NAME`, `synthetic`, a mapping with `type`, or a list of these."""

    eval: Sources = ()
    """Held-out data, in the same forms. Without it there is no held-out accuracy."""

    chat_template: str = "auto"
    """auto: the tokenizer's own template. plain: text as it is, no template. Otherwise the path of a Jinja file."""

    max_length_tokens: int = Field(default=1024, gt=1)
    """Longest prompt + completion."""

    truncation: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """Too long: cut the completion's end, cut the prompt's start, or quarantine the row."""

    rows_per_part: int = Field(default=2048, gt=0)
    """Rows of one Parquet part: the granule of work and of restarts."""

    @model_validator(mode="after")
    def _something_to_train_on(self) -> DataConfig:
        if not self.train:
            raise field_error("train", "no source is given")
        return self
