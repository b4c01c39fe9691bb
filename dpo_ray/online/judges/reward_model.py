"""A judge that uses a Hugging Face reward model. Each prompt with its completion is one row of a forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpo_ray.artifacts.digest import digest
from dpo_ray.config.data import TEMPLATE_DATE
from dpo_ray.config.judge import RewardModelJudge
from dpo_ray.config.model import ModelConfig
from dpo_ray.data.tokenizing.chat import AUTO, load_tokenizer, resolve_template, template_variables
from dpo_ray.data.tokenizing.template_process import Asked, TemplateProcess
from dpo_ray.data.tokenizing.template_program import DONE
from dpo_ray.errors import ConfigError, JudgeError
from dpo_ray.models.load import model_directory, model_identity, tokenizer_identity

from .memory import remembered
from .protocol import Memory, Question, Usage, Verdict


class JudgeByRewardModel:
    """A judge that holds a reward model.

    The score of a completion depends only on the prompt and the completion, not on the other completions in the batch.
    """

    def __init__(self, config: RewardModelJudge, memory: Memory, device: str) -> None:
        """Load the model: in float32 on a CPU, in bfloat16 on a GPU.

        Raises:
            ConfigError: the model cannot be loaded, or is not a reward model.
        """
        self._config, self._memory, self._device = config, memory, device
        with named_by_judge(config):
            directory = model_directory(ModelConfig(path=config.path, revision=config.revision))
            self._tokenizer = load_tokenizer(str(directory))
            self._template = resolve_template(AUTO, self._tokenizer) if self._tokenizer.chat_template else None
        self._process = TemplateProcess()
        self._tokenizer.padding_side = "right"
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._model = _load(directory, dtype, place_of(config)).to(device).eval()  # type: ignore[arg-type]

    @property
    def usage(self) -> Usage:
        return Usage()

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Yield the index and the verdict of each question (a prompt with its completions), batch by batch.

        Raises:
            JudgeError: a score is not finite.
        """
        return remembered(questions, self._memory, self._config.questions_per_batch, self._ask)

    def close(self) -> None:
        self._process.close()
        del self._model

    def _ask(self, questions: Sequence[Question]) -> list[Verdict]:
        limit = self._config.max_length_tokens
        rows = self._token_ids([(q.prompt, completion) for q in questions for completion in q.completions])
        fitting = sorted((i for i, row in enumerate(rows) if len(row) <= limit), key=lambda i: len(rows[i]))
        scores: dict[int, float] = {}
        for start in range(0, len(fitting), self._config.completions_per_batch):
            batch = fitting[start : start + self._config.completions_per_batch]
            scores |= zip(batch, self._scores([rows[i] for i in batch]), strict=True)
        verdicts, first = [], 0
        for question in questions:
            last = first + len(question.completions)
            own = tuple(scores.get(i) for i in range(first, last))
            longest, first = max(map(len, rows[first:last]), default=0), last
            reason = f"longer than max_length_tokens={limit}: {longest} tokens" if None in own else ""
            verdicts.append(Verdict(own, reason=reason))
        return verdicts

    def _token_ids(self, conversations: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Tokenize conversations of a prompt and a completion.

        If the model has a chat template, the template is used. Otherwise prompt and completion are joined to one text.
        For an encoder such as BERT, the tokenizer puts its separator token between prompt and completion.

        Raises:
            JudgeError: the template cannot render a conversation.
        """
        tokenizer: Any = self._tokenizer
        if self._template is not None:
            texts = self._rendered(self._template, conversations)
            return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        if tokenizer.sep_token_id is not None:
            return [tokenizer(prompt, completion)["input_ids"] for prompt, completion in conversations]
        return [tokenizer(prompt + completion)["input_ids"] for prompt, completion in conversations]

    def _rendered(self, template: str, conversations: Sequence[tuple[str, str]]) -> list[str]:
        turns = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            for prompt, completion in conversations
        ]
        asked = [Asked(0, {"tools": None}, [(messages, False)]) for messages in turns]
        texts: list[str] = []
        variables = template_variables(self._tokenizer)
        while len(texts) < len(asked):
            for answer in self._process.render((template,), TEMPLATE_DATE, variables, asked[len(texts) :]):
                if answer.end != DONE:
                    fix = (
                        "use a reward model whose chat template accepts a turn of the user and a turn of the assistant"
                    )
                    raise JudgeError(
                        f"the chat template of the reward model failed: {answer.detail}",
                        where=place_of(self._config),
                        fix=fix,
                    )
                texts += answer.texts
        return texts

    @torch.inference_mode()
    def _scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        config = self._model.config.get_text_config()
        own_padding = config.pad_token_id
        padding = _absent(rows) if own_padding is None else own_padding
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self._device)
        try:
            config.pad_token_id = padding  # transformers uses it to find the last token of a row
            logits = self._model(input_ids=ids, attention_mask=mask).logits
        finally:
            config.pad_token_id = own_padding
        scores = logits[:, 0].float().tolist()
        if not all(map(math.isfinite, scores)):
            fix = "check that the model's weights are complete, and that it works in this dtype"
            raise JudgeError("the reward model gave a score that is not finite", where=place_of(self._config), fix=fix)
        return scores


def _absent(rows: Sequence[Sequence[int]]) -> int:
    """Return a token id that no row contains, for a model without a padding token.

    If a row contained the token that is used for padding, the end of the row would not be found.
    """
    present = {token for row in rows for token in row}
    return next(token for token in range(len(present) + 1) if token not in present)


def _load(directory: Path, dtype: torch.dtype, where: str) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            directory,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        fix = "use a sequence classifier that this version of transformers supports"
        raise ConfigError(
            f"transformers cannot load the model: {str(error).splitlines()[0]}", where=where, fix=fix
        ) from None
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers would initialise them at random
        fix = "use a reward model: a language model has no head that scores"
        raise ConfigError(f"the files lack `{missing[0]}`", where=where, fix=fix)
    check_outputs(model.config, where)
    return model


def check_outputs(config: PreTrainedConfig, where: str) -> None:
    """Check that a classifier has one output, as a reward model does.

    Raises:
        ConfigError: the classifier has another number of outputs.
    """
    if config.num_labels != 1:
        fix = "use a reward model: a classifier with one output (num_labels 1)"
        raise ConfigError(f"the classifier has {config.num_labels} outputs, not 1", where=where, fix=fix)


def reward_model_identity(config: RewardModelJudge) -> str:
    """Return a digest of the reward model and its tokenizer.

    The digest is computed from the files of both. For a hub model that is not on this machine, it is computed from the
    model's name and revision.
    """
    model = ModelConfig(path=config.path, revision=config.revision)
    with named_by_judge(config):
        return digest([model_identity(model), tokenizer_identity(model)])


@contextmanager
def named_by_judge(config: RewardModelJudge) -> Iterator[None]:
    """Put the recipe's field of the judge into a ConfigError: the code that loads models names the policy's field."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(error.what, where=place_of(config), fix=error.fix) from None


def place_of(config: RewardModelJudge) -> str:
    """Return the recipe's field of the reward model with the model's path, for use in errors."""
    return f"online.judge.path={config.path}"
