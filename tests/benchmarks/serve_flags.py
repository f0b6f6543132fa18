"""The flags of `bench serve`, parsed."""

from __future__ import annotations

import argparse

from lamina_jax.benchmarks import serve


def arguments(*flags: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args([str(flag) for flag in flags])
