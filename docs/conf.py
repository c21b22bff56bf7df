"""How the pages of this folder become a site: `make docs`."""

import re

import initlab

project = "initlab"
author = "the initlab developers"
copyright = author
release = version = initlab.__version__
html_title = f"initlab {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
language = "en"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4  # links to headings, as GitHub has them
suppress_warnings = ["myst.header"]  # an included page begins where the project's own file does

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
default_role = "code"  # `x` in a docstring is code

html_theme = "furo"  # search, light and dark; everything it shows is served with the page
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}


_NAME = re.compile(r"(?<![\w.`])((?:\w+\.)*\w+_)(?![\w`])")  # it ends in _: reStructuredText takes it for a link
_SPAN = re.compile(r"(`[^`]*`|\*\w+\*)")


def as_rest(app, what, name, obj, options, lines):
    """Docstrings are plain prose: what reStructuredText would take for markup is escaped, outside of examples."""
    example = False
    for number, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if not example and not line.lstrip().startswith((":", "..")):
            parts = _SPAN.split(line)
            parts[::2] = [_NAME.sub(r"``\1``", part.replace("*", r"\*").replace("|", r"\|")) for part in parts[::2]]
            lines[number] = "".join(parts)


def reach_by_keyboard(app, pagename, templatename, context, doctree):
    """A block that scrolls is reached without a mouse, a heading has a level. Nothing asks a server for MathJax."""
    context["body"] = re.sub(r"<pre(?=>)", '<pre tabindex="0"', context.get("body", ""))
    for tree in ("furo_navigation_tree", "body"):
        context[tree] = (context.get(tree) or "").replace('role="heading">', 'role="heading" aria-level="2">')
    context["script_files"] = [file for file in context["script_files"] if "mathjax" not in str(file).lower()]


def setup(app):
    app.connect("html-page-context", reach_by_keyboard, priority=900)  # after MathJax adds itself
    app.connect("autodoc-process-docstring", as_rest, priority=400)  # before napoleon adds markup of its own
