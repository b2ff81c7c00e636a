"""PromQL that several panels share."""

TRAFFIC = 'policy=~"$policy",model=~"$model"'
"""Matchers for gateway metrics that carry both variables of the overview."""


def quantile(q: float, histogram: str, matchers: str = "") -> str:
    """A quantile of a classic histogram over all targets. NaN while nothing is observed."""
    return f"histogram_quantile({q}, {per_second(f'{histogram}_bucket', matchers, 'le')})"


def mean(histogram: str, matchers: str = "") -> str:
    """The mean of what a histogram observed, over all targets. NaN while nothing is observed."""
    return f"{per_second(f'{histogram}_sum', matchers)} / {per_second(f'{histogram}_count', matchers)}"


def per_second(counter: str, matchers: str = "", by: str = "") -> str:
    """Events a second over all targets, for each combination of the labels ``by``."""
    return f"{_sum(by)} (rate({_selector(counter, matchers)}[$__rate_interval]))"


def in_range(counter: str, matchers: str = "") -> str:
    """Events in the dashboard's time range, over all targets."""
    return f"sum (increase({_selector(counter, matchers)}[$__range]))"


def ratio(part: str, whole: str) -> str:
    """``part / whole``, and 0 rather than NaN while there is neither."""
    return f"{part} / clamp_min({whole}, 1e-9)"


def _selector(metric: str, matchers: str) -> str:
    return f"{metric}{{{matchers}}}" if matchers else metric


def _sum(by: str) -> str:
    return f"sum by ({by})" if by else "sum"
