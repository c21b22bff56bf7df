"""Reports in other languages than English."""

from .catalogue import LANGUAGES, Catalogue, Say, translator

__all__ = ["LANGUAGES", "Catalogue", "Say", "translator"]
