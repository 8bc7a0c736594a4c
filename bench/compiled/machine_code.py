"""What a compiled kernel costs, read from its machine code: registers, spills, memory, occupancy, instructions.

Nothing runs and nothing is timed. NVIDIA, whether Triton or nvcc made the code: `cuobjdump` gives registers and stack,
the log of the very ptxas run that made it gives spills, `nvdisasm` the instructions, cuxray the occupancy. AMD: LLVM's
own assembly text.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import cuxray.archspec
import cuxray.occupancy
import triton
from cuxray.parse import ptxasv, resusage

from bench.compiled.control_flow import Instruction, working_loop
from bench.compiled.kernels import Build
from gistkern.kernels.chips import Chip

# classes of the instruction mix, and the opcodes of NVIDIA's and AMD's that belong to each; the first match counts
CLASSES = {
    "tensor core": r"HMMA|HGMMA|UTC\w*MMA|v_s?mfmac?_\w+",
    "tensor memory": r"LDTM|STTM|UTCCP",
    "exp2, log2, 1/x": r"MUFU|v_(exp|log|rcp|rsq|sqrt)_\w+",
    "fp32": r"U?F(FMA|ADD|MUL|MNMX|SEL|SETP|SET|CHK|SWZADD)[23]?|F2FP|v_\w+_(f32|bf16|f16)\w*",
    "shared memory": r"LDS|STS|LDSM|STSM|ATOMS|ds_(read|write|load|store)\w*",
    "local memory (spills)": r"LDL|STL|scratch_\w+",
    "global memory": r"LDG(STS)?|STG|UTMA\w+|UBLKCP|ATOMG?|REDG?|LD|ST|(global|buffer|flat|s_load|s_buffer_load)_\w+",
    "barriers and waits": (
        r"BAR|U?DEPBAR|LDGDEPBAR|SYNCS|UTCBAR|FENCE|MEMBAR|WARPGROUP|WARPSYNC|ARRIVES|ERRBAR|CCTL|NANOSLEEP"
        r"|s_barrier|s_waitcnt\w*|s_nop|s_sleep"
    ),
    "branches and predicates": (
        r"BRA|BRX|BSSY|BSYNC|BREAK|CALL|RET|EXIT|U?PLOP3|P2R|R2P|U?P2UR|VOTEU?|ELECT|BPT|KILL"
        r"|s_c?branch\w*|s_endpgm|s_setpc\w*|s_\w+_saveexec\w*"
    ),
    "shuffles and conversions": (
        r"SHFL|C?REDUX|I2FP?|F2IP?|I2I|v_(perm|readlane|readfirstlane|writelane|cvt)\w*|\w+_dpp|ds_b?permute\w*|ds_swizzle\w*"
    ),
    # index arithmetic, moves, integer comparisons and selections; HFMA2 here only ever loads constants
    "integer and addresses": (
        r"U?(IMAD|IADD3?|IABS|IMNMX|ISETP|LEA|LOP3|SHF|SHL|SHR|SGXT|SEL|VIADD|VIADDMNMX|VIMNMX3?|MOV|PRMT|FLO|BMSK|POPC)"
        r"|CS2R|S2U?R|R2UR|ULDC|LDCU?|UCLEA|HFMA2|v_\w+|s_\w+"
    ),
    "padding": r"NOP",
}
_CLASS_PATTERNS = {name: re.compile(pattern) for name, pattern in CLASSES.items()}
_TENSOR = _CLASS_PATTERNS["tensor core"]
_TENSOR_FORM = re.compile(rf"({CLASSES['tensor core']})(\..*)?")
# v_mfma_f32_32x32x8_bf16 -> mfma
_TENSOR_NAME = re.compile(r"^v_|_.*")
# HGMMA.64x128x16.F32.BF16: what a warpgroup multiplies
_WGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.")
_PRODUCTS_PER_CYCLE = 2048
_ASYNC = re.compile(r"LDGSTS|UTMALDG|UBLKCP|buffer_load_\w+_lds")
_SPILL = re.compile(r"LDL|STL|scratch_(load|store)\w*")

# opcodes with their modifiers that kernels are written to get (CUDA C++ asks for each by name)
FORMS = {
    "LDG 128": r"LDG\.E(\.\w+)*\.128(\.\w+)*",
    "LDGSTS 128": r"LDGSTS\.E(\.\w+)*\.128(\.\w+)*",
    "LDSM": r"LDSM\.16\.M88\.4",
    "LDSM transposed": r"LDSM\.16\.MT88\.4",
    "HMMA": r"HMMA\.16816\.F32(\.BF16)?",
}
_FORM_PATTERNS = {name: re.compile(pattern) for name, pattern in FORMS.items()}

# "(C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ... in the function 'name'"
# "ptxas warning : Registers are spilled to local memory in function 'name', ..."
_WARNING = re.compile(r"(?:\(C\d+\) (?=Potential Performance Loss)|ptxas warning\s*: )(.*)$", re.MULTILINE)
_WARNED = re.compile(r" in (?:the )?function '([^']*)'")
_THREADS = re.compile(r"^\.reqntid (\d+)", re.MULTILINE)
_LABEL = re.compile(r"^([.\w$]+):")
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][.\w]*)\s*([^;]*);")
_SASS_TARGET = re.compile(r"^(.*)`\(([^)]+)\)")
_AMD = re.compile(r"^\t([a-z]\w+)\s*([^;]*)")


class Cubin(NamedTuple):
    """One function of NVIDIA machine code, the log of the ptxas that made it, and what its launch adds."""

    code: bytes
    function: str
    log: str
    warps: int
    dynamic_shared_bytes: int
    tensor_memory_columns: int = 0


def describe(build: Build, chip: Chip) -> dict[str, Any]:
    """Everything a row of docs/internals/compiled.json says about the machine code of one Triton kernel on one chip.

    Bytes are per thread for `stack_bytes`, `spill_bytes` (what ptxas counts as spill stores) and
    `spill_load_bytes`, and per block for `shared_bytes`. `spill_instructions` counts loads and stores of local
    memory in the code. `inner_loop` is None if no loop holds tensor-core instructions.
    """
    metadata = build.compiled.metadata
    if chip.capability is None:
        facts, code = _amd(build)
        return facts | _instructions(code, metadata.shared, chip, _TENSOR_FORM)
    columns = getattr(metadata, "tmem_size", 0) or 0
    asm, log = build.compiled.asm["cubin"], build.ptxas_log
    # not the metadata's warps: those of one partition, where a kernel has several
    threads = _THREADS.search(build.compiled.asm["ptx"])
    assert threads
    return describe_cubin(Cubin(asm, metadata.name, log, int(threads[1]) // 32, metadata.shared, columns), chip)


def describe_cubin(cubin: Cubin, chip: Chip, working: str | None = None) -> dict[str, Any]:
    """The same about a function of a cubin.

    `working` matches the opcodes, with modifiers, that mark the inner loop, where these are not the tensor cores'
    alone; then `forms` counts the instructions of each of `FORMS`.
    """
    facts, code, shared = _nvidia(cubin, chip)
    if working is None:
        return facts | _instructions(code, shared, chip, _TENSOR_FORM)
    found = Counter(ins.opcode for ins in code)
    counted = {"forms": {name: _total(found, pattern) for name, pattern in _FORM_PATTERNS.items()}}
    return facts | _instructions(code, shared, chip, re.compile(working)) | counted


def _instructions(code: list[Instruction], shared: int, chip: Chip, working: re.Pattern[str]) -> dict[str, Any]:
    opcodes = Counter(_bare(ins.opcode) for ins in code)
    tensor = {op: n for op, n in opcodes.items() if _TENSOR.fullmatch(op)}
    loop = working_loop(code, lambda op: working.fullmatch(op) is not None)
    body = Counter(map(_bare, loop.body)) if loop else Counter()
    return {
        "shared_bytes": shared,
        "shared_limit": chip.shared_per_block,
        "spill_instructions": _total(opcodes, _SPILL),
        "instructions": sum(opcodes.values()),
        "tensor_core": "+".join(sorted({_TENSOR_NAME.sub("", op).upper() for op in tensor})) or None,
        "tensor_core_instructions": sum(tensor.values()),
        "async_copies": _total(opcodes, _ASYNC),
        "inner_loop": loop
        and {
            "instructions": len(loop.body),
            "tensor_core_instructions": _total(body, _TENSOR),
            "async_copies": _total(body, _ASYNC),
            "full_tile_instructions": len(loop.shortest_turn),
            "full_tile": _mix(map(_bare, loop.shortest_turn)),
            "issue_per_tensor_cycle": issue_per_tensor_cycle(loop.shortest_turn),
        },
    }


def issue_per_tensor_cycle(turn: Iterable[str]) -> float | None:
    """Cycles that a warp's instructions take to issue over those that its warpgroup's products take; None without any.

    Of a turn of opcodes with modifiers, on sm_90: each of the four schedulers issues one instruction a cycle for the
    warp of a warpgroup that it has, and the tensor cores of a multiprocessor do 2,048 multiplications of 16 bits each.
    Above 1 instructions bound the loop, however well everything overlaps.
    """
    opcodes = list(turn)
    shapes = [found for found in map(_WGMMA.match, opcodes) if found]
    products = sum(int(found[1]) * int(found[2]) * int(found[3]) for found in shapes)
    return round(len(opcodes) * _PRODUCTS_PER_CYCLE / products, 2) if products else None


def _nvidia(cubin: Cubin, chip: Chip) -> tuple[dict[str, Any], list[Instruction], int]:
    """Facts, instructions, and bytes of shared memory per block, static and dynamic."""
    usages, assembly = _disassembled(cubin.code)
    usage = resusage.parse(usages)[cubin.function]
    log = ptxasv.parse(cubin.log)[cubin.function]
    # not what cuobjdump says, which on sm_90 and later includes the 1 KiB that the system reserves
    shared = log.smem + cubin.dynamic_shared_bytes
    occupancy = cuxray.occupancy.compute(
        cuxray.archspec.lookup(chip.capability), usage.reg, cubin.warps * 32, smem_dynamic=shared
    )
    blocks, limits = occupancy.blocks_per_sm, occupancy.limiter
    columns = cubin.tensor_memory_columns
    if columns and chip.tensor_memory_columns // columns < blocks:
        blocks, limits = chip.tensor_memory_columns // columns, "tensor memory"
    warps = blocks * cubin.warps
    facts = {
        "registers": usage.reg,
        "stack_bytes": usage.stack,
        "spill_bytes": log.spill_stores,
        "spill_load_bytes": log.spill_loads,
        "ptxas_warnings": _warnings(cubin),
        "tensor_memory_columns": columns,
        "blocks_per_multiprocessor": blocks,
        "warps_per_multiprocessor": warps,
        "occupancy_percent": round(100 * warps / occupancy.max_warps, 1),
        "occupancy_limited_by": limits.replace("_", " ").replace("+", ", "),
    }
    return facts, _sass(_function(assembly, cubin.function)), shared


# a cubin of many functions is described function by function
@functools.lru_cache(maxsize=1)
def _disassembled(code: bytes) -> tuple[str, str]:
    """What `cuobjdump -res-usage` and `nvdisasm` say about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)


def _function(assembly: str, name: str) -> str:
    start = assembly.index(f"\n.text.{name}:\n")
    end = assembly.find("\n\t.section\t", start)
    return assembly[start : end if end >= 0 else None]


def _warnings(cubin: Cubin) -> list[str]:
    """Of this function and of none; the function's name is left out."""
    named = [(text, _WARNED.search(text)) for text in _WARNING.findall(cubin.log)]
    return [_WARNED.sub("", text) for text, found in named if found is None or found[1] == cubin.function]


def _amd(build: Build) -> tuple[dict[str, Any], list[Instruction]]:
    text = build.compiled.asm["amdgcn"]

    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        assert found, pattern
        return int(found[1])

    return {
        "registers": number(r"\.vgpr_count:\s*(\d+)"),
        "scalar_registers": number(r"\.sgpr_count:\s*(\d+)"),
        "stack_bytes": number(r"\.private_segment_fixed_size:\s*(\d+)"),
        # LLVM counts spilled 32-bit registers
        "spill_bytes": 4 * number(r"\.vgpr_spill_count:\s*(\d+)"),
        "spilled_scalar_registers": number(r"\.sgpr_spill_count:\s*(\d+)"),
        "waves_per_simd": number(r"; Occupancy:\s*(\d+)"),
    }, _amdgcn(text)


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _sass(text: str) -> list[Instruction]:
    code, labels = [], []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels.append(label[1])
        elif found := _SASS.match(line):
            predicate, form, operands = found[1], found[2], found[3]
            opcode = _bare(form)
            jump = _SASS_TARGET.match(operands) if opcode in ("BRA", "CALL") else None
            # the target of a call of a function is no label of this one, so control comes back
            called = jump is not None and jump[2].startswith("$")
            # an operand before the target is a condition: BRA.U UP0, `(.L_x_3)
            conditional = bool(predicate) or called or (jump is not None and bool(jump[1].strip()))
            leaves = opcode in ("BRA", "CALL", "EXIT", "RET")
            target = jump[2] if jump and not called else None
            code.append(Instruction(form, tuple(labels), target, conditional or not leaves))
            labels = []
    return code


def _amdgcn(text: str) -> list[Instruction]:
    code, labels = [], []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels.append(label[1])
        elif found := _AMD.match(line):
            opcode, operands = found[1], found[2].strip()
            jumps = opcode.startswith(("s_branch", "s_cbranch"))
            leaves = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
            code.append(Instruction(opcode, tuple(labels), operands if jumps else None, not leaves))
            labels = []
    return code


def _bare(opcode: str) -> str:
    """An opcode without its modifiers."""
    return opcode.partition(".")[0]


def _total(opcodes: Counter[str], pattern: re.Pattern[str]) -> int:
    return sum(n for op, n in opcodes.items() if pattern.fullmatch(op))


def _mix(opcodes: Iterable[str]) -> dict[str, int]:
    """How many instructions of each class; unknown opcodes are listed by name, so that none hides."""
    mix: Counter[str] = Counter()
    for opcode in opcodes:
        name = next((name for name, pattern in _CLASS_PATTERNS.items() if pattern.fullmatch(opcode)), opcode)
        mix[name] += 1
    order = [*CLASSES, *sorted(set(mix) - set(CLASSES))]
    return {name: mix[name] for name in order if mix[name]}
