"""Gist context parallelism: one long context over several ranks, which exchange its gist rows and nothing else.

``gistkern.patch_llama(model, context_parallel=group)`` is the short way; docs/distributed.md explains it.
"""

from gistkern.distributed.attention import parallel_attention
from gistkern.distributed.shards import ContextShard, row_work, split_layout
from gistkern.distributed.traffic import Traffic, count_traffic, gist_bytes, ring_bytes

__all__ = [
    "ContextShard",
    "Traffic",
    "count_traffic",
    "gist_bytes",
    "parallel_attention",
    "ring_bytes",
    "row_work",
    "split_layout",
]
