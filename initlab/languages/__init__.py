"""Reports in other languages than English."""

from .catalogue import LANGUAGES, Catalogue, translator

__all__ = ["LANGUAGES", "Catalogue", "translator"]
