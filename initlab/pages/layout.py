"""What all pages share: the head with its style and script, and a policy that lets nothing be loaded."""

from __future__ import annotations

import base64
import hashlib
import platform
from html import escape
from pathlib import Path

import torch

MAKER = '<p class="maker">initlab</p>'  # above a page's headline
_HTML_LANGUAGES = {"en": "en", "zh": "zh-CN"}


def html_page(title: str, body: str, lang: str) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML, of `parts`.
        lang: the language of the text.

    Returns:
        The page, the same text for the same report.
    """
    from .. import __version__

    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing may be fetched, and no script may run but ours: also none that a name in the report is made of.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    made = f"initlab {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"""<!DOCTYPE html>
<html lang="{_HTML_LANGUAGES[lang]}">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
{body}
<footer>{escape(made)}</footer>
<script>{script}</script>
</body>
</html>
"""
