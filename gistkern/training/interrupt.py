"""`Interrupt`: the first Ctrl-C of a training asks for a checkpoint, a second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

__all__ = ["Interrupt"]


class Interrupt:
    """While entered, a first SIGINT only sets `requested`; a second one does what SIGINT did before.

    Nothing changes outside the main thread, where Python delivers no signals, nor where the process has a handler of
    its own or ignores the signal (as under nohup).

    Attributes
    ----------
    requested : bool
        Whether Ctrl-C was pressed. The training saves when its step is over, and ends.

    Examples
    --------
    >>> from gistkern.training.interrupt import Interrupt
    >>> with Interrupt() as interrupt:
    ...     for step in range(10):
    ...         if interrupt.requested:     # save here
    ...             break
    """

    def __init__(self) -> None:
        self.requested = False
        self._installed = False

    def __enter__(self) -> Interrupt:
        alone = threading.current_thread() is threading.main_thread()
        if alone and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._first)
            self._installed = True
        return self

    def __exit__(self, *exception: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # not print: the signal may have come in the middle of one
        os.write(2, b"\nCtrl-C: a checkpoint is saved after this step. Press again to stop at once, without one.\n")
