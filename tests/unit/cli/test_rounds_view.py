"""The table of rounds shows every round's figures in 80 characters, and its JSON names them."""

from __future__ import annotations

import dataclasses
import io
import json
import math

from rich.console import Console

from dpo_ray.cli.rounds_view import figures, print_rounds
from dpo_ray.report.rounds_page import RoundRow, RoundsPage
from tests.helpers.rounds import rounds_page


def printed(page: RoundsPage, width: int = 80) -> str:
    out = io.StringIO()
    print_rounds(page, Console(file=out, width=width, color_system=None))
    return out.getvalue()


def row_of(text: str, number: int) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [str(number)])


def one(**known: object) -> RoundsPage:
    row = RoundRow(number=3, state="promoted", decision="promoted", **known)  # type: ignore[arg-type]
    return RoundsPage(name="one", created="", what="", rows=[row])


def test_a_round_has_its_figures_in_one_line() -> None:
    page = one(
        pairs=1_234,
        kl=8.1639,
        true_reward=-0.43751,
        win_rate_initial=(0.719, 0.648, 0.781),
        win_rate_previous=(1.0, 0.964, 1.0),
        mean_tokens=118.25,
        seconds={"sample": 1_000.4, "train": 234.2},
    )
    shown = ["3", "promoted", "1,234", "8.16", "−0.438", "71.9%", "(65–78)", "100.0%", "(96–100)", "118.2", "1,235"]
    assert row_of(printed(page), 3) == shown


def test_what_is_not_measured_is_a_dash() -> None:
    nan = math.nan
    for page in (one(), one(kl=nan, true_reward=nan, win_rate_initial=(nan, nan, nan), mean_tokens=nan)):
        assert row_of(printed(page), 3) == ["3", "promoted", *"–––––––"]


def test_thirty_rounds_fit_in_eighty_characters() -> None:
    text = printed(rounds_page(30, under_way=True))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert [row_of(text, n)[1] for n in (1, 4, 30, 31)] == ["promoted", "rejected", "promoted", "judged"]


def test_rejections_and_the_end_have_their_reasons() -> None:
    page = dataclasses.replace(
        one(),
        rows=[
            RoundRow(number=1, state="promoted", decision="promoted", reasons=("all is well",)),
            RoundRow(number=2, state="rejected", decision="rejected", reasons=("too far", "too long")),
        ],
        stopped="the budget is spent",
    )
    text = printed(page)
    assert text.splitlines()[-2:] == ["round 2 rejected: too far; too long", "ended: the budget is spent"]
    assert "all is well" not in text
    assert "ended" not in printed(dataclasses.replace(page, stopped=""))


def test_no_round_is_said_to_have_begun() -> None:
    assert printed(rounds_page(0)) == "tiny-rounds: no round has started\n"


def test_foreign_text_does_nothing_to_the_terminal() -> None:
    text = printed(rounds_page(4, text="[bold red]\x1b[31m\u202ered"), width=200)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.count("[bold red]␛[31m\ufffdred") == 3  # the name, the rejection and the end


def test_json_names_every_figure_and_leaves_unknown_ones_empty() -> None:
    rows = json.loads(json.dumps(figures(rounds_page(4, under_way=True))))
    assert [row["number"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[3]["win_rate_previous"] == {"rate": 0.42, "low": 0.42 - 0.07, "high": 0.42 + 0.06}
    assert rows[3]["dropped"] == {"no_gap": 15, "one_completion": 2}
    assert rows[4]["seconds"] == {"sample": 60.0, "judge": 12.0}
    assert (rows[4]["state"], rows[4]["decision"], rows[4]["starts_from"]) == ("judged", "", 3)
    assert rows[4]["win_rate_initial"] is rows[4]["kl"] is rows[4]["pairs"] is None
