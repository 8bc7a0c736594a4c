"""How many tokens of a context one call of a model reads."""

from __future__ import annotations

__all__ = ["call_tokens"]

# an 8B model (4,096 wide) keeps a large GPU busy with 4,096 tokens; narrower ones need more of them until a layer's
# products take longer than its queueing, and tokens times width, by which a call's memory goes, stay the same
_GPU_TOKENS, _GPU_WIDTH, _GPU_MOST = 4096, 4096, 16384
# on a CPU 4,096 tokens gained a tenth over 512 and took seven times the memory; of a model 64 wide 2,048 gain a quarter
_CPU_TOKENS, _CPU_WIDTH, _CPU_MOST = 512, 256, 2048


def call_tokens(hidden_size: int, device: str, apart: bool = False) -> int:
    """Raw tokens of one call of `compress`, of each sample: enough to fill the machine, small beside a context.

    `device` is the type of a `torch.device`. `apart`: segments that see nothing of each other, which on a CPU are
    read as on a GPU.

    Examples
    --------
    >>> call_tokens(4096, "cuda"), call_tokens(2048, "cuda"), call_tokens(576, "cuda"), call_tokens(576, "cpu")
    (4096, 8192, 16384, 512)
    """
    if device == "cpu":
        tokens, width, most = (_GPU_TOKENS, 1, _GPU_TOKENS) if apart else (_CPU_TOKENS, _CPU_WIDTH, _CPU_MOST)
    else:
        tokens, width, most = _GPU_TOKENS, _GPU_WIDTH, _GPU_MOST
    return min(max(tokens, tokens * width // hidden_size), most)
