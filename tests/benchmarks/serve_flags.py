"""The flags of `bench serve`, parsed."""

from __future__ import annotations

import argparse

from lamina_jax.benchmarks import serve
from lamina_jax.benchmarks.quick import parse


def arguments(*flags: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parse(parser, [str(flag) for flag in flags])
