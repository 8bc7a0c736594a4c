"""Gist context parallelism: one long context over several ranks, which exchange its gist rows and nothing else.

``gistkern.patch_llama(model, context_parallel=group)`` is the short way; docs/guides/many-gpus.md explains it.
"""

from gistkern.distributed.attention import parallel_attention
from gistkern.distributed.collectives import Traffic, count_traffic
from gistkern.distributed.shards import ContextShard, row_work, split_layout

__all__ = [
    "ContextShard",
    "Traffic",
    "count_traffic",
    "parallel_attention",
    "row_work",
    "split_layout",
]
