"""A catalogue of messages: English templates, and what they are in another language.

A message is an English string, and stays one in a diagnosis, in JSON, in a pickle and from another rank. The catalogue
has the template of each, as its f-string is written, with {} for every field: "the rate {} is too large". Who prints in
another language looks the message's template up, and puts its fields into the translation: {0} as it is, a number or a
name; {0:t} translated in turn, where it is a message itself. What has no template stays English.

tests/test_languages.py reads the f-strings from the source: each has its translation, and no translation is left over.
"""

from __future__ import annotations

import functools
import io
import json
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

LANGUAGES = ("en", "zh")
_SURE = 12  # characters that a template fixes: no other message has them by chance
_PROSE = re.compile(r"[a-z]{2,} [a-z]{2,}")
_FIELD = re.compile(r"\{(\d+)(:t)?\}")
_STOP = "\u3002"
_JOINTS = {"; ": "\uff1b", ". ": _STOP, ": ": "\uff1a", ", ": "\uff0c", " and ": "\uff0c\u5e76"}  # between two messages
_GAP = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef]) (?=[\u3000-\u9fff\uff00-\uffef])")  # Chinese has none


class _Template:
    """A message with fields, and its translation."""

    def __init__(self, english: str, text: str) -> None:
        self.english, self.text = english, text
        self.literals = english.split("{}")
        self.mark = max(self.literals, key=len)
        self.messages = {int(number) for number, translated in _FIELD.findall(text) if translated}

    def filled(self, fields: Sequence[str]) -> str:
        """The translation with its fields."""
        return _FIELD.sub(lambda match: fields[int(match[1])], self.text)

    def readings(
        self, message: str, field: Callable[[int, str], str | None], number: int = 0, begin: int = -1
    ) -> Iterator[tuple[str, ...]]:
        """The ways to read a message, the shortest fields first.

        Args:
            field: what is made of a field; None where it cannot be that one.
        """
        if begin < 0:
            if not message.startswith(self.literals[0]):
                return
            begin = len(self.literals[0])
        literal = self.literals[number + 1]
        if number + 2 == len(self.literals):
            end = len(message) - len(literal)
            if end >= begin and message.endswith(literal) and (made := field(number, message[begin:end])) is not None:
                yield (made,)
            return
        at = message.find(literal, begin)
        while at >= 0:
            if (made := field(number, message[begin:at])) is not None:
                for others in self.readings(message, field, number + 1, at + len(literal)):
                    yield (made, *others)
            at = message.find(literal, at + 1)


class Catalogue:
    """Translates messages.

    Args:
        entries: translations by English template.

    Example:
        >>> from initlab.languages import Catalogue
        >>> say = Catalogue({"{} in {} is {}": "{1} 中的 {0} {2:t}", "zero": "为零"})
        >>> say("log in encoder.2 is zero")
        'encoder.2 中的 log 为零'
    """

    def __init__(self, entries: Mapping[str, str]) -> None:
        self.exact = {english: text for english, text in entries.items() if "{}" not in english}
        templates = sorted((english for english in entries if "{}" in english), key=_literal, reverse=True)
        self.templates = [_Template(english, entries[english]) for english in templates]
        self._known = functools.lru_cache(maxsize=4096)(self._found)

    def __call__(self, message: str) -> str:
        """A message in the other language; what is not in the catalogue as it is."""
        # What is left has a text of somebody else's for a field, as an error's.
        text = self._known(message) or self._matched(message, self._as_given) or message
        return _GAP.sub("", text)

    def code(self, code: str) -> str:
        """Code whose comments are messages: they are translated, and nothing else is."""
        return "\n".join(self._line(line) for line in code.splitlines())

    def _found(self, message: str) -> str:
        """The translation; "" where there is none."""
        return self.exact.get(message) or self._matched(message, self._as_meant) or self._joined(message)

    def _matched(self, message: str, fields_of: Callable[[_Template, str], Sequence[str] | None]) -> str:
        for template in self.templates:
            if template.mark in message and (fields := fields_of(template, message)) is not None:
                return template.filled(fields)
        return ""

    def _as_meant(self, template: _Template, message: str) -> Sequence[str] | None:
        """The fields, translated, of the first way to read a message by a template that leaves no prose unknown."""

        def field(number: int, given: str) -> str | None:
            said = self._known(given) if number in template.messages else ""
            return said or (None if _PROSE.search(given) else given)

        return next(template.readings(message, field), None)

    def _as_given(self, template: _Template, message: str) -> Sequence[str] | None:
        if _literal(template.english) < _SURE:
            return None
        return next(template.readings(message, lambda number, given: self(given)), None)

    def _joined(self, message: str) -> str:
        """A message made of two; "" where one of them is not known."""
        for joint, mark in _JOINTS.items():
            at = message.find(joint)
            while at >= 0:
                left, right = message[:at], message[at + len(joint) :]
                ours = self._known(left)
                if ours and (others := self._known(right)):
                    return f"{ours.removesuffix(_STOP)}{mark}{others}"
                at = message.find(joint, at + 1)
        return ""

    def _line(self, line: str) -> str:
        at = _comment(line)
        return line if at < 0 else line[:at] + "# " + self(line[at + 1 :].strip())


def _literal(template: str) -> int:
    """How many characters a template fixes: of two that fit, the one that says more is meant."""
    return len(template.replace("{}", ""))


def _comment(line: str) -> int:
    """Where a comment begins in a line of code; -1 where there is none."""
    if "#" not in line:
        return -1
    try:
        for token in tokenize.generate_tokens(io.StringIO(line.lstrip()).readline):
            if token.type == tokenize.COMMENT:
                return len(line) - len(line.lstrip()) + token.start[1]
    except (tokenize.TokenError, IndentationError, SyntaxError):  # a line of a longer expression
        return line.find("# ")
    return -1


@functools.cache
def _catalogue(language: str) -> Catalogue:
    return Catalogue(json.loads(Path(__file__).with_name(f"{language}.json").read_text(encoding="utf-8")))


class Say(Protocol):
    """What translates messages, and the comments of code."""

    def __call__(self, message: str) -> str: ...

    def code(self, code: str) -> str: ...


class _English:
    """What is written."""

    def __call__(self, message: str) -> str:
        return message

    def code(self, code: str) -> str:
        return code


def translator(language: str) -> Say:
    """What translates messages into a language.

    Args:
        language: "en", which changes nothing, or "zh", Chinese.

    Raises:
        ValueError: for another language.

    Example:
        >>> from initlab.languages import translator
        >>> translator("zh")("all zero"), translator("en")("all zero")
        ('全为零', 'all zero')
    """
    if language not in LANGUAGES:
        raise ValueError(f"lang is {language!r}; it must be one of {', '.join(map(repr, LANGUAGES))}")
    return _English() if language == "en" else _catalogue(language)
