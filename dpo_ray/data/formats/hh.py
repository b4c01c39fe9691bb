"""Reads transcripts: texts that contain the turns of a human and an assistant, as in HH-RLHF and Nectar.

HH-RLHF: github.com/anthropics/hh-rlhf, README.md. Nectar: the card of huggingface.co/datasets/berkeley-nest/Nectar.
"""

from __future__ import annotations

import re

from dpo_ray.data.groups import Conversation, TextGroup

from .soundness import require

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # white space at the very beginning is often stripped


def hh_pair(chosen: str, rejected: str, system: str = "") -> TextGroup:
    """Build a group from two dialogues. The assistant's last turns are the answers, and the text before is the prompt.

    The prompt must be the same in both dialogues. A system text, if there is one, is put before the prompt.
    """
    cuts = [text.rfind(ASSISTANT) for text in (chosen, rejected)]
    require(min(cuts) >= 0, "LAST_TURN_NOT_ASSISTANT", "there is no turn of the assistant")
    for text, cut, name in ((chosen, cuts[0], "chosen"), (rejected, cuts[1], "rejected")):
        require(HUMAN not in text[cut:], "LAST_TURN_NOT_ASSISTANT", f"`{name}` ends with a turn of the human")
    prompts = [text[: cut + len(ASSISTANT)] for text, cut in zip((chosen, rejected), cuts, strict=True)]
    require(prompts[0] == prompts[1], "PROMPT_MISMATCH", "the dialogues differ before their last turn")
    answers = chosen[len(prompts[0]) :], rejected[len(prompts[0]) :]
    prompt = with_system_text(prompts[0], system)
    return TextGroup(prompt, answers, (1.0, 0.0), messages=turns_of(prompt))


def with_system_text(transcript: str, system: str) -> str:
    """Put a system text before the first turn of a transcript, unless the transcript already begins with this text.

    Raises:
        Rejected: PROMPT_MISMATCH, if the transcript begins with another system text; BAD_MESSAGE, if the system text
            contains a turn of a transcript.
    """
    if not system:
        return transcript
    require(_TURN.search(system) is None, "BAD_MESSAGE", "the system text contains a turn of a transcript")
    before = _TURN.split(transcript, maxsplit=1)[0].strip()
    require(
        before in ("", system.strip()),
        "PROMPT_MISMATCH",
        "the system text of the row differs from that of the transcript",
    )
    return transcript if before else f"{system.strip()}\n\n{transcript.lstrip()}"


def is_transcript(prompt: str) -> bool:
    """Return whether a prompt begins with a turn of the human and ends with "Assistant:"."""
    return prompt.lstrip().startswith("Human:") and prompt.rstrip().endswith(ASSISTANT)


def turns_of(prompt: str) -> Conversation:
    """Split a transcript into its turns; text before the first turn is the system message."""
    before, *pieces = _TURN.split(prompt.rstrip().removesuffix(ASSISTANT))
    turns = [{"role": "system", "content": before.strip()}] if before.strip() else []
    for speaker, text in zip(pieces[::2], pieces[1::2], strict=True):
        turns.append({"role": "user" if speaker == "Human" else "assistant", "content": text.strip()})
    return tuple(turns)
