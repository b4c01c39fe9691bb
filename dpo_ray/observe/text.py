"""Readable forms of durations and sizes, and of texts that may contain characters that control a terminal."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Format a duration for people: 4.2 s, 75 s, 12 min 30 s, 3 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: int) -> str:
    """Format a number of bytes for people: 512 B, 1.5 MiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count} B"


def harmless(text: str) -> str:
    """Replace the characters that control a terminal, such as escape characters, or that a terminal cannot show."""
    return "".join(c if c.isprintable() else _SIGNS.get(c, "\N{REPLACEMENT CHARACTER}") for c in text)


_SIGNS = {"\n": "⏎", "\t": "⇥", "\u200d": ""} | {
    chr(code): chr(0x2400 + code) for code in range(32) if code not in (9, 10)
}
