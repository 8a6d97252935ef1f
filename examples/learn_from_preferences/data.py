# SPDX-License-Identifier: Apache-2.0
"""Text from a folder, split by file, and the prompts cut out of it."""

from __future__ import annotations

import hashlib
import os
import random
import re
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .settings import DemoError, Settings, seed_of

# Enough on both sides for windows and prompts.
LEAST_TRAIN_BYTES = 60_000
LEAST_HELDOUT_BYTES = 6_000
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
HELDOUT_SHARE = 0.1
MOST_PROMPTS_OF_A_FILE = 16

DEF_LINE = re.compile(rb"^( *)(?:async )?def \w+\([^\n]*:\n", re.MULTILINE)
SENTENCE_END = re.compile(rb"[.!?][\"')]*\s+|\n\n")


@dataclass(frozen=True)
class Prompt:
    """The last bytes of a file before a place where something begins."""

    text: bytes
    file: int
    indent: int = 0  # of the ``def`` line that ends a Python prompt


@dataclass
class Corpus:
    kind: str  # "python" or "prose"
    folder: str
    digest: str
    train: list[bytes]
    heldout: list[bytes]
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def train_tokens(self) -> Tensor:
        return _tokens(self.train)

    @property
    def heldout_tokens(self) -> Tensor:
        return _tokens(self.heldout)

    def facts(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "folder": self.folder,
            "digest": self.digest,
            "train_files": len(self.train),
            "train_bytes": sum(map(len, self.train)),
            "heldout_files": len(self.heldout),
            "heldout_bytes": sum(map(len, self.heldout)),
            "skipped": self.skipped,
        }


def _tokens(files: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"\0".join(files) + b"\0"), dtype=torch.uint8)


def load(folder: Path | None, settings: Settings) -> Corpus:
    """Read a folder (the Python standard library if None) and hold out a tenth, in whole files."""
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    if not root.exists():
        raise DemoError(f"--text {root}: no such folder.")
    if not root.is_dir():
        raise DemoError(f"--text {root}: expected a folder, got a file.")
    found, skipped = _read(root, settings.most_text_bytes)
    if not found:
        raise DemoError(f"--text {root}: {_nothing(skipped)}")
    python = {name: text for name, text in found.items() if name.endswith(".py")}
    kind = "python" if _size(python) * 2 >= _size(found) else "prose"
    if kind == "python":
        skipped["not Python"] = len(found) - len(python)
        found = python
    names = _without_copies(found, skipped)
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + found[name] + b"\0")
    random.Random(seed_of(settings.seed, "split")).shuffle(names)
    heldout = _held_out({name: len(found[name]) for name in names})
    corpus = Corpus(
        kind=kind,
        folder=str(root),
        digest=digest.hexdigest(),
        train=[found[name] for name in names if name not in heldout],
        heldout=[found[name] for name in names if name in heldout],
        skipped={reason: n for reason, n in skipped.items() if n},
    )
    _check_size(root, corpus)
    return corpus


def _read(root: Path, most: int) -> tuple[dict[str, bytes], dict[str, int]]:
    """Texts under ``root`` by relative name, and how many files were skipped for which reason."""
    skipped = {"unreadable": 0, "binary": 0, "empty": 0, "beyond the size limit": 0}
    failures: list[OSError] = []
    found: dict[str, bytes] = {}
    total = 0
    for place, folders, files in os.walk(root, onerror=failures.append):
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS and f[0] != ".")
        for name in sorted(files):
            path = Path(place, name)
            if name.startswith(".") or not path.is_file():
                continue
            if total > most:
                skipped["beyond the size limit"] += 1
                continue
            try:
                text = path.read_bytes()
                text.decode("utf-8")
            except OSError:
                skipped["unreadable"] += 1
            except UnicodeDecodeError:
                skipped["binary"] += 1
            else:
                if b"\0" in text:
                    skipped["binary"] += 1
                elif not text.strip():
                    skipped["empty"] += 1
                else:
                    text = text.replace(b"\r\n", b"\n")
                    found[path.relative_to(root).as_posix()] = text
                    total += len(text)
    if failures and not found and not any(skipped.values()):
        raise DemoError(f"--text {root}: the folder cannot be read ({failures[0].strerror}).")
    skipped["unreadable"] += len(failures)
    return found, skipped


def _without_copies(found: dict[str, bytes], skipped: dict[str, int]) -> list[str]:
    """Names in order, one per text: a copy could stand on both sides of the split."""
    first = {found[name]: name for name in sorted(found, reverse=True)}
    skipped["copies"] = len(found) - len(first)
    return sorted(first.values())


def _held_out(sizes: dict[str, int]) -> set[str]:
    """Files from the front until a tenth of the bytes is held out, and never more than a fifth."""
    aim, taken = HELDOUT_SHARE * sum(sizes.values()), 0
    chosen = set()
    for name, size in sizes.items():
        if taken < aim and taken + size <= 2 * aim:
            chosen.add(name)
            taken += size
    return chosen


def _nothing(skipped: dict[str, int]) -> str:
    counts = ", ".join(f"{n} {reason}" for reason, n in skipped.items() if n)
    if not counts:
        return "no files in it; expected UTF-8 text."
    return f"no text files in it; expected UTF-8 text, found {counts}."


def _size(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values()))


def _check_size(root: Path, corpus: Corpus) -> None:
    train, heldout = sum(map(len, corpus.train)), sum(map(len, corpus.heldout))
    if train >= LEAST_TRAIN_BYTES and heldout >= LEAST_HELDOUT_BYTES:
        return
    counts = "".join(f", {n} {reason} skipped" for reason, n in corpus.skipped.items())
    raise DemoError(
        f"--text {root}: too little text, {train + heldout} bytes (files: "
        f"{len(corpus.train) + len(corpus.heldout)}{counts}), of which {heldout} held out; "
        f"expected at least {LEAST_TRAIN_BYTES} bytes to learn from and {LEAST_HELDOUT_BYTES} "
        f"held out, where a tenth is held out in whole files."
    )


def prompts(corpus: Corpus, part: str, count: int, settings: Settings) -> list[Prompt]:
    """Up to ``count`` prompts of ``settings.prompt_bytes`` bytes each, spread over the files.

    A Python prompt ends with a ``def`` line, any other with the end of a sentence. All have one
    length, so that a batch needs no padding; like a training window they may begin mid-word.
    """
    files = corpus.heldout if part == "heldout" else corpus.train
    chooser = random.Random(seed_of(settings.seed, "prompts", part))
    pattern = DEF_LINE if corpus.kind == "python" else SENTENCE_END
    by_file: list[list[Prompt]] = []
    for index, text in enumerate(files):
        places = [
            Prompt(
                text=text[match.end() - settings.prompt_bytes : match.end()],
                file=index,
                indent=len(match.group(1)) if corpus.kind == "python" else 0,
            )
            for match in pattern.finditer(text)
            if match.end() >= settings.prompt_bytes
            and match.end() - match.start() <= settings.prompt_bytes
            and match.end() + 16 <= len(text)
        ]
        chooser.shuffle(places)
        by_file.append(places[:MOST_PROMPTS_OF_A_FILE])
    flat = [prompt for places in by_file for prompt in places]
    chooser.shuffle(flat)
    least = 8
    if len(flat) < least:
        what = "functions (def ...:)" if corpus.kind == "python" else "ends of sentences"
        raise DemoError(
            f"--text {corpus.folder}: found {len(flat)} {what} in the "
            f"{'held-out' if part == 'heldout' else 'training'} files to begin answers at; "
            f"expected at least {least}. Give it more text."
        )
    return flat[:count]
