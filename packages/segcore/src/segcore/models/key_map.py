"""Published parameter names: a table of regular expressions turns ours into theirs. Imports no torch."""

import re
from collections.abc import Callable, Iterable

Rules = Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]
"""(pattern, replacement) pairs as `re.sub` takes them."""


def rename(name: str, rules: Rules) -> str:
    """Return `name` after all rules, applied in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


AUXILIARY_HEAD = (
    (r"^auxiliary_head\.hidden\.conv\.", "auxiliary_head.convs.0.conv."),
    (r"^auxiliary_head\.hidden\.norm\.", "auxiliary_head.convs.0.bn."),
    (r"^auxiliary_head\.classifier\.", "auxiliary_head.conv_seg."),
)
"""The rules of `segcore.models.heads.FCNHead` as MMSegmentation's auxiliary head."""
