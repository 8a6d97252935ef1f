"""The environment variables hotloop reads. There are no others."""

from __future__ import annotations

import os

VARIABLES = {
    "HOTLOOP_IMPL": "force an implementation everywhere: reference, cpu, cuda or triton",
    "HOTLOOP_CHECK": "1: look for NaN, infinity and labels out of range before every op",
    "HOTLOOP_SIMD": "force an instruction set: baseline, avx2 or avx512",
    "HOTLOOP_WORKSPACE_MB": "most memory that logits may take at one time, in MiB (default 64)",
    "HOTLOOP_LOG": "1: log every call (logger 'hotloop')",
}

DEFAULT_WORKSPACE_MB = 64


def checks_on() -> bool:
    return os.environ.get("HOTLOOP_CHECK", "") not in ("", "0")


def forced_impl() -> str | None:
    return os.environ.get("HOTLOOP_IMPL") or None


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


def log_call(op: str, **facts: object) -> None:
    if os.environ.get("HOTLOOP_LOG", "") in ("", "0"):
        return
    import logging

    logging.getLogger("hotloop").info("%s %s", op, " ".join(f"{k}={v}" for k, v in facts.items()))
