"""A catalogue of messages: English templates, and what they are in another language.

A message is an English string, and stays one in a diagnosis, in JSON, in a pickle and from another rank. The catalogue
has the template of each, as its f-string is written, with {} for every field: "the loss went {}: the rate {} is too
low". Who prints in another language looks the message's template up, and puts its fields into the translation: {0} as it
is, a number or a name; {0:t} translated in turn, where it is a message itself. What has no template stays English.

tests/test_languages.py reads the f-strings from the source: each has its translation, and no translation is left over.
"""

from __future__ import annotations

import functools
import io
import json
import re
import tokenize
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

LANGUAGES = ("en", "zh")
_TELLING = 8  # characters of a template that are more than a word between two names, as in "{} in {}"
_FIELD = re.compile(r"\{(\d+)(:t)?\}")
_JOINTS = {"; ": "\uff1b", ". ": "\u3002", ": ": "\uff1a", ", ": "\uff0c"}  # between messages, as Chinese has them


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
        patterns = [(_pattern(english), entries[english]) for english in templates]
        telling = sum(_literal(english) >= _TELLING for english in templates)
        self.patterns, self.last = patterns[:telling], patterns[telling:]
        self._known = functools.lru_cache(maxsize=4096)(self._translated)

    def __call__(self, message: str) -> str:
        """A message in the other language; what is not in the catalogue as it is."""
        return self._known(message) or message

    def code(self, code: str) -> str:
        """Code whose comments are messages: they are translated, and nothing else is."""
        return "\n".join(self._line(line) for line in code.splitlines())

    def _translated(self, message: str) -> str:
        if message in self.exact:
            return self.exact[message]
        return self._matched(message, self.patterns) or self._joined(message) or self._matched(message, self.last)

    def _matched(self, message: str, patterns: list[tuple[re.Pattern[str], str]]) -> str:
        for pattern, text in patterns:
            if (match := pattern.fullmatch(message)) is not None:
                return self._filled(text, match.groups())
        return ""

    def _filled(self, text: str, fields: tuple[str, ...]) -> str:
        def field(match: re.Match[str]) -> str:
            value = fields[int(match[1])]
            return self(value) if match[2] else value

        return _FIELD.sub(field, text)

    def _joined(self, message: str) -> str:
        """A message made of two; "" where one of them is not known."""
        for joint, mark in _JOINTS.items():
            at = message.find(joint)
            while at >= 0:
                left, right = message[:at], message[at + len(joint) :]
                ours = self(left), self(right)
                if ours[0] != left and ours[1] != right:
                    return f"{ours[0].removesuffix('。')}{mark}{ours[1]}"
                at = message.find(joint, at + 1)
        return ""

    def _line(self, line: str) -> str:
        at = _comment(line)
        return line if at < 0 else line[:at] + "# " + self(line[at + 1 :].strip())


def _literal(template: str) -> int:
    """How many characters a template fixes: of two that fit, the one that says more is meant."""
    return len(template.replace("{}", ""))


def _pattern(template: str) -> re.Pattern[str]:
    field = "(.*?)" if _literal(template) >= _TELLING else r"(\S*?)"
    return re.compile(field.join(map(re.escape, template.split("{}"))), re.DOTALL)


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
