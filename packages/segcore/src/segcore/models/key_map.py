"""Published parameter names: a table of regular expressions maps our names to theirs. Imports no torch."""

import re
from collections.abc import Callable, Iterable

Rules = Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]
"""(pattern, replacement) pairs as passed to `re.sub`."""


def rename(name: str, rules: Rules) -> str:
    """Return `name` after applying all rules in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


AUXILIARY_HEAD = (
    (r"^auxiliary_head\.hidden\.conv\.", "auxiliary_head.convs.0.conv."),
    (r"^auxiliary_head\.hidden\.norm\.", "auxiliary_head.convs.0.bn."),
    (r"^auxiliary_head\.classifier\.", "auxiliary_head.conv_seg."),
)
"""The rules that map `segcore.models.heads.FCNHead` to MMSegmentation's auxiliary head."""
