"""Calculated from published peaks, shapes and formulas; nothing here ran."""
