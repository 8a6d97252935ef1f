# SPDX-License-Identifier: Apache-2.0
"""How often the model after feedback beats the model before it, with an interval."""

from __future__ import annotations

from typing import Any

import numpy as np

from .data import Prompt
from .judge import Judge
from .settings import Settings, seed_of

RESAMPLES = 4000


def win_rates(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Share of (after, before) answer pairs that "after" wins, ties half; per prompt.

    Args:
        before: scores, shape (prompts, answers).
        after: scores, shape (prompts, answers).
    """
    difference = after[:, :, None] - before[:, None, :]
    points: np.ndarray = (difference > 1e-9) + 0.5 * (np.abs(difference) <= 1e-9)
    return np.asarray(points.mean(axis=(1, 2)))


def interval(values: np.ndarray, groups: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean over whole groups.

    Prompts of one file resemble each other, so files are drawn, not prompts.
    """
    _, index = np.unique(groups, return_inverse=True)
    sums = np.bincount(index, weights=values)
    counts = np.bincount(index)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def compare(
    prompts: list[Prompt],
    before: list[list[bytes]],
    after: list[list[bytes]],
    judge: Judge,
    settings: Settings,
) -> dict[str, Any]:
    """Win rate, mean scores and a few samples of the two models on the same prompts."""
    old = np.array([[judge.score(p, a) for a in several] for p, several in zip(prompts, before)])
    new = np.array([[judge.score(p, a) for a in several] for p, several in zip(prompts, after)])
    rates = win_rates(old, new)
    groups = np.array([prompt.file for prompt in prompts])
    seed = seed_of(settings.seed, "bootstrap")
    low, high = interval(rates, groups, seed)
    return {
        "win_rate": float(rates.mean()),
        "interval_95": [low, high],
        "interval_method": f"percentile bootstrap over held-out files, {RESAMPLES} resamples",
        "prompts": len(prompts),
        "files": len(np.unique(groups)),
        "answers_per_prompt": settings.eval_answers,
        "ties": float((np.abs(new[:, :, None] - old[:, None, :]) <= 1e-9).mean()),
        "score_before": float(old.mean()),
        "score_after": float(new.mean()),
        "score_before_interval_95": list(interval(old.mean(1), groups, seed)),
        "score_after_interval_95": list(interval(new.mean(1), groups, seed)),
        "nothing_before": float((old == 0).mean()),
        "nothing_after": float((new == 0).mean()),
        "samples": [
            {
                "prompt": prompts[i].text.decode("utf-8", "replace"),
                "before": _shown(judge, prompts[i], before[i][0]),
                "before_score": float(old[i, 0]),
                "after": _shown(judge, prompts[i], after[i][0]),
                "after_score": float(new[i, 0]),
            }
            for i in range(min(4, len(prompts)))
        ],
    }


def _shown(judge: Judge, prompt: Prompt, answer: bytes) -> str:
    return answer[: judge.kept(prompt, answer)].decode("utf-8", "replace")
