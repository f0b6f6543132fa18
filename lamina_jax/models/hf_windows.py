"""The sliding windows that a Hugging Face `config.json` asks for, layer by layer."""

from __future__ import annotations

from lamina_jax.models.config import Family
from lamina_jax.models.hf_section import Section

FULL, SLIDING = "full_attention", "sliding_attention"

DEFAULT_WINDOW, DEFAULT_FULL_LAYERS = 4096, 28
"""What transformers takes where `sliding_window` or `max_window_layers` is absent (null is no window)."""


def read_windows(section: Section, family: Family, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer, None where it sees all tokens; empty where no layer has one.

    Mistral: `sliding_window` in all layers. Qwen2 and Qwen3: in those that `layer_types` names or, without
    it, from `max_window_layers` on; only with `use_sliding_window`, else the window is a mere default.

    Raises:
        CheckpointError: keys that contradict each other, or a window in a family that has none.
    """
    window, first = _window(section), 0
    if family != "mistral":
        first = _first_windowed_layer(section)
        if not section.get("use_sliding_window", bool, False):
            window = None
        elif family == "llama" and window is not None:
            raise section.error("sliding_window", window, "none in use: set use_sliding_window to false")
    types = section.get("layer_types", list, [])
    if window is None:
        if any(kind != FULL for kind in types):
            raise section.error("layer_types", types, f"{FULL!r} for every layer, as no window is in use")
        return ()
    implied = [FULL if layer < first else SLIDING for layer in range(num_layers)]
    if types and family == "mistral" and types != implied:
        raise section.error("layer_types", types, f"{SLIDING!r} for every layer")
    if types and (len(types) != num_layers or any(kind not in (FULL, SLIDING) for kind in types)):
        raise section.error("layer_types", types, f"{FULL!r} or {SLIDING!r} for each of {num_layers} layers")
    windows = tuple(window if kind == SLIDING else None for kind in types or implied)
    return windows if any(windows) else ()


def _window(section: Section) -> int | None:
    if "sliding_window" in section.values:
        return section.require("sliding_window", int) if section.has("sliding_window") else None
    return DEFAULT_WINDOW


def _first_windowed_layer(section: Section) -> int:
    first = section.values.get("max_window_layers")
    if first is None:
        return DEFAULT_FULL_LAYERS
    if type(first) is not int or first < 0:
        raise section.error("max_window_layers", first, "a number of layers")
    return first
