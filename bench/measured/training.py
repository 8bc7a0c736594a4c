"""A step of LoRA training beside the same weights under SDPA: tokens per second."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from bench.measured.case import OURS, Case
from bench.measured.models import models
from bench.shapes import SEGMENTS
from gistkern import GistLayout

RANK = 16


def training_case(name: str, layout: str, rows: int, device: str = "cpu") -> Case:
    """Forward, backward and AdamW of a model with LoRA on one context of `rows` tokens, gist tokens among them.

    Unpatched, the gist tokens are words: SDPA sees all rows causally, and under a dense mask what the layout says.
    What the models answer is checked as `models` does it.
    """
    handle, full = models.__wrapped__(name, device)  # of its own: adapters stay in them
    raw, _ = SEGMENTS[layout] or (rows, 0)
    segment = [*range(1, raw + 1), *handle.gist_token_ids]
    ids = torch.tensor([(segment * (rows // len(segment) + 1))[:rows]], device=device)
    words = ids.clamp(max=full.config.vocab_size - 1)
    seen = GistLayout.from_input_ids(ids, handle.gist_token_ids, sink_tokens=0).token_mask()
    mask = torch.zeros(seen.shape, dtype=full.dtype, device=device).masked_fill_(~seen, -torch.inf)[:, None]
    ours = _adapted(handle.model, ["gist_embeddings"])  # where the gist rows are
    plain = _adapted(full, None)
    return Case(
        device,
        {
            OURS: _step(ours, input_ids=ids, labels=words),
            "SDPA, causal": _step(plain, input_ids=words, labels=words),
            "SDPA, dense mask": _step(plain, input_ids=words, labels=words, attention_mask=mask),
        },
        facts={"lora rank": RANK, "layers": full.config.num_hidden_layers},
        tokens=rows,
    )


def _adapted(model: PreTrainedModel, saved: list[str] | None) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, target_modules="all-linear", modules_to_save=saved, task_type="CAUSAL_LM")
    return get_peft_model(model, config).train()


def _step(adapted: torch.nn.Module, **given: torch.Tensor) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)

    def step() -> torch.Tensor:
        loss = adapted(**given, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
