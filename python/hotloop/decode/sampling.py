# SPDX-License-Identifier: Apache-2.0
"""Sampling from logits or probabilities, and the laws it samples from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..front import arrays, check, native
from ..front.arrays import Array
from ..front.check import integer
from ..front.impl import Impl, choose
from ..reference.decode import sampling as reference
from ..reference.decode.law import MAX_VOCABULARY, Law, Logits
from ..reference.decode.results import Sampled, TopLogprobs
from ..vocabulary import like
from . import _loops
from .law import check_law, naming, pack, refuse_probabilities


def sample(law: Any, *, seed: Any = None, offset: Any = 0, impl: Impl = "auto") -> Sampled:
    """Draw a token from every row: softmax, temperature, top-k, top-p, min-p and the draw in one op.

    p = softmax((logits + bias) / temperature); top-k keeps the k largest, top-p the smallest set of largest tokens with
    mass >= top_p (of what top-k kept, or of everything with filter_order="joint"), min-p tokens with p >= min_p max p;
    ties at a threshold are kept. The kept mass is renormalised and the token found by inverse CDF. Weights are whole
    multiples of 2^-42 of the largest one, so that no order of summation changes a draw: the law differs from the exact
    one by at most 2^-23 + V 2^-43 in total variation (exponentials are float32), and the same seed gives the same
    token on every implementation.

    Args:
        law: ``Logits`` or ``Probs`` around an array (B, V) or (B, R, V), or a bare array of probabilities.
        seed: None, an integer, an array or a generator. Default None: every call draws new seeds from the generator of
            the arrays' library and device, so that calls differ and ``torch.manual_seed``, ``numpy.random.seed`` or
            ``cupy.random.seed`` rules them. 0 to 2^64 - 1 for all requests, or (B,) int64, one for each (a request's
            draws then do not depend on its place in the batch): the call is a function of its arguments. A
            ``torch.Generator`` for tensors, a ``numpy.random.Generator`` for NumPy: each call draws its seeds from it.
        offset: position of the (first) token in its sequence, an integer or (B,) int64: another position, another
            draw. Row r draws for position offset + r. Default 0. A loop that passes the same seed has to count it on:
            at equal offsets it meets equal uniforms.
        impl: "auto", "cuda", "cpu" or "reference".

    Returns:
        ``Sampled``: ``token_ids`` (B,) or (B, R) int64, -1 for a row without a law; ``logprobs`` float32, nats, under
        the law sampled from (after temperature and truncation).

    Raises:
        TypeError, ValueError: an array of another dtype, shape, library or device, a number out of range, a number
            among the probabilities read that is none. With HOTLOOP_CHECK=1 also NaN or +inf logits and rows that are
            no law.
        NotImplementedError: a forced ``impl`` that cannot run.

    Examples:
        >>> import numpy as np
        >>> z = np.array([[0.0, 5.0, 4.0, -1.0]], np.float32)
        >>> int(sample(Logits(z, temperature=0.0)).token_ids[0])
        1
        >>> int(sample(Logits(z, top_k=2, top_p=0.5), seed=3).token_ids[0])
        1

    Reference:
        Holtzman et al. 2020 (top-p), arXiv:1904.09751; Fan et al. 2018 (top-k), arXiv:1805.04833; Nguyen et al. 2024
        (min-p), arXiv:2407.01082. Order and ties as in FlashInfer and Hugging Face transformers.
    """
    if arrays.compiling():
        from . import operators

        return operators.sample(law, seed, offset, impl)
    return _loops.sample(law, seed, offset, impl)


@like(sample)
def law_probs(law: Any, *, impl: Impl = "auto") -> Any:
    """The probabilities a row is sampled with: after temperature, bias, truncation and renormalisation.

    Args:
        impl: "auto", "cpu" or "reference".

    Returns:
        float32 (float64 for float64 input), shape of the input; zeros where a row has no law.

    Examples:
        >>> from hotloop.decode import Probs
        >>> law_probs(Probs(np.array([[0.5, 0.3, 0.2]]), top_k=2)).round(3).tolist()
        [[0.625, 0.375, 0.0]]

    Reference:
        As ``sample``: arXiv:1904.09751, arXiv:1805.04833, arXiv:2407.01082; FlashInfer's top_k_renorm_probs and
        top_p_renorm_probs.
    """
    op = "law_probs"
    law = check_law(op, "law", law, 2, 3)
    if choose(op, impl, "law", law.values) == "reference":
        with naming(op, law=law):
            return reference.law_probs(law)
    return _probs(op, law)


def _probs(op: str, law: Law, log: bool = False) -> Any:
    shape = tuple(map(int, law.values.shape))
    wide = arrays.dtype(law.values) == "float64"
    rows = shape[1] if len(shape) == 3 else 1
    out = arrays.empty(law.values, (shape[0], rows, shape[-1]), "float64" if wide else "float32")
    if native.core.decode.probs(shape[0], rows, pack(law), log, wide, out):
        refuse_probabilities(op, law=law)
    return out.reshape(shape)


@like(law_probs)
def top_logprobs(law: Any, k: int, *, impl: Impl = "auto") -> TopLogprobs:
    """The k most likely tokens of every row with their log-probabilities: what an early exit announces, or a log shows.

    Args:
        k: how many, 0 to 2^21.

    Returns:
        ``TopLogprobs``: ``token_ids`` (..., k) int64 by falling probability, the lowest id first among equals, and
        ``logprobs`` (..., k) float32; -1 and -inf where the law has fewer tokens.

    Examples:
        >>> top_logprobs(np.array([[0.2, 0.5, 0.3]]), 2).token_ids.tolist()
        [[1, 2]]

    Reference:
        The early-exit message of Bhendawade et al. 2025, arXiv:2510.13161, section 3.1.
    """
    op = "top_logprobs"
    law = check_law(op, "law", law, 2, 3)
    k = integer(op, "k", k, at_least=0, at_most=MAX_VOCABULARY)
    shape = tuple(map(int, law.values.shape[:-1]))
    if choose(op, impl, "law", law.values) == "reference":
        with naming(op, law=law):
            return reference.top_logprobs(law, k)
    rows = shape[1] if len(shape) == 2 else 1
    ids = arrays.empty(law.values, (shape[0], rows, k), "int64")
    logps = arrays.empty(law.values, (shape[0], rows, k), "float32")
    if native.core.decode.top(shape[0], rows, k, pack(law), ids, logps):
        refuse_probabilities(op, law=law)
    return TopLogprobs(ids.reshape((*shape, k)), logps.reshape((*shape, k)))


@like(law_probs)
def entropy_adaptive_temperature(
    logits: Array,
    *,
    median: float,
    std: float,
    maximum: float,
    minimum: float,
    temperature: float = 1.0,
    tau: float = 0.05,
    impl: Impl = "auto",
) -> Array:
    """A temperature for every row from its entropy: warmer where the model is unsure.

    H = entropy of softmax(logits); h = (log H - median) / std, scaled to [-1, 1] by ``maximum`` above 0 and by
    |minimum| below; T = temperature (1 + tau h).

    Args:
        logits: (B, V) or (B, R, V).
        median, std, maximum, minimum: of the previous batch: median and standard deviation of log H, largest and
            smallest h; std and maximum > 0, minimum < 0.
        temperature: T0 > 0. Default 1.
        tau: strength, in [0, 1). Default 0.05.

    Returns:
        float32 temperatures, (B,) or (B, R); T0 where a row has no law. Pass them on as ``Logits(temperature=...)``.

    Examples:
        >>> t = entropy_adaptive_temperature(np.zeros((1, 8)), median=0.0, std=1.0, maximum=0.5, minimum=-0.5)
        >>> round(float(t[0]), 3)
        1.05

    Reference:
        HAPO (heterogeneous, token-aware policy optimization), the authors' recipe/train.md: arXiv:2509.16591.
    """
    op = "entropy_adaptive_temperature"
    law = check_law(op, "logits", Logits(logits), 2, 3)
    numbers = {
        "median": check.number(op, "median", median),
        "std": check.number(op, "std", std, above=0.0),
        "maximum": check.number(op, "maximum", maximum, above=0.0),
        "minimum": check.number(op, "minimum", minimum, below=0.0),
        "temperature": check.number(op, "temperature", temperature, above=0.0),
        "tau": check.number(op, "tau", tau, at_least=0.0, below=1.0),
    }
    shape = tuple(map(int, logits.shape[:-1]))
    if choose(op, impl, "logits", logits) == "reference":
        return reference.entropy_adaptive_temperature(logits, **numbers)
    rows = shape[1] if len(shape) == 2 else 1
    out = arrays.empty(logits, (shape[0], rows), "float32")
    *entropies, temperature, tau = numbers.values()
    native.core.decode.temperatures(
        shape[0], rows, pack(law), tuple(entropies), temperature, tau, out
    )
    return out.reshape(shape)


@like(law_probs)
def geometric_mixture_logits(
    logits: Array, ref_logits: Any, *, mixture: float = 0.5, impl: Impl = "auto"
) -> Array:
    """Log-probabilities of the geometric mixture of two models, token by token.

    lp = log_softmax((1 - mixture) logits + mixture ref_logits): the normalised p^(1 - m) q^m. To sample from it, or to
    verify against it, without writing it out, pass ``Logits(logits, reference=ref_logits, mixture=m)``.

    Args:
        logits, ref_logits: (B, V) or (B, R, V), same dtype.
        mixture: weight of ``ref_logits``, in [0, 1]. Default 0.5.

    Returns:
        float32 (float64 for float64 input), shape of the input; -inf where a row has no law, and for a NaN.

    Examples:
        >>> a, b = np.log([[0.8, 0.2]]), np.log([[0.2, 0.8]])
        >>> np.exp(geometric_mixture_logits(a, b)).round(3).tolist()
        [[0.5, 0.5]]

    Reference:
        Calandriello et al. 2024 (IPO-MD), arXiv:2403.08635; TRL's GeometricMixtureWrapper.
    """
    op = "geometric_mixture_logits"
    law = check_law(op, "logits", Logits(logits, reference=ref_logits, mixture=mixture), 2, 3)
    if choose(op, impl, "logits", logits) == "reference":
        return reference.geometric_mixture_logits(logits, ref_logits, mixture=mixture)
    return _probs(op, law, log=True)


@like(law_probs)
def value_augmented_logits(
    logits: Array, token_ids: Any, values: Any, *, beta: float = 1.0, impl: Impl = "auto"
) -> Array:
    """Logits steered by the values of a few continuations: z'_a = z_a + beta (V_a - mean of V) for the tokens valued.

    To sample from them without writing them out pass ``value_augmented_law(logits, token_ids, values, beta=beta)``.
    Several rewards add up: sum the beta-weighted values first.

    Args:
        logits: (B, V), of the base model.
        token_ids: (B, k) int64, the tokens that were valued, usually the k most likely (20); negative ids are skipped.
        values: (B, k) float32, value of the prefix with that token.
        beta: strength; the paper's example uses 3. Default 1.

    Returns:
        float32 (float64 for float64 input), (B, V).

    Examples:
        >>> ids, values = np.array([[0, 2]]), np.array([[1.0, 0.0]], np.float32)
        >>> value_augmented_logits(np.zeros((1, 3)), ids, values, beta=2.0).tolist()
        [[1.0, 0.0, -1.0]]

    Reference:
        Han et al. 2024 (Value Augmented Sampling), arXiv:2405.06639; vas_trainer.py VASLogitsProcessor.
    """
    op = "value_augmented_logits"
    law = value_augmented_law(logits, token_ids, values, beta=beta)
    check_law(op, "logits", law, 2)
    if choose(op, impl, "logits", logits) == "reference":
        return reference.value_augmented_logits(logits, token_ids, values, beta=beta)
    wide = arrays.dtype(law.values) == "float64"
    batch, vocabulary = map(int, law.values.shape)
    out = arrays.empty(law.values, (batch, vocabulary), "float64" if wide else "float32")
    native.core.decode.logits(batch, pack(law), wide, out)
    return out


def value_augmented_law(logits: Any, token_ids: Any, values: Any, *, beta: float = 1.0) -> Logits:
    """The law of ``value_augmented_logits`` for ``sample`` and verification, with nothing of size V written.

    Args:
        logits, token_ids, values, beta: as in ``value_augmented_logits``.

    Returns:
        ``Logits`` with beta (V_a - mean of V) as bias. ``dataclasses.replace`` adds temperature and truncation.

    Raises:
        TypeError, ValueError: an array of another dtype, shape, library or device.

    Examples:
        >>> import numpy as np
        >>> ids, values = np.array([[0, 2]]), np.array([[9.0, 0.0]], np.float32)
        >>> int(sample(value_augmented_law(np.zeros((1, 3)), ids, values, beta=9.0)).token_ids[0])
        0

    Reference:
        Han et al. 2024 (Value Augmented Sampling), arXiv:2405.06639.
    """
    op = "value_augmented_law"
    check.number(op, "beta", beta)
    check.array(op, "logits", logits, arrays.FLOATS, 2)
    check.array(op, "token_ids", token_ids, ("int64",), 2)
    like = ((int(logits.shape[0]), int(token_ids.shape[1])), "logits", logits)
    check.alike(op, "token_ids", token_ids, ("int64",), *like)
    check.alike(op, "values", values, ("float32",), *like)
    if token_ids.shape[1] == 0:
        return Logits(logits)
    valid = (token_ids >= 0) & (token_ids < logits.shape[1])
    count = valid.sum(-1)[..., None] + (valid.sum(-1)[..., None] == 0)
    mean = (values * valid).sum(-1)[..., None] / count
    bias = beta * (values - mean)
    return replace(Logits(logits), bias_ids=token_ids, bias=arrays.dense(bias, "float32"))
