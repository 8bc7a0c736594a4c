"""Cases of pooled decoding and their oracle: what each query row sees, collected row by row in fp64."""

from dataclasses import dataclass

import torch

from gistkern import KeyValueRows, gist_decode
from gistkern.rows import dequantize, quantize
from gistkern.testing import FORWARD_FACTOR, assert_within_budget

INT8, E4M3 = torch.int8, torch.float8_e4m3fn


@dataclass(frozen=True)
class PoolCase:
    """Arguments of one `gist_decode` call."""

    q: torch.Tensor
    gist: KeyValueRows
    tail: KeyValueRows
    gist_begin: torch.Tensor
    gist_end: torch.Tensor
    tail_length: torch.Tensor | None = None
    local_begin: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    gist_capacity: int | None = None

    def to(self, device):
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, KeyValueRows):
                value = KeyValueRows(*(t if t is None else t.to(device) for t in vars(value).values()))
            moved[name] = value.to(device) if torch.is_tensor(value) else value
        return PoolCase(**moved)

    def call(self, backend):
        arguments = dict(vars(self))
        return gist_decode(
            arguments.pop("q"), arguments.pop("gist"), arguments.pop("tail"), **arguments, backend=backend
        )


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def make_case(
    documents=(10, 0, 37),
    sequences=((0, 5), (2, 20), (2, 1), (1, 3)),
    *,
    rows=1,
    heads=4,
    kv_heads=2,
    head_dim=32,
    dtype=torch.float32,
    gist_dtype=None,
    tail_dtype=None,
    page_size=None,
    per_row=False,
    local_start=0,
    poison=True,
    capacity=None,
    seed=0,
):
    """Sequences (document, tail rows before the new ones) over a pool of documents of so many rows.

    Rows that nobody may see (between documents, beyond a tail, unused pages) are NaN.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gap = 3  # unused rows between documents
    begins = [gap + sum(documents[:d]) + gap * d for d in range(len(documents))]
    pool_rows = begins[-1] + documents[-1] + gap
    used = torch.zeros(pool_rows, dtype=torch.bool)
    for begin, count in zip(begins, documents, strict=True):
        used[begin : begin + count] = True
    gist = _rows(draw(2, pool_rows, kv_heads, head_dim), used[:, None], gist_dtype or dtype, poison)

    lengths = [before + rows for _, before in sequences]
    longest = max(lengths)
    batch = len(sequences)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]  # [B, M]
    values = draw(2, batch, longest, kv_heads, head_dim)
    page_table = None
    if page_size is None:
        tail = _rows(values.transpose(2, 3), valid[:, None], tail_dtype or dtype, poison)
    else:
        pages = -(-longest // page_size)
        order = torch.randperm(batch * pages + 2, generator=generator)[: batch * pages]
        page_table = order.view(batch, pages).to(torch.int32)
        spread = torch.zeros(2, batch * pages + 2, page_size, kv_heads, head_dim, dtype=torch.float64)
        there = torch.zeros(batch * pages + 2, page_size, dtype=torch.bool)
        for sequence in range(batch):
            for row in range(lengths[sequence]):
                page = page_table[sequence, row // page_size]
                spread[:, page, row % page_size] = values[:, sequence, row]
                there[page, row % page_size] = True
        tail = _rows(spread, there[..., None], tail_dtype or dtype, poison)

    begin = int32([begins[document] for document, _ in sequences])
    end = int32([begins[document] + documents[document] for document, _ in sequences])
    local_begin = None
    if per_row:  # query rows that see less and less of the document, and start later in the tail
        step = torch.arange(rows, dtype=torch.int32)
        begin, end = torch.minimum(begin[:, None] + step, end[:, None]), end[:, None].expand(-1, rows).contiguous()
        local_begin = torch.minimum(step[None].expand(batch, -1), int32(lengths)[:, None] - rows + step).contiguous()
    if local_start:
        local_begin = torch.full((batch,), local_start, dtype=torch.int32)
    q = draw(batch, heads, rows, head_dim).to(dtype)
    return PoolCase(q, gist, tail, begin, end, int32(lengths), local_begin, page_table, capacity)


def _rows(values, used, dtype, poison):
    """Keys and values of a ``[2, ...]`` tensor as `dtype`; what is not `used` (without D) NaN, or a NaN scale."""
    nan = torch.nan if poison else 0.0
    both, scales = [], []
    for one in values:
        if dtype in (INT8, E4M3):
            elements, scale = quantize(one.float(), dtype)
            scales.append(scale.masked_fill(~used, nan).contiguous())
        else:
            elements = one.masked_fill(~used[..., None], nan).to(dtype)
        both.append(elements.contiguous())
    return KeyValueRows(*both, *scales)


def seen_rows(case, sequence, row):
    """Keys and values ``[n, Hkv, D]`` in fp64 that one query row sees."""
    wide = {
        name: [dequantize(t, s, torch.float64) for t, s in ((rows.key, rows.key_scale), (rows.value, rows.value_scale))]
        for name, rows in (("gist", case.gist), ("tail", case.tail))
    }
    begin, end = (v[sequence] if v.dim() == 1 else v[sequence, row] for v in (case.gist_begin, case.gist_end))
    parts = [[t[begin:end] for t in wide["gist"]]]
    length = int(case.tail_length[sequence])
    start = 0
    if case.local_begin is not None:
        start = int(case.local_begin[sequence] if case.local_begin.dim() == 1 else case.local_begin[sequence, row])
    stop = length - case.q.shape[2] + row + 1
    if case.page_table is None:
        parts.append([t[sequence].transpose(0, 1)[start:stop] for t in wide["tail"]])
    else:
        size = case.tail.key.shape[1]
        places = [(int(case.page_table[sequence, r // size]), r % size) for r in range(start, stop)]
        parts.append(
            [torch.stack([t[page, offset] for page, offset in places]) if places else t[0, :0] for t in wide["tail"]]
        )
    return [torch.cat([part[i] for part in parts]) for i in range(2)]


def oracle(case, dtype):
    """Output and LSE, computed in `dtype`, and the size of the terms that cancel in the output: max of sum p |v|."""
    batch, heads, rows, dim = case.q.shape
    out = torch.zeros(batch, heads, rows, dim, dtype=dtype)
    lse = torch.full((batch, heads, rows), -torch.inf, dtype=dtype)
    terms = 0.0
    group = heads // case.gist.key.shape[1]
    for sequence in range(batch):
        for row in range(rows):
            keys, values = (t.repeat_interleave(group, 1).to(dtype) for t in seen_rows(case, sequence, row))
            if len(keys):
                scores = torch.einsum("hd,nhd->hn", case.q[sequence, :, row].to(dtype), keys) * dim**-0.5
                lse[sequence, :, row] = scores.logsumexp(-1)
                out[sequence, :, row] = torch.einsum("hn,nhd->hd", scores.softmax(-1), values)
                terms = max(terms, torch.einsum("hn,nhd->hd", scores.softmax(-1), values.abs()).max().item())
    return {"out": out, "lse": lse, "terms": terms}


def check(case, backend, device="cpu"):
    """Compare a backend with the oracle within the budget of the plain computation in the queries' type."""
    out, lse = case.to(device).call(backend)
    exact, plain = oracle(case, torch.float64), oracle(case, case.q.dtype)
    for name, value, cancelled in (("out", out.cpu(), exact["terms"]), ("lse", lse.cpu(), 0.0)):
        assert_within_budget(name, value, exact[name], plain[name], FORWARD_FACTOR, cancelled)
    return out, lse


CASES = {
    "ragged": {},
    "8-rows": {"rows": 8},
    "per-row-intervals": {"rows": 5, "per_row": True},
    "paged": {"page_size": 4, "rows": 2},
    "paged-per-row": {"page_size": 16, "rows": 3, "per_row": True},
    "no-gists": {"documents": (0, 0), "sequences": ((0, 7), (1, 0))},
    "heads=9/3": {"heads": 9, "kv_heads": 3, "rows": 2},
    "heads=32/8": {"heads": 32, "kv_heads": 8},
    "heads=40/1": {"heads": 40, "kv_heads": 1, "rows": 3},
    "D=1": {"head_dim": 1},
    "D=7": {"head_dim": 7, "page_size": 3},
    "D=80": {"head_dim": 80},
    "D=128": {"head_dim": 128, "rows": 4},
    "D=256": {"head_dim": 256},
    "tight-capacity": {"documents": (40, 5, 33), "sequences": ((0, 1), (2, 9)), "capacity": 40},
    "split": {"documents": (900, 3), "sequences": ((0, 5), (1, 0), (0, 700)), "kv_heads": 1, "heads": 2},
    "split-paged": {"documents": (600,), "sequences": ((0, 77), (0, 1)), "page_size": 16, "rows": 2},
    "split-long": {"documents": (2600, 40), "sequences": ((0, 5), (1, 0), (0, 900)), "heads": 2, "kv_heads": 1},
    "split-starts-late": {"documents": (1500,), "sequences": ((0, 800), (0, 3)), "local_start": 2, "page_size": 16},
    "many-sequences": {"documents": (12, 5), "sequences": tuple((i % 2, i % 4) for i in range(40)), "head_dim": 16},
    "int8": {"gist_dtype": INT8},
    "int8-tail": {"gist_dtype": INT8, "tail_dtype": INT8, "page_size": 8, "rows": 3},
    "e4m3": {"gist_dtype": E4M3, "head_dim": 64},
    "e4m3-tail": {"gist_dtype": E4M3, "tail_dtype": E4M3, "head_dim": 128},
    "int8-split": {"documents": (800, 9), "sequences": ((0, 5), (1, 30)), "gist_dtype": INT8, "head_dim": 64},
    "int8-D=7": {"gist_dtype": INT8, "head_dim": 7},
}
