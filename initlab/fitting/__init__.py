"""Starts that are fitted to data: unit variance layer by layer, and advice on what a model and a batch ask for."""

from .advice import Advice, InputAdvice, LayerAdvice
from .advising import advise

__all__ = ["Advice", "InputAdvice", "LayerAdvice", "advise"]
