"""Layouts that hide nothing, which torch's own causal attention serves as well.

The makers of layouts know it from what they have on the host anyway, so that nobody waits for the device to ask. It is
no argument of `GistLayout`: what a caller could claim, a caller could claim wrongly, and rows would then see what the
layout hides. It is remembered with the very tensors that it was found for, and forgotten once one of them is written.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from gistkern.layout.fields import LayoutFields

__all__ = ["is_plain", "marked"]

Layout = TypeVar("Layout", bound=LayoutFields)

_MARK = "_plain"


def marked(layout: Layout, plain: bool) -> Layout:
    """Remember that `layout` hides nothing, if its maker has found so (`plain`).

    Not while compiling, and not of numpy arrays or tensors made under `torch.inference_mode`: nobody counts what is
    written to those.
    """
    if not plain or not torch.is_tensor(layout.local_begin) or torch.compiler.is_compiling():
        return layout
    if not layout.local_begin.is_inference():
        vectors = layout.gist_begin, layout.gist_end, layout.local_begin
        layout.__dict__[_MARK] = (*vectors, *(vector._version for vector in vectors))
    return layout


def is_plain(layout: LayoutFields) -> bool:
    """See `GistLayout.plain`. Asked at every layer: attributes only."""
    mark = layout.__dict__.get(_MARK)
    if mark is None or torch.compiler.is_compiling():
        return False
    begin, end, local = layout.gist_begin, layout.gist_end, layout.local_begin
    return (
        mark[0] is begin
        and mark[1] is end
        and mark[2] is local
        and layout.tail == 0
        and mark[3:] == (begin._version, end._version, local._version)
    )
