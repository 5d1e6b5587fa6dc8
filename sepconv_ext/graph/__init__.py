"""Whole networks: captured by torch.export, rewritten by patterns, laid out, packed and frozen."""

from .freeze import Frozen, FrozenParts, freeze

__all__ = ["Frozen", "FrozenParts", "freeze"]
