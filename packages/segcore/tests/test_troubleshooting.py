"""The page of messages: each one that it quotes is in the source."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")


def messages() -> list[str]:
    """Return the first column of the page's tables."""
    return re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)


def texts() -> list[str]:
    """Return all texts in the source of the packages, with … for what is filled in."""
    found = []
    for file in ROOT.glob("packages/*/src/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_quoted_message_is_in_the_source():
    quoted, known = messages(), "\n".join(texts())
    assert len(quoted) == PAGE.count("\n| `")
    patterns = {message: ".*".join(map(re.escape, message.split("…"))) for message in quoted}
    assert [message for message, pattern in patterns.items() if not re.search(pattern, known)] == []
