"""What the README shows is what happens."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_slicing_example_prints_its_table() -> None:
    text = README.read_text(encoding="utf-8")
    match = re.search(r"<!-- example.*?-->\n```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL)
    assert match, "the README's example and its table are marked by a comment"
    code, table = match.groups()
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(README), "exec"), {"__name__": "readme"})
    assert [line.rstrip() for line in printed.getvalue().splitlines()] == [
        line.rstrip() for line in table.splitlines()
    ]
