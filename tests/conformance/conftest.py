"""The server that tests share is made in fake_server."""

from fake_server import fake

__all__ = ["fake"]
