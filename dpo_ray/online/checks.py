"""Checks the judges of a recipe's rounds, and the first rows of their prompts, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import AutoConfig

from dpo_ray.config.judge import RewardModelJudge, VerifierJudge, members_of
from dpo_ray.config.model import ModelConfig, is_hub_name
from dpo_ray.config.online import OnlineConfig
from dpo_ray.config.recipe import Recipe
from dpo_ray.data.first_pass import PrepareTask
from dpo_ray.data.first_rows import FIRST_ROWS
from dpo_ray.data.sources import list_shards
from dpo_ray.data.tokenizing.chat import load_tokenizer
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.models.files import check_weights
from dpo_ray.models.load import model_directory
from dpo_ray.run.preflight import Checked

from .judges.make import make_judge
from .judges.memory import NoMemory
from .judges.reward_model import check_outputs, named_by_judge, place_of
from .prompt_source import first_prompts
from .round_plan import online_of


def check_rounds(recipe: Recipe, checked: Checked) -> None:
    """Check the prompts, the reference answers and the judges of a recipe's rounds.

    Judges are constructed as a check only if Ray runs on this machine alone.

    Raises:
        ConfigError, DataError, InfrastructureError: the first problem that was found.
    """
    online = online_of(recipe)
    if recipe.ray.address == "local":  # keys and namespaces of another machine cannot be seen from here
        check_judges(online)
    for field, judge in online.named_judges().items():
        with _named(field):
            for member in members_of(judge):
                if isinstance(member, RewardModelJudge) and not is_hub_name(member.path):
                    _check_reward_model(member)
    if online.prompts is None:
        return
    shards = list_shards("prompts", online.prompts)
    if is_hub_name(recipe.model.path) or not shards or shards[0].kind == "hub":
        return
    task = PrepareTask(str(model_directory(recipe.model)), checked.template, recipe.data)
    rows, answers, reasons = first_prompts(shards[0], FIRST_ROWS, task)
    if rows and sum(reasons.values()) == rows:
        listed = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        fix = "correct the rows, or set columns.prompt to the name of the column of prompts"
        raise DataError(f"none of the first {rows:,} rows is a valid prompt: {listed}", where="online.prompts", fix=fix)
    if rows and not answers and isinstance(online.judge, VerifierJudge):
        raise DataError(
            f"none of the first {rows:,} rows has a reference answer, with which the verifier compares",
            where="online.prompts",
            fix="rename the column of the reference answers to `answer`, or use another judge",
        )


def check_judges(config: OnlineConfig) -> None:
    """Check, before anything is sampled, that the judges can be constructed.

    For example, API keys are set, patterns are valid, and the process that runs code of completions can be isolated.

    Raises:
        ConfigError: a judge cannot be constructed.
    """
    for field, judge in config.named_judges().items():
        with _named(field):
            for member in members_of(judge):
                if not member.loads_weights:  # those take long to load; `check_rounds` reads the headers of their files
                    make_judge(member, NoMemory()).close()


@contextmanager
def _named(field: str) -> Iterator[None]:
    """Put `field`, the recipe's field of a judge, into a ConfigError; the judge itself does not know this field."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(error.what, where=error.where.replace("online.judge", field, 1), fix=error.fix) from error


def _check_reward_model(judge: RewardModelJudge) -> None:
    where = place_of(judge)
    with named_by_judge(judge):
        directory = model_directory(ModelConfig(path=judge.path, revision=judge.revision))
        check_weights(directory, load_tokenizer(str(directory)).get_vocab(), where)
    check_outputs(AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True), where)
