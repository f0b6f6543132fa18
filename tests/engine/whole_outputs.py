"""Whole outputs, put together from what the steps of an engine tell."""

from __future__ import annotations

from collections.abc import Iterable

from lamina_jax.core import RequestOutput


def gather(outputs: dict[str, RequestOutput], news: Iterable[RequestOutput]) -> None:
    """Add what is new to the outputs of each request so far; nothing comes after the end."""
    for new in news:
        whole = outputs.setdefault(new.request_id, RequestOutput(request_id=new.request_id))
        assert not whole.finished, f"{new.request_id} has ended before"
        whole.extend(new)
