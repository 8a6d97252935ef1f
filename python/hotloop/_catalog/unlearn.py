"""Losses that make a model forget."""

from . import Paper, Room

PAIR = ("reference", "cpu", "cuda")
op = Room(__name__, impls=PAIR, gradient=True, compiles=True, needs_torch=True)

NPO = Paper("Negative Preference Optimization", "2404.05868", "beta = 0.1")

op("npo_loss", NPO, Paper("SimNPO", "2410.07163"))
