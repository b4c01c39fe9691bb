"""Install the project with one engine into a virtual environment: `python tools/install.py --venv .venv --engine cpu`.

It needs the standard library only. This file keeps to syntax that every Python can read, so that one which is too old
can say so in a line; the modules in `installing/` do the work.
"""

import sys

OLDEST, NEWEST = (3, 11), (3, 13)


def main():
    """Refuse a Python that the packages do not support; leave all else to `installing`."""
    if not OLDEST <= tuple(sys.version_info[:2]) <= NEWEST:
        found = sys.executable + " is " + ".".join(str(part) for part in sys.version_info[:3])
        sys.stderr.write(
            "install: Python 3.11, 3.12 or 3.13 is needed, and " + found + ": install one of them "
            "(Debian, Ubuntu: python3.11 and python3.11-venv), or name it: make PYTHON=/path/to/python3.11\n"
        )
        return 1
    try:
        from installing.command import main as install

        return install()
    except KeyboardInterrupt:  # before `installing` listens, or once more while it stops
        return 130


if __name__ == "__main__":
    sys.exit(main())
