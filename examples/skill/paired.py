"""Means over seeds with confidence intervals, and differences between methods that share their seeds.

    interval(x)        mean +- t(n - 1, 0.975) s / sqrt(n),   s^2 = sum (x - mean)^2 / (n - 1)
    paired(x, y)       the same of x - y, seed by seed, with the two-sided p-value of t = mean / (s / sqrt(n))

Student's distribution comes from the regularised incomplete beta function, by its continued fraction (Lentz), so that
nothing but Python is needed:   P(|T| > t) = I_{nu / (nu + t^2)}(nu / 2, 1 / 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean with a 95 % confidence interval of mean +- half; n values."""

    mean: float
    half: float
    n: int


class Difference(NamedTuple):
    """Of pairs: mean +- half at 95 %, and the two-sided p-value of no difference."""

    mean: float
    half: float
    p: float
    n: int

    @property
    def is_significant(self) -> bool:
        return self.p < 0.05


def interval(values: Sequence[float]) -> Interval:
    """Raises ValueError for less than two values."""
    mean, error = _mean_and_error(values)
    return Interval(mean, t_quantile(len(values) - 1) * error, len(values))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """`ours` minus `theirs`, values of the same seeds in the same order."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, error = _mean_and_error(differences)
    n = len(differences)
    if error == 0.0:
        return Difference(mean, 0.0, 1.0 if mean == 0.0 else 0.0, n)
    return Difference(mean, t_quantile(n - 1) * error, t_tail(mean / error, n - 1), n)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error."""
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} values have no spread; give two seeds at least")
    mean = math.fsum(values) / n
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def t_tail(t: float, freedom: int) -> float:
    """P(|T| > |t|) of Student's distribution with `freedom` degrees of freedom."""
    return _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def t_quantile(freedom: int, level: float = 0.95) -> float:
    """The t with P(|T| < t) = level."""
    low, high = 0.0, 1e6
    for _ in range(200):  # halving: to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > 1 - level else (low, middle)
    return (low + high) / 2


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b), for 0 <= x <= 1."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly its mirror image does not
        return 1.0 - _incomplete_beta(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) * _fraction(x, a, b) / a


def _fraction(x: float, a: float, b: float) -> float:
    """Lentz's algorithm."""
    tiny = 1e-300
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, 1000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / (1.0 + numerator * d or tiny)
            c = 1.0 + numerator / c or tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            return value
    raise ArithmeticError(f"the continued fraction does not converge for x {x}, a {a}, b {b}")
