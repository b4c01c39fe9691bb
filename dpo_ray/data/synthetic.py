"""A world of film reviews with a known true reward: controlled sentiment (Rafailov et al. 2023, section 6.1).

A grammar without recursion writes reviews. The prompt is a neutral opening that stops in mid-sentence; the
completion ends that sentence and the review. The true reward of a completion is the sum of the valences of
its words, 0 on average under the grammar. Preferences follow Bradley-Terry on that reward, so they are as
noisy as people are. What a real data set hides is in the open here: whether training raised the reward that
made the labels.
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
"""Valence of every word that carries one; all other words count 0."""

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
"""Each symbol's expansions, equally likely; `{name}` in an expansion stands for another symbol."""

SPLITS = ("train", "eval")
_EVAL_ONE_IN = 8  # share of the prompts that are kept for "eval"; a prompt is in one split whatever the seed
_SYMBOL = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"[a-z]+")


def true_reward(prompt: str, completion: str) -> float:
    """Sum the valences of the completion's words; unknown words count 0, so any text has a reward.

    The prompt is neutral and does not count; it is a parameter because a reward is a function of both.
    """
    return sum((VALENCES.get(word, 0.0) for word in _WORD.findall(completion.lower())), 0.0)


def true_rewards(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Return the true reward of each completion: the judge of online rounds in this world."""
    return [true_reward(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def length_rewards(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Count a completion's characters: a judge that tells any two texts apart, for recipes in miniature."""
    return [float(len(completion)) for _, completion in zip(prompts, completions, strict=True)]


def preference_probability(prompt: str, first: str, second: str) -> float:
    """Return the Bradley-Terry probability that `first` is preferred: sigmoid(reward of first - of second)."""
    return 1.0 / (1.0 + math.exp(true_reward(prompt, second) - true_reward(prompt, first)))


def preference_pairs(count: int, seed: int, split: str) -> Iterator[dict[str, str]]:
    """Yield `count` rows `{"prompt", "chosen", "rejected"}`, a function of (seed, split).

    A longer run begins with the shorter one's rows. The two completions of a row differ; no prompt of "train"
    is ever one of "eval". Raises ValueError for any other split.
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
    """Write `count` prompts of a split, none twice; raise ValueError where the split is unknown."""
    rng = _stream(seed, f"{split}/prompts")
    found: dict[str, None] = {}  # a dict keeps the order that a set would lose
    while len(found) < count:
        found[_prompt(rng, split)] = None
    return list(found)


def documents(count: int, seed: int) -> Iterator[str]:
    """Yield `count` whole reviews, prompt and completion, unlabelled: what a reference model learns from."""
    rng = random.Random(f"{seed}/documents")
    for _ in range(count):
        yield _expand("document", rng)


def entropy_nats(symbol: str = "document") -> float:
    """Return the exact entropy of the choices behind one text of `symbol`: no model's mean loss is lower."""
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
    """Return the entropy lost because an expansion is listed more than once (the empty degree is)."""
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
