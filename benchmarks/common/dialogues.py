"""Make preference rows of HH-RLHF's length: multi-turn dialogues with two answers each, in files of JSON Lines.

Lengths follow the 1,600 training dialogues of HH-RLHF's harmless-base subset, as measured with a byte-level BPE of 4,096
entries (tokens), by white space (words) and in characters; median / 95th percentile:

    part      tokens       words       characters
    prompt    101 / 376    64 / 252    357 / 1,389    29 % have one turn of the user, 25 % two, 25 % three, 15 % four
    chosen     29 / 131    21 /  94    112 /   518
    rejected   39 / 170    27 / 115    146 /   638

A turn of the user has a log-normal number of words (of their logarithm: mean 2.26, deviation 0.75), one of the assistant
another (3.10, 0.90). Words are made of syllables and drawn by the Zipf-Mandelbrot law, with an exponent at which they repeat as
often as there: among 10,000, 90,000 and 240,000 words HH-RLHF has 1,900, 7,400 and 13,000 different ones (without punctuation
and case), these rows 2,100, 8,500 and 15,000. How often words repeat matters to whatever remembers them. Curly quotes (in four
dialogues of five there) and double spaces are as frequent as there. The same arguments give the same bytes.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

Layout = Literal["messages", "hh"]
"""messages: TRL's conversational type with an explicit prompt. hh: two whole dialogues as text, as HH-RLHF has them."""

MAKER_VERSION = 1
USER_TURNS = (0.29, 0.25, 0.25, 0.15, 0.03, 0.01, 0.01, 0.01)  # of dialogues with 1, 2, ... turns of the user
USER_WORDS, ASSISTANT_WORDS = (2.26, 0.75), (3.10, 0.9)  # mean and deviation of the logarithm
CHOSEN_WORDS, REJECTED_WORDS = (3.12, 0.93), (3.38, 0.93)
SHORTEST_WORDS, LONGEST_WORDS = 2, 400
VOCABULARY_WORDS, RANK_OFFSET, RANK_EXPONENT = 60_000, 12, 1.45
ENDINGS = {"": 0.849, "’s": 0.02, "'s": 0.012, ",": 0.043, ".": 0.026, ". ": 0.026, "?": 0.02, ".\n\n": 0.004}
"""What stands behind a word, before the space, and how often. Half of HH-RLHF's sentences end with two spaces."""

TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Dialogue:
    """A prompt whose turns alternate, the user first and last, and two answers to it."""

    turns: tuple[str, ...]
    chosen: str
    rejected: str

    def row(self, layout: Layout) -> dict[str, Any]:
        """Write it as a row of the layout."""
        if layout == "hh":
            told = "".join(
                f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}" for i, turn in enumerate((*self.turns, ""))
            ).removesuffix(" ")
            return {"chosen": f"{told} {self.chosen}", "rejected": f"{told} {self.rejected}"}
        prompt = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(self.turns)]
        chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in (self.chosen, self.rejected))
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def write_files(
    directory: Path, rows: int, rows_per_file: int, layout: Layout, real: Sequence[Dialogue] = ()
) -> list[Path]:
    """Make `rows` rows in files of `rows_per_file`, spliced from `real` dialogues where there are any.

    A file that is there is kept: its name says what is in it, and file i is the same however many follow it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, first in enumerate(range(0, rows, rows_per_file)):
        size = min(rows_per_file, rows - first)
        path = directory / f"{layout}-{index:05d}-{size}.jsonl"
        paths.append(path)
        if path.exists():
            continue
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as stream:
            for dialogue in spliced(real, size, seed=index) if real else made(size, seed=index):
                stream.write(json.dumps(dialogue.row(layout), ensure_ascii=False) + "\n")
        partial.rename(path)
    return paths


def made(count: int, seed: int) -> Iterator[Dialogue]:
    """Make `count` dialogues of made words."""
    rng = np.random.default_rng([MAKER_VERSION, seed])
    user_turns = rng.choice(len(USER_TURNS), count, p=USER_TURNS) + 1
    shapes = [
        (*(ASSISTANT_WORDS if i % 2 else USER_WORDS for i in range(2 * n - 1)), CHOSEN_WORDS, REJECTED_WORDS)
        for n in user_turns
    ]
    means, deviations = np.array([parameters for shape in shapes for parameters in shape]).T
    lengths = np.clip(rng.lognormal(means, deviations), SHORTEST_WORDS, LONGEST_WORDS).astype(int).tolist()
    texts = _texts(lengths, rng)
    for shape in shapes:
        *turns, chosen, rejected = (next(texts) for _ in shape)
        yield Dialogue(tuple(turns), chosen, rejected)


def _texts(lengths: Sequence[int], rng: np.random.Generator) -> Iterator[str]:
    """Yield a text of each of the lengths, in words."""
    words, cumulative = _vocabulary()
    total = sum(lengths)
    drawn = np.searchsorted(cumulative, rng.random(total)).tolist()
    endings = rng.choice(np.array(list(ENDINGS), object), total, p=list(ENDINGS.values())).tolist()
    ends_sentence = {ending: ending[:1] in (".", "?") for ending in ENDINGS}
    written, begins = [], True
    for word, ending in zip(drawn, endings, strict=True):
        written.append((words[word].capitalize() if begins else words[word]) + ending)
        begins = ends_sentence[ending]
    first = 0
    for length in lengths:
        text = " ".join(written[first : first + length]).replace("\n\n ", "\n\n").rstrip("\n ,")
        yield text if text[-1] in ".?" else text + "."
        first += length


@cache
def _vocabulary() -> tuple[list[str], np.ndarray]:
    """Return the words, the most frequent first, and their cumulative probability, proportional to (rank + offset) ** -exponent."""
    rng = random.Random(MAKER_VERSION)
    onsets, codas = [*"bcdfghjklmnprstvw", "st", "th", "ch", "tr", ""], ["", "", "", *"nrstl"]
    vowels = [*"aeiou", *"aeiou", "ea", "ou"]
    words: dict[str, None] = {}
    while len(words) < VOCABULARY_WORDS:
        longest = 1 if len(words) < 200 else 2 if len(words) < 1000 else 3
        syllables = (
            rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) for _ in range(rng.randint(1, longest))
        )
        words["".join(syllables)] = None
    shares = (np.arange(VOCABULARY_WORDS) + 1.0 + RANK_OFFSET) ** -RANK_EXPONENT
    return list(words), np.cumsum(shares / shares.sum())


def read_hh(paths: Sequence[Path]) -> list[Dialogue]:
    """Read dialogues in HH-RLHF's text; one whose two sides differ before the last answer is left out."""
    dialogues = []
    for path in paths:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
            for row in map(json.loads, stream):
                sides = [TURN.split(row[side])[1:] for side in ("chosen", "rejected")]  # role, text, role, text, ...
                (turns, chosen), (other_turns, rejected) = ((side[:-1], side[-1].strip()) for side in sides)
                texts = tuple(text.strip() for text in turns[1::2])
                alternate = turns[::2] == [("Human", "Assistant")[i % 2] for i in range(len(texts) + 1)]
                if turns == other_turns and alternate and all((*texts, chosen, rejected)):
                    dialogues.append(Dialogue(texts, chosen, rejected))
    return dialogues


def spliced(real: Sequence[Dialogue], count: int, seed: int) -> Iterator[Dialogue]:
    """Bootstrap `count` dialogues: the shape of a real one, every text the halves of two real texts of its kind."""
    rng = random.Random(seed)
    users = [turn for dialogue in real for turn in dialogue.turns[::2]]
    assistants = [turn for dialogue in real for turn in dialogue.turns[1::2]]
    chosen, rejected = [d.chosen for d in real], [d.rejected for d in real]
    while count:
        shape = rng.choice(real)
        turns = tuple(_halves(assistants if i % 2 else users, rng) for i in range(len(shape.turns)))
        dialogue = Dialogue(turns, _halves(chosen, rng), _halves(rejected, rng))
        if dialogue.chosen != dialogue.rejected:
            count -= 1
            yield dialogue


def _halves(texts: Sequence[str], rng: random.Random) -> str:
    first, second = rng.choice(texts).split(" "), rng.choice(texts).split(" ")
    return " ".join((*first[: (len(first) + 1) // 2], *second[len(second) // 2 :])).strip()
