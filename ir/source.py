"""A text, the grammar it is held against, and what is said where it does not fit."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

from lark import Lark, Token, Tree, UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from .errors import CascadeError, Location

ParseTree: TypeAlias = "Tree[Token]"
REDUCTION_WORDS = ("sum", "prod", "max", "min", "any", "all", "argmax", "argmin", "cumsum", "cumprod", "cummax", "cummin")
ONE_REDUCTION = "a reduction binds the rest of its line: give it a statement of its own"
_REDUCTION_BEFORE = re.compile(rf"[^\w\s]\s*({'|'.join(REDUCTION_WORDS)})\s*\([^()]*\)\s*$")
_OPERAND = frozenset({"NAME", "INT", "FLOAT", "LPAR", "MINUS", "NOT"})
_OPERATOR = frozenset({"OR", "XOR", "AND", "COMPARE", "SHIFT", "ADD", "MUL", "POW"})
_WORDS = {
    "NAME": "a name", "INT": "a whole number", "FLOAT": "a number", "NOTE": "", "$END": "the end of the text",
    "_NL": "the end of the line", "_INDENT": "an indented line", "_DEDENT": "the end of the block",
    "REDUCE": "a reduction", "SCAN": "a scan", "POPULATE": "topk, sort, threshold or mass", "SCATTER": "scatter", "CONCAT": "concat",
    "DOT": "dot", "RANK": "`rank`", "ITERATE": "`iterate`", "UNTIL": "`until`", "GRID": "`grid`", "RESIDENT": "`resident`",
    "STORE": "`store`", "STATE": "`state`", "FOR": "`for`",
}  # fmt: skip


@cache
def _parser() -> Lark:
    grammar = Path(__file__).with_name("cascade.lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", start=["cascade", "kernel"], postlex=_Lines(), propagate_positions=True, maybe_placeholders=True)


class _Lines:
    """Turns line breaks into blocks by their indentation; within brackets there are no lines and no notes."""

    always_accept = ("_NL", "NOTE")

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        """The tokens with `_INDENT` and `_DEDENT` put in."""
        opened: list[Token] = []
        levels = [0]
        for token in stream:
            if token.type in ("LPAR", "LSQB"):
                opened.append(token)
            elif token.type in ("RPAR", "RSQB") and opened:
                opened.pop()
            if token.type not in ("_NL", "NOTE"):
                yield token
            elif not opened:
                yield token
                if token.type == "_NL":
                    yield from self._indentation(token, levels)
        if opened:
            raise _BadLayout(opened[-1].line or 0, opened[-1].column or 0, f"the bracket '{opened[-1]}' is never closed", "close it")
        for _ in levels[1:]:
            yield Token("_DEDENT", "")

    @staticmethod
    def _indentation(token: Token, levels: list[int]) -> Iterator[Token]:
        width = len(token.rsplit("\n", 1)[1].expandtabs(8))
        if width > levels[-1]:
            levels.append(width)
            yield Token("_INDENT", "", line=token.end_line, column=width + 1)
        while width < levels[-1]:
            levels.pop()
            yield Token("_DEDENT", "", line=token.end_line, column=width + 1)
        if width != levels[-1]:
            raise _BadLayout(token.end_line or 0, width + 1, "this line belongs to no block above it", "indent it like its neighbours")


class _BadLayout(Exception):
    """A line between the indentations of the blocks above it, or a bracket that stays open."""

    def __init__(self, line: int, column: int, what: str, hint: str) -> None:
        super().__init__(what)
        self.line, self.column, self.what, self.hint = line, column, what, hint


@dataclass(frozen=True, slots=True)
class Source:
    """A text, where it is from, and how much was cut from the left of each of its lines and put before the first."""

    text: str
    file: str
    margin: int

    @staticmethod
    def of(text: str, file: str) -> Source:
        dedented = textwrap.dedent(text.expandtabs(8))
        first = next((line for line in text.expandtabs(8).splitlines() if line.strip()), "")
        margin = len(first) - len(next((line for line in dedented.splitlines() if line.strip()), ""))
        return Source(dedented, file, margin)

    def parse(self, start: str) -> ParseTree:
        """The tree of the whole text. Raises `CascadeError` at the first place that does not fit the grammar."""
        try:
            return _parser().parse("\n" + self.text + "\n", start=start)
        except UnexpectedInput as error:
            raise self._unexpected(error) from None
        except _BadLayout as error:
            raise CascadeError(error.what, location=self.location(error.line, error.column), hint=error.hint) from None

    def location(self, line: int, column: int) -> Location:
        """The place of a token, which the parser counts in the dedented text with an empty line before it."""
        lines = self.text.splitlines()
        number = min(max(line - 1, 1), max(len(lines), 1))
        text = " " * self.margin + lines[number - 1] if lines else ""
        at = column + self.margin if number == line - 1 else len(text) + 1
        return Location(self.file, number, at, text)

    def error(self, at: ParseTree | Token, what: str, hint: str | None = None) -> CascadeError:
        """An error at a tree or token."""
        place = at if isinstance(at, Token) else at.meta
        return CascadeError(what, location=self.location(getattr(place, "line", 1) or 1, getattr(place, "column", 1) or 1), hint=hint)

    def _unexpected(self, error: UnexpectedInput) -> CascadeError:
        end = self.text.count("\n") + 3  # the blocks that end with the text end nowhere
        location = self.location(error.line or end, error.column or 1)
        if isinstance(error, UnexpectedCharacters):
            raise CascadeError(f"{error.char!r} is no character of the language", location=location) from None
        found, expected = "end of the text", set()
        if isinstance(error, UnexpectedToken):
            layout = error.token.type in ("_NL", "$END", "_INDENT", "_DEDENT")
            found = _WORDS[error.token.type].split(" ", 1)[1] if layout else repr(str(error.token))
            expected = error.accepts or error.expected
        before = (location.text or "")[: location.column - 1]
        return CascadeError(f"unexpected {found}, expected {_listed(expected)}", location=location, hint=_hint(found, expected, before))


def _listed(expected: set[str]) -> str:
    """What the grammar would accept, in words."""
    words: list[str] = []
    rest = set(expected)
    if rest >= _OPERAND:
        words.append("an expression")
        rest -= _OPERAND
    if len(_OPERATOR & rest) > 3:
        words.append("an operator")
        rest -= _OPERATOR
    patterns = {t.name: t.pattern for t in _parser().terminals}
    for name in sorted(rest):
        word = _WORDS.get(name)
        if word is None:
            word = f"'{patterns[name].value}'" if name in patterns and patterns[name].type == "str" else name.lower()
        if word:
            words.append(word)
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1] if words else "nothing more"


def _hint(found: str, expected: set[str], before: str) -> str:
    if _REDUCTION_BEFORE.search(before):
        return ONE_REDUCTION
    if expected == {"$END"}:
        return "a text holds one cascade"
    if "CASCADE" in expected or "KERNEL" in expected:
        return "a text begins with its header: cascade name(X[b,m]: f32) -> Y[b]"
    if found == "'='":
        return "== compares; a statement is one line: S[b,m] = sum(e) Q[b,m,e]"
    if found in ("'<'", "'>'", "'<='", "'>='", "'=='", "'!='"):
        return "comparisons do not chain: (a < b) & (b < c)"
    if "_INDENT" in expected:
        return "what belongs to the block is indented below it"
    return "a statement reads S[b,m] = sum(e) Q[b,m,e] * K[b,e]; the grammar is in ir/README.md"
