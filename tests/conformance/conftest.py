"""The server that tests share is made in fake_server."""

from __future__ import annotations

from fake_server import fake

__all__ = ["fake"]
