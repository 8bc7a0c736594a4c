"""Loops of machine code: basic blocks, natural loops, and the shortest way around the loop that does the work.

Assembly of any target is first reduced to a list of `Instruction` (machine_code.py does that); everything here is
about labels and jumps alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Instruction", "Loop", "working_loop"]


@dataclass(frozen=True)
class Instruction:
    """One instruction: its opcode, the labels that stand before it, and how control leaves it.

    `target` is the label it may jump to; `falls_through` says whether the next instruction may follow.
    """

    opcode: str
    labels: tuple[str, ...] = ()
    target: str | None = None
    falls_through: bool = True


@dataclass(frozen=True)
class Loop:
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
    blocks, successors = _basic_blocks(code)
    if not blocks:
        return None
    holding = {i for i, block in enumerate(blocks) if any(wanted(op) for op in block)}
    loops = [members for members in _natural_loops(successors).items() if members[1] & holding]
    innermost = [(head, body) for head, body in loops if not any(other[1] < body for other in loops)]
    found = []
    for head, body in innermost:
        opcodes = tuple(op for i in sorted(body) for op in blocks[i])
        turn = _shortest_turn(head, body, body & holding, blocks, successors)
        count = sum(wanted(op) for op in opcodes)
        found.append((-count, len(turn), Loop(opcodes, tuple(turn))))
    return min(found, key=lambda entry: entry[:2])[2] if found else None


def _basic_blocks(code: list[Instruction]) -> tuple[list[list[str]], list[set[int]]]:
    """Opcodes and successors of the basic blocks, in the order of the code."""
    starts = [i for i, ins in enumerate(code) if i == 0 or ins.labels or _ends_block(code[i - 1])]
    block_of = {label: n for n, start in enumerate(starts) for label in code[start].labels}
    blocks, successors = [], []
    for n, start in enumerate(starts):
        end = starts[n + 1] if n + 1 < len(starts) else len(code)
        last = code[end - 1]
        follow = {block_of[last.target]} if last.target in block_of else set()
        if last.falls_through and end < len(code):
            follow.add(n + 1)
        blocks.append([ins.opcode for ins in code[start:end]])
        successors.append(follow)
    return blocks, successors


def _ends_block(ins: Instruction) -> bool:
    return ins.target is not None or not ins.falls_through


def _natural_loops(successors: list[set[int]]) -> dict[int, set[int]]:
    """Loop head -> its blocks, from the edges that lead back to a dominator."""
    dominators = _dominators(successors)
    predecessors: list[set[int]] = [set() for _ in successors]
    for i, follow in enumerate(successors):
        for j in follow:
            predecessors[j].add(i)
    loops: dict[int, set[int]] = {}
    for latch, follow in enumerate(successors):
        for head in follow & dominators[latch]:
            body = loops.setdefault(head, {head})
            stack = [latch]
            while stack:
                block = stack.pop()
                if block not in body:
                    body.add(block)
                    stack.extend(p for p in predecessors[block] if dominators[p])
    return loops


def _dominators(successors: list[set[int]]) -> list[set[int]]:
    """The dominators of every block that the first block reaches; an empty set for the others."""
    order, seen, stack = [], {0}, [(0, iter(sorted(successors[0])))]
    while stack:
        rest = stack[-1][1]
        following = next((j for j in rest if j not in seen), None)
        if following is None:
            order.append(stack.pop()[0])
        else:
            seen.add(following)
            stack.append((following, iter(sorted(successors[following]))))
    order.reverse()
    predecessors: dict[int, list[int]] = {i: [j for j in order if i in successors[j]] for i in order}
    dominators = {i: set(order) for i in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for i in order[1:]:
            new = set.intersection(*(dominators[j] for j in predecessors[i])) | {i}
            changed |= new != dominators[i]
            dominators[i] = new
    return [dominators.get(i, set()) for i in range(len(successors))]


def _shortest_turn(
    head: int, body: set[int], through: set[int], blocks: list[list[str]], successors: list[set[int]]
) -> list[str]:
    """Opcodes of the shortest way from head back to head that passes as many blocks of `through` as any way does."""
    order = _topological(head, body, successors)
    best: dict[int, tuple[tuple[int, int], list[int]]] = {head: ((-(head in through), len(blocks[head])), [head])}
    turns = []
    for block in order:
        (missed, length), path = best[block]
        if head in successors[block]:
            turns.append(best[block])
        for j in successors[block] & body - {head}:
            # more wanted blocks first, then fewer instructions
            cost = (missed - (j in through), length + len(blocks[j]))
            if j in order and (j not in best or cost < best[j][0]) and order.index(j) > order.index(block):
                best[j] = (cost, [*path, j])
    return [op for block in min(turns, key=lambda turn: turn[0])[1] for op in blocks[block]]


def _topological(head: int, body: set[int], successors: list[set[int]]) -> list[int]:
    """The blocks of a loop in an order that only inner loops' back edges go against."""
    order: list[int] = []
    seen: set[int] = set()

    def visit(block: int) -> None:
        seen.add(block)
        for j in sorted(successors[block] & body - seen, reverse=True):
            if j not in seen:
                visit(j)
        order.append(block)

    visit(head)
    return order[::-1]
