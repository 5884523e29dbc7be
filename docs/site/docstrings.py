"""Docstrings as Markdown: doctests and literal blocks become code, for the reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^(?P<pad> *)>>> .*(?:\n(?! *\n).+)*", re.MULTILINE)
_LITERAL = re.compile(r"::(?=\n\n {4})")


def as_markdown(docstring: str) -> str:
    r"""Return a docstring with its doctests in code fences, and with ``::`` before code as ":".

    >>> print(as_markdown("Add.\n\n>>> 1 + 1\n2").replace("`", "'"))
    Add.
    <BLANKLINE>
    '''pycon
    >>> 1 + 1
    2
    '''
    """

    def fenced(match: re.Match[str]) -> str:
        pad = match["pad"]
        return f"{pad}```pycon\n{match[0]}\n{pad}```"

    return _LITERAL.sub(":", _DOCTEST.sub(fenced, docstring))


class Docstrings(griffe.Extension):  # type: ignore[misc]
    """Apply `as_markdown` to every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # noqa: ANN401
        """Change the docstring of one object of the package."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
