"""``python -m hotloop info [--json]``: the environment report."""

from __future__ import annotations

import sys


def main() -> int:
    if sys.argv[1:2] != ["info"]:
        print("usage: python -m hotloop info [--json]", file=sys.stderr)
        return 2
    from .info import main as info

    return info(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
