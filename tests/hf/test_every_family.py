"""What every family must do beside the acceptance test: train, generate, be saved and loaded, be wrapped by peft."""

import copy

import pytest
import torch
from conftest import FAMILIES, class_of, make_model, random_ids, tolerance

import gistkern
from gistkern.cache.versions import CACHE

BALANCED = [
    name
    for name in (
        *("ernie4_5_moe", "flex_olmo", "granitemoe", "granitemoeshared", "minimax_m2"),
        *("mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"),
    )
    if name in FAMILIES
]


def stream(handle, seed=1):
    """Two samples of a context, its gists, and what follows them."""
    gists = torch.tensor(handle.gist_token_ids).expand(2, -1)
    return torch.cat([random_ids(2, 9, seed), gists, random_ids(2, 5, seed + 1)], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_train_the_gist_rows_and_greedy_decoding_agrees(family):
    """The gradient of an answer's loss reaches every gist row, and `generate` says what the stream's logits do."""
    model = make_model(family)
    handle = gistkern.patch(model, num_gist_tokens=2, positions="gist_first")
    (rows,) = handle.trainable_parameters()
    ids = stream(handle)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 11, -100)
    model(ids, labels=labels).loss.backward()
    assert (rows.grad.abs().sum(1) > 0).all()
    with torch.no_grad():
        cache = gistkern.compress(model, ids[:, :9])
        said = model.generate(
            ids[:, 11:], attention_mask=torch.ones(2, 5), max_new_tokens=4, do_sample=False, **{CACHE: cache}
        )
        whole = torch.cat([ids[:, :11], said], 1)
        logits = model(whole, use_cache=False).logits
    assert torch.equal(logits[:, 15:19].argmax(-1), said[:, 5:])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_checkpoint_comes_back(family, tmp_path):
    model = make_model(family, dtype=torch.float32)
    handle = gistkern.patch(model, num_gist_tokens=2, positions="gist_first")
    handle.trainable_parameters()[0].normal_(generator=torch.Generator().manual_seed(0))
    expected = model(stream(handle)).logits
    model.save_pretrained(tmp_path)
    loaded = class_of(family).from_pretrained(tmp_path).eval()
    with gistkern.patch(loaded) as again:
        assert again.settings == handle.settings
        assert torch.equal(again.trainable_parameters()[0], handle.trainable_parameters()[0])
        torch.testing.assert_close(loaded(stream(again)).logits, expected)


@pytest.mark.parametrize("family", BALANCED)
def test_the_loss_of_the_routers_is_that_of_a_plain_model(family):
    """Where no gist token is read, with padding; where some are, they are routed tokens like others."""
    model = make_model(family)
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    call = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "output_router_logits": True}
    places = (mask.cumsum(1) - 1).clamp(min=0)
    try:
        plain = model(ids, position_ids=places, **call)
    except AttributeError as error:
        pytest.skip(f"this transformers has no balance loss for {family}: {error}")  # 5.6 and Granite's
    plain.loss.backward()
    gradient = model.model.layers[1].self_attn.v_proj.weight.grad.clone()
    model.zero_grad()
    with gistkern.patch(model, num_gist_tokens=2) as handle:
        found = model(ids, **call)
        found.loss.backward()
        torch.testing.assert_close(found.loss, plain.loss, **tolerance(family))
        torch.testing.assert_close(found.aux_loss, plain.aux_loss, **tolerance(family))
        torch.testing.assert_close(model.model.layers[1].self_attn.v_proj.weight.grad, gradient, **tolerance(family))
        both = stream(handle)
        mixed = model(both, labels=both, output_router_logits=True)
        words = model(both, labels=both)
        added = model.router_aux_loss_coef * mixed.aux_loss  # transformers 5.6 leaves the sum in fp32
        torch.testing.assert_close(mixed.loss.double(), (words.loss + added).double(), rtol=1e-6, atol=0)
        assert sum(len(layer) for layer in mixed.router_logits) == len(mixed.router_logits) * both.numel()


@torch.no_grad()
def test_a_cache_knows_the_scalings_of_its_model():
    """Equal weights multiplied otherwise are another model."""
    one, other = make_model("granite"), make_model("granite", residual_multiplier=0.25)
    for model in (one, other):
        gistkern.patch(model, num_gist_tokens=2)
    cache = gistkern.compress(one, random_ids(1, 9))
    one(random_ids(1, 3), **{CACHE: cache.clone()})
    with pytest.raises(ValueError, match="written by another model"):
        other(random_ids(1, 3), **{CACHE: cache.clone()})


def test_a_shard_balances_no_experts():
    """Under context_parallel every rank would add the balance of its own rows."""
    import torch.distributed as dist

    if not hasattr(dist, "all_gather_single"):
        pytest.skip("context_parallel needs a newer torch")
    model = make_model("mixtral")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        handle = gistkern.patch(model, num_gist_tokens=2, context_parallel=dist.group.WORLD)
        ids = stream(handle)
        assert model(ids, labels=ids, use_cache=False).loss.isfinite()
        with pytest.raises(ValueError, match="balance loss is not that of the whole context"):
            model(ids, labels=ids, use_cache=False, output_router_logits=True)
        model.config.output_router_logits = True
        with pytest.raises(ValueError, match="pass output_router_logits=False"):
            model(ids, labels=ids, use_cache=False)
    finally:
        dist.destroy_process_group()


# fused projections, projections with biases, experts held as one tensor, an inner model of another name
LORA = [name for name in ("cohere", "glm4", "gpt_neox", "mixtral", "phi3", "qwen2_moe") if name in FAMILIES]


@pytest.mark.parametrize("family", LORA)
def test_an_adapter_trains_and_comes_back(family, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model(family, dtype=torch.float32)
    base = copy.deepcopy(model)
    handle = gistkern.patch(model, num_gist_tokens=2)
    config = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["gist_embeddings"])
    adapted, ids = peft.get_peft_model(model, config).train(), stream(handle)
    before = handle.trainable_parameters()[0].detach().clone()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert (handle.trainable_parameters()[0] - before).abs().max() > 1e-3
    adapted.eval().save_pretrained(tmp_path)
    gistkern.patch(base, num_gist_tokens=2)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
        cache = gistkern.compress(loaded, ids[:, :9])
        torch.testing.assert_close(loaded(input_ids=ids[:, 11:], **{CACHE: cache}).logits, expected[:, 11:])


HOSTILE = {
    "one-key-head": {"num_key_value_heads": 1},
    "wide-heads": {"head_dim": 24},
    "biases": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "padding-is-a-word": {"pad_token_id": 5},
    "odd-vocabulary": {"vocab_size": 103},
}


@pytest.mark.parametrize("family", [name for name in ("gemma", "glm4", "granite", "smollm3") if name in FAMILIES])
@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
@torch.no_grad()
def test_configs_off_the_beaten_track(family, change):
    """The inner model alone gives what the whole one does; a compressed context what the masked stream does."""
    model = make_model(family, **change)
    with gistkern.patch(model, num_gist_tokens=2, positions="gist_first") as handle:
        ids = stream(handle)
        whole = model(ids, output_hidden_states=True, use_cache=False)
        decoded = model(ids[:, 11:], **{CACHE: gistkern.compress(model, ids[:, :9])}).logits
    torch.testing.assert_close(decoded, whole.logits[:, 11:], **tolerance(family))
    with gistkern.patch(model.model, num_gist_tokens=2, positions="gist_first"):
        torch.testing.assert_close(model.model(ids).last_hidden_state, whole.hidden_states[-1], **tolerance(family))
    halves = model.to(torch.bfloat16)
    with gistkern.patch(halves, num_gist_tokens=2, positions="gist_first"):
        found = halves(ids[:, 11:], **{CACHE: gistkern.compress(halves, ids[:, :9])}).logits
    assert (found - decoded).abs().max() < 0.15 * decoded.abs().max()
