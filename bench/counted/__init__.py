"""Counted from layouts, configs and schedules: tiles, products, balance. Nothing here is a time."""
