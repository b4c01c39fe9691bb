"""Generates synthetic film reviews whose true reward is known: controlled sentiment (Rafailov et al. 2023, section 6.1).

A grammar without recursion generates the reviews. The prompt is a neutral opening that stops in the middle of a sentence;
the completion finishes this sentence and the review. The true reward of a completion is the sum of the valences
(sentiment scores) of its words; its mean under the grammar is 0. Preferences follow the Bradley-Terry model with this
reward, so they are noisy, as the preferences of people are. With a real data set, nobody knows the reward behind the
labels; here it is known, so one can measure whether training raised it.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import cache

VALENCES: dict[str, float] = {
    word: valence
    for valence, words in (
        (2.0, "brilliant wonderful superb magnificent perfect dazzling loved thrilled triumph"),
        (1.0, "good charming clever pleasant warm lively enjoyed happy success"),
        (-1.0, "slow dull bland clumsy weak tired disliked bored mistake"),
        (-2.0, "terrible dreadful horrible painful pathetic hopeless hated angry disaster"),
    )
    for word in words.split()
}
"""The valence (sentiment score) of each word that has one. All other words count 0."""

RULES: dict[str, tuple[str, ...]] = {
    "document": ("{prompt}{completion}",),
    "prompt": ("{when} {who} saw a {kind} about {topic}. {lead} the {aspect}",),
    "when": (
        "Yesterday",
        "Last night",
        "Last week",
        "Last year",
        "On Sunday",
        "On Friday",
        "On a train",
        "At home",
        "After work",
        "At a festival",
        "In the summer",
        "In the winter",
    ),
    "who": (
        "I",
        "we",
        "my wife and I",
        "my brother and I",
        "my sister and I",
        "my mother and I",
        "a friend and I",
        "the whole family",
    ),
    "kind": (
        "film",
        "movie",
        "comedy",
        "drama",
        "thriller",
        "western",
        "musical",
        "cartoon",
        "documentary",
        "remake",
    ),
    "topic": (
        "a doctor",
        "a dog",
        "a robot",
        "a bank robbery",
        "a small town",
        "a lost letter",
        "two sisters",
        "two spies",
        "the sea",
        "the war",
        "the moon",
        "the future",
        "football",
        "chess",
        "money",
        "a wedding",
    ),
    "lead": (
        "For me",
        "To me",
        "In my opinion",
        "As a fan of the book, I thought",
        "I must say that",
        "At first",
    ),
    "aspect": (
        "plot",
        "story",
        "acting",
        "script",
        "music",
        "ending",
        "camera work",
        "dialogue",
        "cast",
        "first half",
        "second half",
        "main character",
    ),
    "completion": (
        " {opinion}{turn}. {closing}",
        " {opinion}. {performance}. {closing}",
        " {opinion}{turn}. {performance}. {closing}",
    ),
    "turn": (
        ", and the {aspect} {opinion}",
        ", while the {aspect} {opinion}",
        ", but then the {aspect} {opinion}",
    ),
    "performance": (
        "The {player} gave a {adjective} performance",
        "The {player} had a {adjective} part",
        "There was a {adjective} scene with the {player}",
        "It has a {adjective} role for the {player}",
    ),
    "player": ("lead", "hero", "villain", "director", "children", "old man", "young woman", "narrator"),
    "opinion": ("was {degree}{adjective}", "seemed {degree}{adjective}", "felt {degree}{adjective}"),
    "degree": ("", "", "", "rather ", "really ", "so "),
    "adjective": (
        "brilliant",
        "wonderful",
        "superb",
        "magnificent",
        "perfect",
        "dazzling",
        "good",
        "charming",
        "clever",
        "pleasant",
        "warm",
        "lively",
        "short",
        "long",
        "quiet",
        "loud",
        "simple",
        "familiar",
        "slow",
        "dull",
        "bland",
        "clumsy",
        "weak",
        "tired",
        "terrible",
        "dreadful",
        "horrible",
        "painful",
        "pathetic",
        "hopeless",
    ),
    "closing": (
        "{people} {verb} {part}.",
        "{people} left the room {mood}.",
        "All in all, it is a {outcome}.",
    ),
    "people": ("I", "We", "My friends", "Some people", "The critics"),
    "verb": ("loved", "enjoyed", "watched", "disliked", "hated"),
    "part": ("it", "all of it", "every minute of it", "the last scene"),
    "mood": ("thrilled", "happy", "early", "bored", "angry"),
    "outcome": ("triumph", "success", "film", "mistake", "disaster"),
}
"""The expansions of each symbol of the grammar, all equally likely. `{name}` in an expansion stands for another symbol."""

SPLITS = ("train", "eval")
_EVAL_ONE_IN = 8  # one in so many prompts belongs to "eval"; the split of a prompt does not depend on the seed
_SYMBOL = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"[a-z]+")


def true_reward(prompt: str, completion: str) -> float:
    """Sum the valences of the completion's words. Unknown words count 0, so any text has a reward.

    The prompt does not count, because it is neutral. It is a parameter because reward functions take prompt and completion.
    """
    return sum((VALENCES.get(word, 0.0) for word in _WORD.findall(completion.lower())), 0.0)


def true_rewards(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Return the true reward of each completion. Online rounds with this data use this function as their judge."""
    return [true_reward(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def length_rewards(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Return the number of characters of each completion.

    Recipes in miniature use this function as their judge, because it rarely rates two texts equally.
    """
    return [float(len(completion)) for _, completion in zip(prompts, completions, strict=True)]


def preference_probability(prompt: str, first: str, second: str) -> float:
    """Return the Bradley-Terry probability that `first` is preferred: sigmoid(reward of first - reward of second)."""
    return 1.0 / (1.0 + math.exp(true_reward(prompt, second) - true_reward(prompt, first)))


def preference_pairs(count: int, seed: int, split: str) -> Iterator[dict[str, str]]:
    """Yield `count` rows `{"prompt", "chosen", "rejected"}`, which depend only on the seed and the split.

    With a larger `count`, the first rows stay the same. The two completions of a row differ. A prompt of "train" never
    occurs in "eval".

    Raises:
        ValueError: the split is neither "train" nor "eval".
    """
    rng = _stream(seed, split)
    for _ in range(count):
        prompt = _prompt(rng, split)
        first = second = _expand("completion", rng)
        while second == first:
            second = _expand("completion", rng)
        prefer_first = rng.random() < preference_probability(prompt, first, second)
        chosen, rejected = (first, second) if prefer_first else (second, first)
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def prompts(count: int, seed: int, split: str) -> list[str]:
    """Generate `count` different prompts of a split; raise ValueError if the split is unknown."""
    rng = _stream(seed, f"{split}/prompts")
    found: dict[str, None] = {}  # a dict keeps the order that a set would lose
    while len(found) < count:
        found[_prompt(rng, split)] = None
    return list(found)


def documents(count: int, seed: int) -> Iterator[str]:
    """Yield `count` whole reviews (prompt and completion) without labels, for training a reference model."""
    rng = random.Random(f"{seed}/documents")
    for _ in range(count):
        yield _expand("document", rng)


def entropy_nats(symbol: str = "document") -> float:
    """Return the exact entropy of the texts that `symbol` generates. No model can have a lower mean loss per text."""
    expansions = RULES[symbol]
    inner = sum(entropy_nats(name) for text in expansions for name in _SYMBOL.findall(text))
    return math.log(len(expansions)) - _repeated(expansions) + inner / len(expansions)


def is_grammatical(text: str, symbol: str = "document") -> bool:
    """Return whether the grammar can generate `text`. Tests use this to check that a text is fluent."""
    return _pattern(symbol).fullmatch(text) is not None


def _stream(seed: int, purpose: str) -> random.Random:
    split = purpose.partition("/")[0]
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {SPLITS}")
    return random.Random(f"{seed}/{purpose}")  # a str seed is hashed the same in every process


def _prompt(rng: random.Random, split: str) -> str:
    while True:
        prompt = _expand("prompt", rng)
        if (zlib.crc32(prompt.encode()) % _EVAL_ONE_IN == 0) == (split == "eval"):
            return prompt


def _expand(symbol: str, rng: random.Random) -> str:
    return _SYMBOL.sub(lambda match: _expand(match[1], rng), rng.choice(RULES[symbol]))


def _repeated(expansions: tuple[str, ...]) -> float:
    """Return the entropy that is lost because an expansion is listed more than once, such as the empty `degree`."""
    counts = [expansions.count(text) for text in set(expansions)]
    return sum(c * math.log(c) for c in counts) / len(expansions)


@cache
def _pattern(symbol: str) -> re.Pattern[str]:
    return re.compile(_pattern_text(symbol))


def _pattern_text(symbol: str) -> str:
    alternatives = []
    for text in dict.fromkeys(RULES[symbol]):
        pieces = _SYMBOL.split(text)  # literal, symbol, literal, symbol, ...
        parts = (_pattern_text(piece) if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))
        alternatives.append("".join(parts))
    return f"(?:{'|'.join(alternatives)})"
