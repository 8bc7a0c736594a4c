"""What stands in the way of gist tokens in other models, read off their configs, so that each is told why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["REFUSALS", "Refusal", "refuse"]


@dataclass(frozen=True)
class Refusal:
    """A feature that rules a model out.

    Attributes
    ----------
    feature : str
        What the model has.
    why : str
        What is wrong with that, as the end of a sentence about it.
    found : callable
        Whether a config has it.
    model_types : tuple of str
        Some that have it, for the README; a test holds `found` to them.
    """

    feature: str
    why: str
    found: Callable[[Any], bool]
    model_types: tuple[str, ...]


_LAYER_TYPES = ("layer_types", "layers_block_type", "block_types")


def _has(*names: str) -> Callable[[Any], bool]:
    """Whether a config has one of these set, for all layers or for some."""
    return lambda config: any(_get(config, name) not in (None, False, 0, "", (), []) for name in names)


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # of configs whose layers differ, which is an error of no common type: some layer has it
        return True


def _of_type(*model_types: str) -> Callable[[Any], bool]:
    return lambda config: config.model_type in model_types


def _layers(*kinds: str) -> Callable[[Any], bool]:
    """Whether a config names layers of these kinds."""

    def found(config: Any) -> bool:
        named = [kind for key in _LAYER_TYPES for kind in _as_list(_get(config, key))]
        return any(kind in named for kind in kinds)

    return found


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _either(*found: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda config: any(one(config) for one in found)


def _state(config: Any) -> bool:
    """Whether a config has the sizes of a state, and no list of layers that all do without."""
    named = {kind for key in _LAYER_TYPES for kind in _as_list(_get(config, key))}
    sizes = _has("ssm_state_size", "mamba_d_state", "mamba_d_conv", "linear_num_key_heads", "conv_L_cache")
    return sizes(config) and not (named and named <= {"attention", "full_attention", "sliding_attention"})


_NO_POSITIONS = ("mpt", "bloom")
_LEARNED = ("gpt2", "gpt_bigcode", "gpt_neo", "opt", "biogpt", "xglm", "openai-gpt", "ctrl", "git", "trocr", "cpmant")
_HANDMADE = ("falcon", "gptj", "codegen", "gpt_neox_japanese")

REFUSALS = (
    Refusal(
        "an encoder beside its decoder, or one alone",
        "whose tokens see what follows them, or another stream",
        _either(
            _has("is_encoder_decoder"),
            _of_type(
                *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "roberta"),
                *(
                    "megatron-bert",
                    "reformer",
                    "rembert",
                    "roberta-prelayernorm",
                    "roc_bert",
                    "roformer",
                    "xlm",
                    "xmod",
                ),
                *("xlm-roberta", "xlm-roberta-xl", "xlnet"),
            ),
        ),
        ("bart", "bert", "marian", "roberta"),
    ),
    Refusal(
        "cross-attention",
        "to rows that are no tokens of the text",
        _has("cross_attention_layers", "add_cross_attention"),
        ("mllama",),
    ),
    Refusal(
        "multi-head latent attention",
        "which caches no keys and values per head",
        _has("kv_lora_rank"),
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "longcat_flash", "minicpm3", "mistral4"),
    ),
    Refusal(
        "recurrent layers (a state space or linear attention)",
        "which carry the context in a state that no mask reaches",
        _either(
            _layers("linear_attention", "mamba", "conv", "recurrent", "hybrid", "hybrid_sliding"),
            _state,
            _of_type("lfm2", "lfm2_moe", "rwkv", "xlstm"),
        ),
        ("bamba", "falcon_h1", "jamba", "lfm2", "mamba", "minimax", "qwen3_next", "recurrent_gemma", "rwkv", "zamba2"),
    ),
    Refusal(
        "chunked attention",
        "whose chunks end where no segment does",
        _layers("chunked_attention"),
        ("llama4_text",),
    ),
    Refusal(
        "sparse attention over chosen or pooled keys",
        "which picks keys that the gist mask hides",
        _either(
            _layers("indexed_attention", "compressed_sparse_attention", "heavily_compressed_attention"),
            _of_type("doge", "minimax_m3_vl_text"),
        ),
        ("deepseek_v4", "doge"),
    ),
    Refusal(
        "keys and values shared between layers",
        "where a cache of each layer's own rows misses some",
        _has("num_kv_shared_layers"),
        ("gemma3n_text",),
    ),
    Refusal(
        "soft-capped attention scores",
        "which the attention kernels do not compute",
        _has("attn_logit_softcapping", "attn_logit_softcap"),
        ("gemma2", "vaultgemma"),
    ),
    Refusal(
        "no rotary position embeddings",
        "but learned or added ones, which a gist row's position cannot replace",
        _either(_of_type(*_LEARNED, *_NO_POSITIONS), _has("alibi")),
        ("bloom", "gpt2", "mpt", "opt"),
    ),
    Refusal(
        "attention code of its own",
        "which transformers lets nobody replace",
        _of_type(*_HANDMADE),
        _HANDMADE,
    ),
    Refusal(
        "decoder layers that hand nothing down to their attention",
        "so that the gist mask does not reach it",
        _of_type("nemotron", "stablelm"),
        ("nemotron", "stablelm"),
    ),
    Refusal(
        "other keys for every expert, head pair or loop",
        "where one token has several rows in a layer",
        _of_type("diffllama", "jetmoe", "hrm_text", "dory"),
        ("diffllama", "hrm_text", "jetmoe"),
    ),
    Refusal(
        "a language model beside an image or audio encoder",
        "whose rows no token id stands for: patch the language model inside, if its family is supported",
        lambda config: _get(config, "text_config") is not None,
        ("gemma3", "got_ocr2", "qwen2_vl"),
    ),
)


def refuse(config: Any) -> None:
    """Raise TypeError, naming the feature, if a config, or the language model's in it, has one that rules it out."""
    inside = _get(config, "text_config")
    parts = [config] if not hasattr(inside, "model_type") else [config, inside]
    for row in REFUSALS:
        if any(row.found(part) for part in parts):
            raise TypeError(
                f"models of type {config.model_type!r} cannot be patched: this one has {row.feature}, {row.why}"
            )
