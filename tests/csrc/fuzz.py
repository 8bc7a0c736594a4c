"""Random and hostile calls of every operator: each must be served or refused in words. Run it under sanitizers.

    python tests/csrc/fuzz.py --calls 2000 --seed 1 [--only decode]

A call starts as a good one and gets up to three changes: values, sizes, strides, types, devices, numbers. Raw operators
of the extension, the `gistkern::` ones, the public functions, eager and compiled.
"""

import argparse
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from pool_cases import CASES, E4M3, INT8, make_case

from gistkern import GistLayout, KeyValueRows, gist_attention, gist_compact, gist_decode
from gistkern.backends import native
from gistkern.ops import decode_library, library
from gistkern.rows import gather_rows
from gistkern.testing import make_inputs

NUMBERS = (
    -(2**63),
    -(2**31),
    -2,
    -1,
    0,
    1,
    2,
    9,
    2**31 - 1,
    2**31,
    2**63 - 1,
    float("nan"),
    float("inf"),
    1e-50,
    1e300,
)
NEAR = (-(2**31), -(10**9), -7, -2, -1, 0, 1, 2, 3, 8, 64, 1000, 10**9, 2**31 - 1)
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.bool, INT8, E4M3)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# ---- good calls


def a_layout(draw):
    return draw.choice(
        [
            lambda: GistLayout.from_segments([draw.randint(1, 30) for _ in range(draw.randint(1, 3))], 2, tail=3),
            lambda: GistLayout.sliding(draw.randint(1, 80), 20, 7),
            lambda: GistLayout.decode(torch.randint(0, 9, (2,)), torch.randint(0, 9, (2,)), rows=draw.randint(1, 12)),
            lambda: GistLayout.hierarchical([5, 9], 2, 2, tail=2),
        ]
    )()


def attention(draw):
    layout = a_layout(draw)
    kv_heads = draw.choice([1, 2])
    shape = {"kv_heads": kv_heads, "heads": kv_heads * draw.choice([1, 3]), "head_dim": draw.choice([1, 5, 16, 24])}
    x = make_inputs(layout, dtype=draw.choice(FLOATS), **shape)
    past = [] if x.past_key is None else [x.past_key, x.past_value]
    k, v = x.k.detach(), x.v.detach()
    gist = [gather_rows(t, layout.gather) for t in (k, v)]
    if past:
        gist = [torch.cat([old.detach(), new], 2) for old, new in zip(past, gist, strict=True)]
    return {
        **{"q": x.q.detach(), "k": k, "v": v, "gist_k": gist[0], "gist_v": gist[1]},
        **{"gist_begin": layout.gist_begin, "gist_end": layout.gist_end, "local_begin": layout.local_begin},
        "scale": 0.3,
    }


def backward(draw):
    call = attention(draw)
    out, lse = library.attention(*call.values(), "cpu")
    values = list(call.items())
    return dict([("grad_out", torch.randn_like(out)), *values[:5], ("out", out), ("lse", lse), *values[5:]])


def folded(draw):
    call = backward(draw)
    gathered = draw.randint(0, call["gist_k"].shape[2])
    return call | {"gather": torch.randint(-1, call["k"].shape[2], (len(call["k"]), gathered))}


def decode(draw):
    small = [options for options in CASES.values() if max(options.get("documents", [0])) < 1000]
    case = make_case(**draw.choice(small), dtype=draw.choice(FLOATS), poison=False)
    rows = case.q.shape[2]
    spread = {
        n: None if t is None else (t if t.dim() == 2 else t[:, None].expand(-1, rows)).contiguous()
        for n, t in (("begin", case.gist_begin), ("end", case.gist_end), ("local", case.local_begin))
    }
    gist, tail = case.gist, case.tail
    room = tail.key.shape[2] if case.page_table is None else case.page_table.shape[1] * tail.key.shape[1]
    return {
        **{"q": case.q, "gist_k": gist.key, "gist_v": gist.value, "gks": gist.key_scale, "gvs": gist.value_scale},
        **{"gist_begin": spread["begin"], "gist_end": spread["end"], "tail_k": tail.key, "tail_v": tail.value},
        **{"tks": tail.key_scale, "tvs": tail.value_scale, "tail_length": case.tail_length},
        **{"local_begin": spread["local"], "page_table": case.page_table, "gist_capacity": len(gist.key), "scale": 0.3},
        **{"tail_capacity": room, "variant": 0},  # of the raw operator alone
    }


def compact(draw):
    dtype = draw.choice(FLOATS)
    k, v = torch.randn(2, 2, 3, 9, 8).to(dtype)
    pool = KeyValueRows.empty(20, kv_heads=3, head_dim=8, dtype=draw.choice([dtype, INT8, E4M3]))
    gather = torch.randint(-1, 9, (2, 5))
    slot = torch.randperm(20)[:10].view(2, 5)
    return dict(
        zip(
            ("k", "v", "gather", "slot", "pk", "pv", "ks", "vs"),
            (k, v, gather, slot, *vars(pool).values()),
            strict=True,
        )
    )


# ---- who computes them


def raw_decode(c):
    *rest, capacity, scale, room, variant = c.values()
    return native.operators().decode(*rest, capacity, room, scale, variant, 1)


def raw_compact(c):
    k, v, gather, slot, *out = c.values()
    native.operators().compact(k, v, None, None, gather, slot, *out)


def size(tensor, axis):
    """Of an axis, 0 where a change took it away: that the operator must notice, not this file."""
    return tensor.shape[axis] if axis < tensor.dim() else 0


def public_attention(c, compiled=False):
    """The vectors as a layout of past rows only."""
    shape = (size(c["q"], 0), size(c["q"], 2))
    places, kept = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape[0], dtype=torch.int64)
    layout = GistLayout(
        *(c["gist_begin"], c["gist_end"], c["local_begin"], places[:, :0], places.bool(), places, places),
        *(kept, kept, kept),
        past=size(c["gist_k"], 2),
        tail=size(c["k"], 2) - size(c["q"], 2),
    )

    def call(q, k, v, past_key, past_value):
        return gist_attention(
            q, k, v, layout, past_key=past_key, past_value=past_value, scale=c["scale"], backend="cpu"
        )

    call = torch.compile(call, backend="eager") if compiled else call
    tensors = [c[name].clone().requires_grad_() for name in ("q", "k", "v", "gist_k", "gist_v")]
    out = call(*tensors)
    torch.autograd.grad(out.sum(), tensors, allow_unused=True)


def rows_of(c):
    return (
        KeyValueRows(c["gist_k"], c["gist_v"], c["gks"], c["gvs"]),
        KeyValueRows(c["tail_k"], c["tail_v"], c["tks"], c["tvs"]),
    )


def public_decode(c, compiled=False):
    names = ("gist_begin", "gist_end", "tail_length", "local_begin", "page_table", "gist_capacity", "scale")
    call = torch.compile(gist_decode, backend="eager") if compiled else gist_decode
    return call(c["q"], *rows_of(c), **{name: c[name] for name in names}, backend="cpu")


def public_compact(c, compiled=False):
    call = torch.compile(gist_compact, backend="eager") if compiled else gist_compact
    call(c["k"], c["v"], c["gather"], c["slot"], KeyValueRows(*list(c.values())[4:]), backend="cpu")


TARGETS = {
    "attention": [
        (attention, lambda c: native.operators().cpu_attention(*c.values())),
        (backward, lambda c: native.operators().cpu_attention_backward(*c.values())),
        (folded, lambda c: native.operators().cpu_attention_backward(*c.values())),
        (attention, lambda c: library.attention(*c.values(), "cpu")),
        (backward, lambda c: library.attention_backward(*c.values(), "cpu")),
        (attention, public_attention),
    ],
    "decode": [
        (decode, raw_decode),
        (decode, lambda c: decode_library.decode(*list(c.values())[:-2], "cpu")),
        (decode, public_decode),
    ],
    "compact": [
        (compact, raw_compact),
        (compact, lambda c: decode_library.compact(*c.values(), "cpu")),
        (compact, lambda c: library.compact(c["k"], c["v"], None, None, c["gather"], "cpu")),
        (compact, public_compact),
    ],
}
COMPILED = {
    "attention": (attention, public_attention),
    "decode": (decode, public_decode),
    "compact": (compact, public_compact),
}


# ---- what is done to them


def changed(draw, value):
    if value is None:
        return draw.choice([None, torch.zeros(2, 2), torch.zeros(2, dtype=torch.int32)])
    if not torch.is_tensor(value):
        return type(value)(draw.choice([n for n in NUMBERS if isinstance(n, type(value))]))
    if value.numel() > 2**20:  # expanded before: a copy would fill the memory
        return value
    axis = draw.randrange(value.dim()) if value.dim() else None
    kinds = ["values"] * 6 + ["size", "size", "empty", "type", "swap", "spread", "axis", "none", "meta", "far"]
    kind = draw.choice(kinds if value.dim() else ["type", "none", "meta"])
    if kind == "values" and value.dtype in (torch.int32, torch.int64) and value.numel():
        value = value.clone(memory_format=torch.contiguous_format)
        value.view(-1)[draw.randrange(value.numel())] = draw.choice(NEAR)
    elif kind == "values" and value.dtype in FLOATS:
        value = torch.full_like(value, draw.choice([float("nan"), 0.0, 1e-4]))
    elif kind == "none":
        value = None
    elif kind == "type":
        value = value.to(draw.choice(TYPES))
    elif kind == "meta":
        value = value.to("meta")
    elif kind == "size":
        value = value.narrow(axis, 0, draw.randint(0, value.shape[axis])).contiguous()
    elif kind == "empty":
        value = value.narrow(axis, 0, 0)
    elif kind == "swap":
        value = value.transpose(axis, draw.randrange(value.dim()))
    elif kind == "spread":  # every other element of twice as many
        every_other = (slice(None),) * axis + (slice(None, None, 2),)
        value = value.repeat_interleave(2, axis)[every_other]
    elif kind == "axis":
        value = draw.choice([value.unsqueeze(axis), value.select(axis, 0) if value.shape[axis] else value[None]])
    elif kind == "far" and value.numel() and axis < value.dim() - 1:
        sizes = [2**31 if i == axis else -1 for i in range(value.dim())]
        value = value.narrow(axis, 0, 1).expand(*sizes)
    return value


def hostile(draw, call):
    """The call with up to three changes."""
    call = dict(call)
    for _ in range(draw.randint(0, 3)):
        name = draw.choice(list(call))
        call[name] = changed(draw, call[name])
    return call


def main():
    """Print how many calls were served and refused; an error of another kind ends the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--compiled", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    torch.manual_seed(args.seed)
    names = [args.only] if args.only else list(TARGETS)
    served = refused = 0
    for i in range(args.calls + args.compiled):
        name = draw.choice(names)
        good, compute = draw.choice(TARGETS[name]) if i < args.calls else COMPILED[name]
        call = hostile(draw, good(draw))
        try:
            if i < args.calls:
                compute(call)
            else:
                torch._dynamo.reset()
                compute(call, compiled=True)
            served += 1
        except (ValueError, RuntimeError, TypeError, AttributeError):
            refused += 1
    print(f"served {served}, refused {refused}")


if __name__ == "__main__":
    main()
