"""Reports as HTML pages that need nothing else: no network, no other file, any screen, light and dark.

diagnoses.py, scripts.py and plans.py make a report's page of what parts.py offers, demos.py the demo's; layout.py is
what all pages share, with page.css and page.js; writing.py puts a page into a file.
"""

from .demos import demo_page
from .diagnoses import diagnosis_page
from .plans import plan_page
from .scripts import script_page
from .writing import checked_path, write_page

__all__ = ["checked_path", "demo_page", "diagnosis_page", "plan_page", "script_page", "write_page"]
