"""QLoRA for real, on CPU: 4-bit weights, LoRA, gist rows, and gradient checkpointing through gistkern's op."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

import gistkern
from gistkern.training import GistDataCollator, Objectives
from passkey.models import adapted, patched
from passkey.niah import train_tokenizer
from passkey.settings import preset_file, read_settings

LAYERS = 2
CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
    initializer_range=0.1,
)
CONTEXT = "The harbour is quiet. The pass key is 52047. Nobody counts the lamps by the mill."
QUESTION, ANSWER = " What is the pass key? The pass key is ", "52047"


@pytest.fixture(scope="module")
def recipe():
    return read_settings(preset_file("llama3-8b"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).bfloat16().save_pretrained(folder)
    Fast(tokenizer_object=train_tokenizer(), pad_token="<pad>").save_pretrained(folder)
    return str(folder)


class Calls(TorchDispatchMode):
    """Counts the calls of gistkern's operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "gistkern":
            self.names.append(function._schema.name.removeprefix("gistkern::"))
        return function(*args, **(kwargs or {}))


def train(recipe, source, folder, steps, rate):
    """A few steps on one sample; returns the losses, the batch, and the operators of the last step."""
    base, handle, tokenizer = patched(recipe.on(source))
    model = adapted(recipe, base)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    batch = GistDataCollator(tokenizer, handle)([{"context": CONTEXT, "question": QUESTION, "answer": ANSWER}])
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate)
    losses, objectives = [], Objectives()
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16), Calls() as calls:
            loss = objectives(model.train(), batch).total
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, losses, batch, calls.names


def logits_of(model, batch):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.fixture(scope="module")
def trained(recipe, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model, losses, batch, calls = train(recipe, source, folder, steps=10, rate=1e-2)
    return model, losses, batch, calls, folder


def test_the_loss_falls_through_checkpoints_of_our_op(trained):
    model, losses, _, calls, _ = trained
    linears = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert len(linears) >= 7 * LAYERS, "every linear of a layer is quantized"
    assert losses[0] > 6, "about log(1024)"
    assert losses[-1] < 0.3
    assert calls.count("attention") == 2 * LAYERS, "forward, and once more in the backward pass"
    assert calls.count("attention_backward") == LAYERS


def test_only_what_was_trained_is_saved(trained):
    model, _, _, _, folder = trained
    parameters = sum(one.numel() for one in model.parameters() if one.requires_grad)
    lora = LAYERS * 16 * (2 * (128 + 128) + 2 * (128 + 64))
    assert parameters == lora + 10 * 128
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert 4 * parameters < size < 4 * parameters + 8_000, "fp32, and a header: no embedding, no 4-bit weights"
    names = load_file(folder / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in names} == {"lora_A", "lora_B", "gist_embeddings"}


def test_fresh_objects_give_the_same_logits(recipe, source, trained):
    model, _, batch, _, folder = trained
    expected = logits_of(model, batch)
    base, handle, _ = patched(recipe.on(source, str(folder)))
    again = PeftModel.from_pretrained(base, folder)
    assert again is not model
    assert torch.equal(logits_of(again, batch), expected)
    # the gist rows and LoRA both matter, or equality would show nothing
    start, _, _ = patched(recipe.on(source))
    assert (logits_of(start, batch) - expected).abs().max() > 0.1
    with torch.no_grad():
        handle.inner.gist_embeddings.modules_to_save["default"].weight.zero_()
    assert not torch.equal(logits_of(again, batch), expected)


def test_loading_without_the_casts_moves_the_logits(recipe, source, trained):
    """Why `patched` prepares the model: loading it by the book gives other numbers."""
    model, _, batch, _, folder = trained
    base = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**recipe.quantization)
    )
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    gistkern.patch_llama(base, tokenizer, num_gist_tokens=10, sink_tokens=1)
    careless = PeftModel.from_pretrained(base, folder)
    assert not torch.equal(logits_of(careless, batch), logits_of(model, batch))


def test_generation_from_the_quantized_model(recipe, source, trained):
    """The sample that was trained on is answered from its ten gist rows and the sink alone."""
    model, _, _, _, folder = trained
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    ids = {name: torch.tensor([tokenizer(text)["input_ids"]]) for name, text in (("c", CONTEXT), ("q", QUESTION))}
    with torch.autocast("cpu", torch.bfloat16):
        cache = gistkern.compress(model.eval(), ids["c"])
        out = model.generate(input_ids=ids["q"], past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert cache.gist_rows.tolist() == [11]
    assert tokenizer.decode(out[0, ids["q"].shape[1] :]) == ANSWER
