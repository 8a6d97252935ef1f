"""Log-probabilities, entropies and divergences of language-model heads, without the logits in memory."""

from ._statistics import LogprobStatistics
from .head import linear_cross_entropy, linear_logprob, token_logprob

__all__ = ["LogprobStatistics", "linear_cross_entropy", "linear_logprob", "token_logprob"]
