# SPDX-License-Identifier: Apache-2.0
"""The environment variables hotloop reads. There are no others."""

from __future__ import annotations

import os

VARIABLES = {
    "HOTLOOP_IMPL": "force an implementation everywhere: reference, cpu, cuda or triton",
    "HOTLOOP_CHECK": "1: look for NaN, infinity and labels out of range before every op",
    "HOTLOOP_SIMD": "force an instruction set: baseline, avx2 or avx512",
    "HOTLOOP_WORKSPACE_MB": "most memory that logits may take at one time, in MiB (default 64)",
    "HOTLOOP_LOG": "1: log every call, to stderr or where logging is configured to (logger 'hotloop')",
}

DEFAULT_WORKSPACE_MB = 64


# os.environ encodes the name on every look-up (0.6 us, of 35 for a small loss); its dictionary of bytes, where
# this Python has it, answers in 0.03.
_raw: dict[bytes, bytes] | None = getattr(os.environ, "_data", None)
if not (isinstance(_raw, dict) and all(isinstance(key, bytes) for key in _raw)):
    _raw = None


def _value(name: str, raw_name: bytes) -> str:
    """The value of a variable, empty where it is not set."""
    is_set = name in os.environ if _raw is None else raw_name in _raw
    return os.environ.get(name, "") if is_set else ""


def checks_on() -> bool:
    return _value("HOTLOOP_CHECK", b"HOTLOOP_CHECK") not in ("", "0")


def forced_impl() -> str | None:
    return _value("HOTLOOP_IMPL", b"HOTLOOP_IMPL") or None


def workspace_bytes() -> int:
    text = os.environ.get("HOTLOOP_WORKSPACE_MB") or str(DEFAULT_WORKSPACE_MB)
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = -1.0
    if not megabytes > 0:
        raise ValueError(
            f"[hotloop] HOTLOOP_WORKSPACE_MB: expected a number of MiB > 0, got {text!r}. "
            f"Unset it for {DEFAULT_WORKSPACE_MB}."
        )
    return int(megabytes * 2**20)


def logs() -> bool:
    return _value("HOTLOOP_LOG", b"HOTLOOP_LOG") not in ("", "0")


def log_call(op: str, **facts: object) -> None:
    """Log a call, if ``HOTLOOP_LOG`` says so: on stderr while logging is not configured, else through it alone."""
    if not logs():
        return
    import logging
    import sys

    text = f"{op} {' '.join(f'{k}={v}' for k, v in facts.items())}"
    logger = logging.getLogger("hotloop")
    # The level of the root is WARNING, and the variable asks for these lines.
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if logger.hasHandlers():
        logger.info(text)
    elif logger.isEnabledFor(logging.INFO):
        print(f"hotloop: {text}", file=sys.stderr)
