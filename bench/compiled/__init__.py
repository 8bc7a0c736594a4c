"""Compiled by the real compilers for real chips, not run: registers, spills, shared memory, instructions."""
