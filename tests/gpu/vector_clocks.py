"""Who has done what to shared memory, and what of it is in whose past: the state behind asynchrony.py."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import count

__all__ = ["AsynchronyError", "State"]


class AsynchronyError(Exception):
    """An access to shared memory that nothing orders after what it depends on."""


class State:
    """Clocks and accesses of one program."""

    def __init__(self):
        self.clocks = {0: {0: 1}}
        self.writes: list[tuple[int, int, object, int]] = []  # begin, end, agent, time
        self.reads: dict[tuple[int, int], dict] = defaultdict(dict)  # agent -> time, until waited for: infinity
        self.unfenced: dict[object, list[tuple[int, int]]] = defaultdict(list)
        self.products: dict[object, list] = defaultdict(list)
        self.stores: dict[object, list] = defaultdict(list)
        self.numbers = count()

    def clock(self, agent):
        return self.clocks.setdefault(agent, {})

    def forget(self, begin, end):
        """Fresh memory lies where other memory has lain."""
        self.writes = [w for w in self.writes if w[1] <= begin or end <= w[0]]
        for place in [p for p in self.reads if p[0] < end and begin < p[1]]:
            del self.reads[place]
        for agent, places in self.unfenced.items():
            self.unfenced[agent] = [p for p in places if p[1] <= begin or end <= p[0]]

    def read_until_told(self, agent, place, what):
        """`agent` has something read `place` until `read_is_over`; returns what it then is to be given."""
        reader = f"{what} {next(self.numbers)} of partition {agent}"
        self.read(agent, place, proxy=True)
        self.reads[place][reader] = math.inf
        return place, reader

    def read_is_over(self, agent, place, reader):
        """What read on behalf of `agent` counts as a read of its own now."""
        readers = self.reads.get(place)
        if readers is not None:
            readers.pop(reader, None)
            readers[agent] = self.clock(agent)[agent]

    def read(self, agent, place, *, proxy):
        """`agent` reads `place` now, by the asynchronous `proxy` or itself."""
        begin, end = place
        clock = self.clock(agent)
        for first, last, writer, when in self.writes:
            if first < end and begin < last and writer != agent and clock.get(writer, 0) < when:
                raise AsynchronyError(f"partition {agent} has not waited for what it reads: {writer} writes it")
        covered = begin
        for first, last, *_ in sorted(self.writes, key=lambda w: w[0]):
            if first <= covered:
                covered = max(covered, last)
        if covered < end:
            raise AsynchronyError(f"partition {agent} has not waited for what it reads: nothing is there")
        if proxy:
            self.check_fence(place)
        self.reads[place][agent] = clock[agent]

    def check_fence(self, place):
        for writer, places in self.unfenced.items():
            if any(p[0] < place[1] and place[0] < p[1] for p in places):
                raise AsynchronyError(f"a copy, product or store takes what partition {writer} wrote without a fence")

    def write(self, agent, place, writer, when):
        """`agent` writes `place`, or has it written by the asynchronous `writer` at its time `when`."""
        begin, end = place
        clock = self.clock(agent)
        for (first, last), readers in self.reads.items():
            if first < end and begin < last:
                for reader, time in readers.items():
                    if clock.get(reader, 0) < time:
                        raise AsynchronyError(f"partition {agent} overwrites what {reader} may still read")
        for first, last, other, time in self.writes:
            if first < end and begin < last and other not in (agent, writer) and clock.get(other, 0) < time:
                raise AsynchronyError(f"partition {agent} overwrites what {other} writes")
        self.writes = [w for w in self.writes if not (begin <= w[0] and w[1] <= end)]
        self.writes.append((begin, end, writer, when))
