"""What uv and pip print when they fail, and the line that is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.installing.failures import explain

INDEX = "https://me:secret@index.example/simple"

# Printed by uv 0.13.9 and 0.9.30, and by pip 23.2, when this was made to happen.
PRINTED = {
    "certificate": (
        """error: Failed to fetch: https://index.example/simple/alpha/
  cause: error sending request for url (https://index.example/simple/alpha/)
  cause: client error (Connect)
  cause: invalid peer certificate: UnknownIssuer""",
        "the certificate of https://index.example/simple/alpha/ is not trusted",
    ),
    "network": (
        """error: Request failed after 3 retries in 9.9s
  cause: Failed to fetch: http://nosuch.invalid/simple/delta/
  cause: error sending request for url (http://nosuch.invalid/simple/delta/)
  cause: client error (Connect)
  cause: dns error
  cause: error resolving DNS
  cause: failed to lookup address information: Name or service not known""",
        "http://nosuch.invalid/simple/delta/ cannot be reached: its name is not found",
    ),
    "network, older uv": (
        """error: Failed to fetch: `http://127.0.0.1:57463/simple/delta/`
  Caused by: error sending request for url (http://127.0.0.1:57463/simple/delta/)
  Caused by: operation timed out""",
        "http://127.0.0.1:57463/simple/delta/ cannot be reached: it does not answer in time",
    ),
    "disk": (
        """error: Failed to install: beta-1.0-py3-none-any.whl (beta==1.0)
  cause: Failed to copy to `/nosuch/site-packages/beta/weight.bin`
  cause: failed to copy file from /cache/beta/weight.bin to /nosuch/beta/.tmp0: No space left on device (os error 28)""",
        "the disk is full at /nosuch/beta/.tmp0",
    ),
    "missing, older uv": (
        """  × Failed to download `beta==1.0`
  ├─▶ Failed to fetch: `http://127.0.0.1:34985/files/beta-1.0-py3-none-any.whl`
  ╰─▶ HTTP status client error (404 Not Found) for url
      (http://127.0.0.1:34985/files/beta-1.0-py3-none-any.whl)""",
        "the index lists http://127.0.0.1:34985/files/beta-1.0-py3-none-any.whl and does not have it (404)",
    ),
    "credentials, older uv": (
        """  × No solution found when resolving dependencies:
  ╰─▶ Because beta was not found in the package registry and you require beta,
      we can conclude that your requirements are unsatisfiable.

      hint: An index URL (http://127.0.0.1:32973/simple) could not be queried
      due to a lack of valid authentication credentials (401 Unauthorized).""",
        "http://127.0.0.1:32973/simple wants a name and a password, or has others (401)",
    ),
    "other": ("Resolved 3 packages\nerror: Something new happened", "Something new happened"),
}


@pytest.mark.parametrize("case", PRINTED)
def test_one_line_tells_what_and_where(case: str, tmp_path: Path) -> None:
    printed, told = PRINTED[case]
    failure = explain(printed, 1, INDEX, tmp_path)
    assert failure.kind == case.partition(",")[0]
    assert failure.what.startswith(told)
    assert failure.todo
    assert "\n" not in failure.what


def test_passwords_are_not_told(tmp_path: Path) -> None:
    printed = "error: No solution found\n  cause: Because x was not found in the package registry and you require x"
    assert explain(printed, 1, INDEX, tmp_path).what == "the index https://***@index.example/simple lacks the project x"
    assert "secret" not in explain(f"error: odd thing at {INDEX}", 1, INDEX, tmp_path).what


def test_an_installer_that_was_killed_is_told(tmp_path: Path) -> None:
    assert explain("Resolved 3 packages", -9, INDEX, tmp_path).what == "the installer was ended by signal 9"
