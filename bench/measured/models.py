"""Whole models: decoding from a GistCache and from transformers' DynamicCache, compressing beside a plain prefill.

Weights are random: time and bytes depend on shapes alone. Both sides have the same ones.
"""

import copy
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from bench.measured.case import FULL, OURS, PREFILL, Case
from bench.measured.timing import copy as copy_limit
from bench.measured.timing import largest
from bench.shapes import MODELS
from gistkern import GistCache, GistHandle, GistLayout, compress, patch_llama

GISTS = 10
LIMIT = "copy"


@lru_cache(maxsize=1)
def models(name: str, device: str) -> tuple[GistHandle, LlamaForCausalLM]:
    """The model patched for gists, and the same weights unpatched; both answer as they should, or this fails."""
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    config = LlamaConfig(**MODELS[name], max_position_embeddings=131072, attn_implementation="sdpa")
    with torch.device(device):  # drawn where they stay: 16 GB for an 8B model
        full = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    handle = patch_llama(copy.deepcopy(full), num_gist_tokens=GISTS, sink_tokens=0)
    _check(handle, full)
    return handle, full


@torch.no_grad()
def _check(handle: GistHandle, full: LlamaForCausalLM) -> None:
    """What both caches give for the next token is what one forward over the whole text gives."""
    gist = handle.model
    ids = torch.randint(0, 1000, (1, 50), device=full.device)
    context, question = ids[:, :44], ids[:, 44:]
    cache = DynamicCache(config=full.config)
    full(context, past_key_values=cache)
    stepped = full(question, past_key_values=cache, logits_to_keep=1).logits
    at_once = full(ids, logits_to_keep=1).logits
    gists = torch.tensor([handle.gist_token_ids], device=full.device)
    layout = GistLayout.from_segments([44], GISTS, tail=6, sink_tokens=0, device=full.device)
    whole = gist(torch.cat([context, gists, question], 1), gist_layout=layout, use_cache=False, logits_to_keep=1)
    compressed = compress(gist, context)
    cached = gist(question, past_key_values=compressed, logits_to_keep=1)
    if full.dtype == torch.float32:
        torch.testing.assert_close(stepped, at_once, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(cached.logits, whole.logits, rtol=1e-3, atol=1e-4)
    else:  # fp32 has shown that both are the same; this is what roundings leave of bf16's 8 bits over the layers
        for found, expected in ((stepped, at_once), (cached.logits, whole.logits)):
            error = ((found - expected).float().norm() / expected.float().norm()).item()
            assert error <= 0.1, f"logits differ by {error:.1e} of their norm"


def cache_bytes(cache: GistCache | DynamicCache) -> int:
    """Bytes of all keys and values."""
    if isinstance(cache, GistCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def model_decoding_case(name: str, context: int, batch: int, device: str = "cpu") -> Case:
    """One decoding step of a model whose context had `context` tokens.

    The number of gist rows does not depend on the context's length, so a short one is compressed; the full cache
    is filled with random rows.
    """
    handle, full = models(name, device)
    gist = handle.model
    token = torch.randint(0, 1000, (batch, 1), device=device)
    short = compress(gist, torch.randint(0, 1000, (1, 16), device=device))
    short.batch_repeat_interleave(batch)
    size = _full_bytes(full, context, batch)
    weights = sum(p.nbytes for p in full.parameters())  # a step reads all of them: embeddings are the output matrix too
    facts = {"gist rows": GISTS, "gist bytes": cache_bytes(short), "full bytes": size}
    work = {OURS: weights + facts["gist bytes"], FULL: weights + size}
    case = Case(device, {OURS: _step(gist, short, token)}, limit=LIMIT, work=work, facts=facts)
    if size > largest(device):
        case.not_measured[FULL] = f"its cache would take {size / 2**30:.1f} GiB"
    else:
        filled = _filled(full, context, batch)
        assert cache_bytes(filled) == size
        case.calls[FULL] = _step(full, filled, token)
    case.calls[LIMIT], case.limit_work = copy_limit(device)
    return case


def _full_bytes(full: LlamaForCausalLM, context: int, batch: int) -> int:
    config = full.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * context * batch * full.dtype.itemsize


def _filled(full: LlamaForCausalLM, context: int, batch: int) -> DynamicCache:
    config = full.config
    cache = DynamicCache(config=config)
    shape = batch, config.num_key_value_heads, context, config.head_dim
    for layer in range(config.num_hidden_layers):
        rows = torch.randn(shape, device=full.device).to(full.dtype)
        cache.update(rows, rows.clone(), layer)
    return cache


def _step(model: LlamaForCausalLM, cache: Any, token: torch.Tensor) -> Any:
    def step() -> torch.Tensor:
        with torch.no_grad():
            logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        cache.crop(-1)
        return logits

    return step


@torch.no_grad()
def compressing_case(name: str, tokens: int, segment: int, call_tokens: int, device: str = "cpu") -> Case:
    """`compress` in segments and as one segment, beside the plain prefill that fills a DynamicCache.

    The model reads `call_tokens` raw tokens a call where segments are shorter.
    """
    handle, full = models(name, device)
    gist = handle.model
    ids = torch.randint(0, 1000, (1, tokens), device=device)

    def prefill() -> DynamicCache:
        cache = DynamicCache(config=full.config)
        with torch.no_grad():
            full(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    return Case(
        device,
        {
            OURS: lambda: _compressed(gist, ids, segment, call_tokens),
            "compress, one segment": lambda: _compressed(gist, ids, None, call_tokens),
            PREFILL: prefill,
        },
        tokens=tokens,
    )


def _compressed(gist: LlamaForCausalLM, ids: torch.Tensor, segment_length: int | None, call_tokens: int) -> GistCache:
    with torch.no_grad(), mock.patch("gistkern.hf.compress.call_tokens", return_value=call_tokens):
        return compress(gist, ids, segment_length=segment_length)
