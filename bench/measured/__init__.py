"""Measured by a clock or a counter on the named device, beside what a user would pick instead."""
