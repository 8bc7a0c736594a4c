"""Loops of machine code: basic blocks, natural loops, and the shortest way around the loop that does the work.

Assembly of any target is first reduced to a list of `Instruction` (machine_code.py does that); everything here is
about labels and jumps alone.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import networkx as nx


class Instruction(NamedTuple):
    """One instruction: its opcode, the labels that stand before it, and how control leaves it.

    `target` is the label it may jump to; `falls_through` says whether the next instruction may follow.
    """

    opcode: str
    labels: tuple[str, ...] = ()
    target: str | None = None
    falls_through: bool = True


class Loop(NamedTuple):
    """The opcodes of a loop: of its whole body, and of its shortest turn.

    The shortest turn goes from the loop's first block back to it, through every block that holds wanted opcodes. In a
    kernel that masks boundary tiles only, that is what one full tile costs: the mask's arm is not on it.
    """

    body: tuple[str, ...]
    shortest_turn: tuple[str, ...]


def working_loop(code: list[Instruction], wanted: Callable[[str], bool]) -> Loop | None:
    """The innermost loop with wanted opcodes, or None if no loop holds any.

    Of several, the ones with the most wanted opcodes count, and of those the one with the shortest turn: in a kernel
    with one loop for full tiles and one for masked tiles that is the first.
    """
    blocks, flow = _basic_blocks(code)
    if not blocks:
        return None
    holding = {i for i, block in enumerate(blocks) if any(wanted(op) for op in block)}
    loops = [members for members in _natural_loops(flow).items() if members[1] & holding]
    innermost = [(head, body) for head, body in loops if not any(other[1] < body for other in loops)]
    found = []
    for head, body in innermost:
        opcodes = tuple(op for i in sorted(body) for op in blocks[i])
        turn = _shortest_turn(head, body, body & holding, blocks, flow)
        count = sum(wanted(op) for op in opcodes)
        found.append((-count, len(turn), Loop(opcodes, tuple(turn))))
    return min(found, key=lambda entry: entry[:2])[2] if found else None


def _basic_blocks(code: list[Instruction]) -> tuple[list[list[str]], nx.DiGraph]:
    """Opcodes of the basic blocks, in the order of the code, and where control goes of those that it reaches."""
    starts = [i for i, ins in enumerate(code) if i == 0 or ins.labels or _ends_block(code[i - 1])]
    block_of = {label: n for n, start in enumerate(starts) for label in code[start].labels}
    blocks, flow = [], nx.DiGraph()
    flow.add_nodes_from(range(len(starts)))
    for n, (start, end) in enumerate(pairwise([*starts, len(code)])):
        last = code[end - 1]
        follow = {block_of[last.target]} if last.target in block_of else set()
        if last.falls_through and end < len(code):
            follow.add(n + 1)
        blocks.append([ins.opcode for ins in code[start:end]])
        flow.add_edges_from((n, j) for j in sorted(follow, reverse=True))
    return blocks, flow.subgraph({0} | nx.descendants(flow, 0)) if blocks else flow


def _ends_block(ins: Instruction) -> bool:
    return ins.target is not None or not ins.falls_through


def _natural_loops(flow: nx.DiGraph) -> dict[int, set[int]]:
    """Loop head -> its blocks, from the edges that lead back to a dominator."""
    dominator = nx.immediate_dominators(flow, 0)
    loops: dict[int, set[int]] = {}
    for latch, head in flow.edges:
        block = latch
        while block not in (head, 0):
            block = dominator[block]
        if block == head:
            rest = flow.subgraph(set(flow) - {head})
            loops.setdefault(head, {head}).update({latch}, nx.ancestors(rest, latch) if latch != head else ())
    return loops


def _shortest_turn(
    head: int, body: set[int], through: set[int], blocks: list[list[str]], flow: nx.DiGraph
) -> list[str]:
    """Opcodes of the shortest way from head back to head that passes as many blocks of `through` as any way does."""
    # an order that only inner loops' back edges go against
    order = list(nx.dfs_postorder_nodes(flow.subgraph(body), head))[::-1]
    place = {block: i for i, block in enumerate(order)}
    best: dict[int, tuple[tuple[int, int], list[int]]] = {head: ((-(head in through), len(blocks[head])), [head])}
    turns = []
    for block in order:
        (missed, length), path = best[block]
        if head in flow[block]:
            turns.append(best[block])
        for j in flow[block]:
            # more wanted blocks first, then fewer instructions
            cost = (missed - (j in through), length + len(blocks[j]))
            if place.get(j, 0) > place[block] and (j not in best or cost < best[j][0]):
                best[j] = (cost, [*path, j])
    return [op for block in min(turns, key=lambda turn: turn[0])[1] for op in blocks[block]]
