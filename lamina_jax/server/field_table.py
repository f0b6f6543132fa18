"""The tables of docs/api.md: what becomes of every field of a request. Made from the request's own class.

python -m lamina_jax.server.field_table
"""

from __future__ import annotations

import json

from lamina_jax.server.protocol import ChatRequest, CompletionRequest, GenerationRequest


def field_table(request: type[GenerationRequest]) -> str:
    """A Markdown table of the fields that a request may have, and of those that it is refused for."""
    honoured = {
        name: (field.description or "").replace("\n", " ") for name, field in request.model_fields.items()
    }
    refused = {name: _unless(harmless) for name, harmless in request.REFUSED.items()}
    lines = ["| field | | |", "|---|---|---|"]
    lines += [f"| `{name}` | honoured | {note} |" for name, note in sorted(honoured.items())]
    lines += [f"| `{name}` | refused | {note} |" for name, note in sorted(refused.items())]
    return "\n".join(lines)


def _unless(harmless: tuple[object, ...]) -> str:
    return "unless " + " or ".join(["null", *(f"`{json.dumps(value)}`" for value in harmless)])


if __name__ == "__main__":
    print(field_table(CompletionRequest), field_table(ChatRequest), sep="\n\n")
