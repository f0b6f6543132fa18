"""What a person sees of a start: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from lamina_jax.server.report import StartReport


def shown(*, terminal: bool) -> str:
    out = io.StringIO()
    report = StartReport(Console(file=out, force_terminal=terminal, width=100))
    report.progress("loading weights", 0, 0)
    for done in range(25):
        report.progress("compiling", done, 24)
    report.close()
    report.line("ready: [now]")
    return out.getvalue()


def test_lines_where_there_is_no_terminal() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines == [
        "loading weights, 0 s",
        "compiling 0/24, 0 s",
        "compiling 24/24, 0 s",
        "ready: [now]",
    ]


def test_a_bar_on_a_terminal() -> None:
    text = shown(terminal=True)
    assert "compiling" in text
    assert "24/24" in text
    assert "0:00:00" in text
    assert text.endswith("ready: [now]\n")
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor stays hidden"
