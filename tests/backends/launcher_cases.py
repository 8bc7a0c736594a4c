"""Launches by Triton and by the extension, over a stub of the driver. test_launcher.py runs this in its own process."""

# ruff: noqa: E402, N803 (the stub comes before Triton; constants are in upper case as in kernels/)

import re

import pytest
import torch

from bench.measured import stub

stub.activate()

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gistkern.backends import native
from gistkern.backends.launcher import kernel_parameters, prepare

MENDS_SMALL_MAPS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


@triton.jit
def scale_rows(pair, out_ptr, none_ptr, rows, far, scale, flag, ONE, BLOCK: tl.constexpr):
    x_ptr, index_ptr = pair
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < rows
    value = tl.load(x_ptr + at + tl.load(index_ptr) * far, mask=keep).to(tl.float32)
    if flag:
        value += ONE
    tl.store(out_ptr + at, value * scale, mask=keep)


@gluon.jit
def copy_boxes(out_ptr, a_desc, b_desc, rows, LAYOUT: gl.constexpr):
    box: gl.constexpr = a_desc.block_type.shape
    buffer = gl.allocate_shared_memory(a_desc.dtype, box, a_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, a_desc.block_type.nbytes)
    if gl.program_id(0) < rows:
        tma.async_copy_global_to_shared(a_desc, [0, 0], bar, buffer)
    else:
        tma.async_copy_global_to_shared(b_desc, [0, 0], bar, buffer)
    mbarrier.wait(bar, phase=0)
    tile = buffer.load(LAYOUT)
    row = gl.arange(0, box[0], gl.SliceLayout(1, LAYOUT))[:, None]
    gl.store(out_ptr + row * box[1] + gl.arange(0, box[1], gl.SliceLayout(0, LAYOUT))[None, :], tile)


@triton.jit
def copy_tile(out_ptr, desc, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + at, desc.load([tl.program_id(0) * ROWS, column]))


def scaled():
    """A Triton kernel with every kind of plain argument."""
    x, index, out = torch.randn(300).bfloat16(), torch.zeros(1, dtype=torch.int64), torch.empty(300)
    values = ((x, index), out, None, 300, 2**40, -0.75, True, 1, 128)
    return scale_rows, (3, 2, 1), values, (x, index, out), {"num_warps": 2}


def boxes(rows=64, columns=128, dtype=torch.bfloat16, padding="zero"):
    """A Gluon kernel whose tensors come through tensor maps."""
    layout = gl.NVMMASharedLayout.get_default_for([16, 64], getattr(gl, str(dtype).split(".")[-1]))
    a, b = torch.zeros(rows, columns, dtype=dtype), torch.zeros(rows + 8, 2 * columns, dtype=dtype)
    maps = [TensorDescriptor.from_tensor(t, [16, 64], layout) for t in (a, b[:, :columns])]
    for made in maps:
        made.padding = padding
    out = torch.zeros(16, 64, dtype=dtype)
    values = (out, *maps, 5, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
    return copy_boxes, (7, 1, 1), values, (out, a, b[:, :columns]), {"num_warps": 4}


def tiles():
    """A Triton kernel with a host tensor descriptor of fp32 in three programs."""
    from triton.tools.tensor_descriptor import TensorDescriptor as Host

    x, out = torch.randn(96, 80), torch.empty(32, 32)
    return copy_tile, (3, 1, 1), (out, Host.from_tensor(x, [32, 32]), 16, 32, 32), (out, x), {"num_warps": 4}


def both(case):
    """The last launch by Triton, and by a prepared launch of the same kernel."""
    function, grid, values, tensors, options = case
    kernel = function[grid](*values, **options)
    taken = kernel_parameters(kernel.asm["cubin"], kernel.metadata.name)
    stub.record(kernel.function, [parameter.size for parameter in taken])
    function[grid](*values, **options)
    triton_said = stub.last()
    prepare(kernel, grid, values)(*tensors)
    return triton_said, stub.last(), taken


CASES = {
    "plain": scaled,
    "maps": boxes,
    "large maps": lambda: boxes(1024, 256),
    "nan outside": lambda: boxes(padding="nan"),
    "fp16": lambda: boxes(dtype=torch.float16),
    "tiles": tiles,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_driver_is_given_what_triton_gives_it(case):
    before = stub.launches()
    by_triton, by_us, taken = both(case())
    assert stub.launches() == before + 3
    for theirs, ours in zip(by_triton.parameters, by_us.parameters, strict=True):
        if len(theirs) == 128 and not MENDS_SMALL_MAPS:  # one bit, which Triton 3.6 leaves as the driver made it
            theirs, ours = (part[:8] + part[16:] for part in (theirs, ours))
        assert ours == theirs
    assert by_us == by_triton._replace(parameters=by_us.parameters)
    assert len(by_us.parameters) == len(taken) > 4
    ends = [parameter.offset + parameter.size for parameter in taken]
    assert all(end <= parameter.offset for end, parameter in zip(ends, taken[1:], strict=False))
    assert all(by_us.parameters[:3]), "the parameters were recorded"


@pytest.mark.parametrize("option", [{"num_ctas": 2}, {"launch_pdl": True}, {"launch_cooperative_grid": True}])
def test_launch_attributes(option):
    function, grid, values, tensors, options = scaled()
    by_triton, by_us, _ = both((function, grid, values, tensors, options | option))
    assert by_us == by_triton
    assert by_us.attributes


def test_parameters_of_a_cubin_are_those_of_its_ptx():
    for case in (scaled, boxes):
        function, grid, values, _, options = case()
        kernel = function[grid](*values, **options)
        entry = re.search(r"\.entry[^(]*\((.*?)\)", kernel.asm["ptx"], re.DOTALL)[1]
        sizes = [
            int(count or 1) * int(bits) // 8
            for bits, count in re.findall(r"\.[ubsf](\d+)\s[^,\[]*?_param_\d+(?:\[(\d+)\])?", entry)
        ]
        assert [p.size for p in kernel_parameters(kernel.asm["cubin"], kernel.metadata.name)] == sizes


@pytest.fixture
def prepared():
    function, grid, values, tensors, options = boxes()
    return prepare(function[grid](*values, **options), grid, values), tensors


def test_dropped_and_misplaced_parameters_are_noticed():
    function, grid, values, _, options = scaled()
    kernel = function[grid](*values, **options)
    signature = kernel.src.signature
    for broken in (
        {name: kind for name, kind in signature.items() if name != "rows"},
        {**signature, "rows": "i64"},
        {**signature, "rows": signature["far"], "far": signature["rows"]},
        {**signature, "out_ptr": "constexpr"},
    ):
        kernel.src.signature = broken
        given = [value for name, value in zip(signature, values, strict=True) if name in broken]
        if broken.get("far") == "i32":
            given[4] = 3
        with pytest.raises(RuntimeError, match="takes parameters of"):
            prepare(kernel, grid, given)
    kernel.src.signature = signature
    prepare(kernel, grid, values)


def test_arguments_are_of_their_types():
    function, grid, values, _, options = scaled()
    kernel = function[grid](*values, **options)
    for index, value in ((3, 2**31), (3, -(2**31) - 1), (4, 2**63), (5, 1e39), (6, 2)):
        changed = [value if at == index else old for at, old in enumerate(values)]
        with pytest.raises((ValueError, OverflowError)):
            prepare(kernel, grid, changed)
    with pytest.raises(ValueError, match="takes 9 arguments, got 8"):
        prepare(kernel, grid, values[:-1])


def test_tensors_that_are_not_the_kernels_are_refused(prepared):
    launch, (out, a, b) = prepared
    before = stub.launches()
    flat = torch.zeros(a.numel() + 1, dtype=a.dtype)
    for tensors, message in (
        ((out, a), "takes 3 tensors, got 2"),
        ((out, a, b, b), "takes 3 tensors, got 4"),
        ((), "a launch needs a tensor"),
        ((out.float(), a, b), "tensor 0 has the element type"),
        ((out, a.half(), b), "tensor 1 has the element type"),
        ((out.view(-1)[1:], a, b), "tensor 0 must start at a multiple of 16 bytes"),
        ((out, flat[1:].view_as(a), b), "the tensor map of tensor 1 must start at a multiple of 16 bytes"),
        ((out, a[:-1], b), "the tensor map of tensor 1 reaches past the end of its tensor"),
        ((out, a, b.contiguous()), "the tensor map of tensor 2 reaches past"),
    ):
        with pytest.raises(RuntimeError, match=message):
            launch(*tensors)
    with pytest.raises(RuntimeError, match="tensor 0 of a launch must be on the GPU"):
        native.operators().launch(launch.description, [out, a, b], False)
    assert stub.launches() == before
    launch(out, a, b)
    assert stub.launches() == before + 1


HEADER = 11  # kHeader of csrc/launcher.h
MAP = HEADER + 4  # after the pointer: kind, tensor, type, then element type, swizzle, fill, rank, shape, strides, box


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 0, "the kernel has no handle"),
        (1, 0, "the grid has 0 in dimension 0"),
        (2, -1, "the grid has -1 in dimension 1"),
        (3, 65536, "the grid has 65536 in dimension 2"),
        (4, 33, "cannot have 33 warps"),
        (5, -1, "bytes of shared memory"),
        (6, 0, "a cluster has 1 to 8 blocks, not 0"),
        (9, 2, "takes 2 tensors, got 3"),
        (10, 10**6, "cannot have 1000000 parameters"),
        (10, 3, "not as long as its parameters"),
        (HEADER, 7, "parameter 0 is of no known kind"),
        (HEADER + 1, 3, "parameter 0 is tensor 3 of 3"),
        (HEADER + 3, 0, "must start at a multiple of 0 bytes"),
        (MAP + 3, 13, "has the element type 13"),
        (MAP + 4, 7, "has the swizzle 7"),
        (MAP + 5, 2, "has the fill 2"),
        (MAP + 6, 6, "has 6 dimensions, it may have 1 to 5"),
        (MAP + 7, 0, "has a dimension of 0 elements"),
        (MAP + 9, 127, "has a stride of 127 elements, which must be a multiple of 16 bytes"),
        (MAP + 9, -128, "has a stride of -128 elements"),
        (MAP + 10, 2, "has the stride 2 in its last dimension"),
        (MAP + 11, 257, "has a box of 257 elements"),
        (MAP + 12, 4, "has rows of 8 bytes in its box"),
    ],
)
def test_wrong_descriptions_are_refused(prepared, at, value, message):
    launch, tensors = prepared
    before = stub.launches()
    launch.description[at] = value
    with pytest.raises(RuntimeError, match=message):
        launch(*tensors)
    assert stub.launches() == before


def test_every_cut_description_is_refused(prepared):
    launch, tensors = prepared
    whole, before = launch.description, stub.launches()
    for length in range(len(whole)):
        launch.description = whole[:length].clone()
        with pytest.raises(RuntimeError, match=r"the description|is not described to its end"):
            launch(*tensors)
    launch.description = torch.cat((whole, whole[-1:]))
    with pytest.raises(RuntimeError, match="not as long as its parameters"):
        launch(*tensors)
    launch.description = whole.int()
    with pytest.raises(RuntimeError, match="must be an int64 vector on the CPU"):
        launch(*tensors)
    assert stub.launches() == before


def test_the_drivers_errors_have_their_names(prepared):
    launch, tensors = prepared
    stub.fail_next(1)
    with pytest.raises(RuntimeError, match=r"cuTensorMapEncodeTiled failed: CUDA_ERROR_INVALID_VALUE \(1\)"):
        launch(*tensors)
    function, grid, values, tensors, options = scaled()
    launch = prepare(function[grid](*values, **options), grid, values)
    stub.fail_next(1)
    with pytest.raises(RuntimeError, match=r"cuLaunchKernelEx failed: CUDA_ERROR_INVALID_VALUE \(1\)"):
        launch(*tensors)
    launch(*tensors)
