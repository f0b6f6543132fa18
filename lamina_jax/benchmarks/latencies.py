"""What a client sees of its requests, and the figures that sum it up.

The figures mean what they mean in the serving benchmarks of vLLM and SGLang; docs/load.md says what that is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FIGURES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token gap",
    "e2e": "end to end",
}


@dataclass(kw_only=True)
class Record:
    """One request, as its client saw it. Times are in seconds.

    Attributes:
        sent: when it was sent, after the load began.
        prompt_tokens: of its prompt.
        arrivals: when tokens came, after it was sent; one entry for each event of the stream that had any.
        counts: how many tokens each of them had.
        usage: tokens of the continuation, where the server tells.
        error: what kind of failure ended it; None: it ended as it should.
    """

    sent: float
    prompt_tokens: int
    arrivals: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    usage: int | None = None
    error: str | None = None

    @property
    def output_tokens(self) -> int:
        return sum(self.counts) if self.usage is None else self.usage

    @property
    def ttft(self) -> float | None:
        """From sent to the first token; None where none came."""
        return self.arrivals[0] if self.arrivals else None

    @property
    def e2e(self) -> float | None:
        """From sent to the last token."""
        return self.arrivals[-1] if self.arrivals else None

    @property
    def tpot(self) -> float | None:
        """Mean time of the tokens after the first; None where there is one at most."""
        if self.output_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Between one arrival of tokens and the next."""
        return np.diff(self.arrivals).tolist()

    def as_row(self) -> dict[str, Any]:
        """For JSON, with times in milliseconds but for `sent_s`."""
        return {
            "sent_s": self.sent,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "ttft_ms": _ms(self.ttft),
            "tpot_ms": _ms(self.tpot),
            "e2e_ms": _ms(self.e2e),
            "gaps_ms": [1e3 * gap for gap in self.gaps],
            "error": self.error,
        }


def summary(records: Sequence[Record], seconds: float) -> dict[str, Any]:
    """The figures of a load that took `seconds`; requests that failed count as such and nowhere else.

    Each of `FIGURES` is a dict of its mean, p50, p90, p99 and maximum in milliseconds, None where nothing is
    known.
    """
    ok = [record for record in records if record.error is None]
    output = sum(record.output_tokens for record in ok)
    return {
        "requests_ok": len(ok),
        "requests_failed": len(records) - len(ok),
        "errors": dict(Counter(record.error for record in records if record.error is not None)),
        "seconds": seconds,
        "requests_per_second": len(ok) / seconds,
        "prompt_tokens": sum(record.prompt_tokens for record in ok),
        "output_tokens": output,
        "output_tokens_per_second": output / seconds,
        "ttft_ms": spread([record.ttft for record in ok]),
        "tpot_ms": spread([record.tpot for record in ok]),
        "itl_ms": spread([gap for record in ok for gap in record.gaps]),
        "e2e_ms": spread([record.e2e for record in ok]),
    }


def goodput(
    records: Sequence[Record], seconds: float, *, ttft_ms: float | None, tpot_ms: float | None
) -> float:
    """Requests per second that ended as they should, with neither time above its bound."""
    good = [
        record
        for record in records
        if record.error is None
        and (ttft_ms is None or (record.ttft is not None and 1e3 * record.ttft <= ttft_ms))
        and (tpot_ms is None or record.tpot is None or 1e3 * record.tpot <= tpot_ms)
    ]
    return len(good) / seconds


def spread(seconds: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, percentiles and maximum of what is known, in milliseconds."""
    known = np.array([value for value in seconds if value is not None])
    if not len(known):
        return None
    p50, p90, p99 = np.percentile(known, (50, 90, 99))
    values = {"mean": known.mean(), "p50": p50, "p90": p90, "p99": p99, "max": known.max()}
    return {name: 1e3 * float(value) for name, value in values.items()}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
