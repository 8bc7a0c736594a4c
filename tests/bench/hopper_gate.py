"""What the gate of each of Hopper's compiled kernels has to notice."""

from copy import deepcopy

WRONG = {
    "no products": {"inner_loop": None},
    "bytes of shared memory": {"shared_bytes": 300_000},
    "bytes of stack": {"stack_bytes": 96},
    "no copies by TMA": {"tma": 0},
    "serialized": {"ptxas_warnings": ["wgmma.mma_async instructions are serialized"]},
}


def check_gate(problems, row):
    """Plant each mistake in a row that is right."""
    for wrong, change in WRONG.items():
        (problem,) = problems(row | change)
        assert wrong in problem
    loop = deepcopy(row["inner_loop"])
    loop["issue_per_tensor_cycle"], loop["full_tile"]["local memory (spills)"] = 0.7, 3
    assert len(problems(row | {"inner_loop": loop})) == 2
