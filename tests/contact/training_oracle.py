"""What a trainer should have computed: an unpatched model, eager attention, the dense gist mask, plain SGD."""

import copy

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import gistkern
from gistkern import GistLayout

LEARNING_RATE = 0.1
WORDS = 60
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <eos> "
    "{% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)


def make_tokenizer():
    """Of the words w0, w1, ..., ids 3 to 62."""
    words = {word: place for place, word in enumerate(["<pad>", "<eos>", "?", *(f"w{i}" for i in range(WORDS))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE)


def twins(tokenizer=None, wrap=None, vocab_size=70, **patch):
    """A patched model, its handle, and the oracle of it. `wrap` makes both peft models, by the same draws."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=vocab_size, initializer_range=0.2))
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    handle = gistkern.patch_llama(model, tokenizer, **{"num_gist_tokens": 3, **patch})
    if wrap is not None:
        torch.manual_seed(1)
        model = wrap(model, modules_to_save=["gist_embeddings"])
        torch.manual_seed(1)
        plain = wrap(plain)
    return model, handle, Oracle(plain, handle)


class Oracle:
    """Sees the batches that the patched model is called with, and goes the same steps by itself."""

    def __init__(self, plain, handle):
        self.plain, self.handle = plain, handle
        self.rows = torch.nn.Parameter(handle.trainable_parameters()[0].detach().clone())
        self.batches = {True: [], False: []}  # of training, of evaluation
        handle.model.register_forward_pre_hook(self._see, with_kwargs=True, prepend=True)

    def _see(self, module, args, kwargs):
        if kwargs.get("input_ids") is not None and len(kwargs["input_ids"]):
            seen = {name: value.clone() for name, value in kwargs.items() if torch.is_tensor(value)}
            self.batches[module.training].append(seen)

    def logits(self, batch):
        """``[B, N, vocabulary]``, rows of gist tokens put in place, every token told whom it sees."""
        ids, mask, documents = batch["input_ids"], batch.get("attention_mask"), _documents(batch)
        positions = torch.zeros_like(ids)
        sees = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        for row, spans in enumerate(documents):
            for begin, end in spans:
                real = None if mask is None else mask[row : row + 1, begin:end]
                layout = GistLayout.from_input_ids(
                    ids[row : row + 1, begin:end], self.handle.gist_token_ids, real, self.handle.sink_tokens
                )
                sees[row, 0, begin:end, begin:end] = layout.token_mask()[0]
                counted = torch.ones(1, end - begin, dtype=torch.long) if real is None else real
                positions[row, begin:end] = (counted.cumsum(1) - 1).clamp(min=0)[0]
        gists = self.handle.is_gist(ids)
        words = self.plain.get_input_embeddings()(ids.masked_fill(gists, 0))
        rows = F.embedding((ids - self.handle.first_id).clamp(0, len(self.rows) - 1), self.rows)
        additive = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        return self.plain(
            inputs_embeds=torch.where(gists[..., None], rows, words),
            attention_mask=additive,
            position_ids=positions,
            use_cache=False,
        ).logits

    def loss(self, batches):
        """The mean over all labels of the batches that are no gist tokens."""
        total, count = torch.zeros(()), 0
        for batch in batches:
            labels = batch["labels"][:, 1:]
            labels = labels.masked_fill(self.handle.is_gist(labels), -100)
            total = total + F.cross_entropy(self.logits(batch)[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
            count += int(labels.ne(-100).sum())
        return total / count

    def train(self, micro_batches):
        """Losses of the steps that were seen."""
        losses = []
        trained = [self.rows, *(one for one in self.plain.parameters() if one.requires_grad)]
        optimizer = torch.optim.SGD(trained, LEARNING_RATE)
        seen = self.batches[True]
        for first in range(0, len(seen), micro_batches):
            loss = self.loss(seen[first : first + micro_batches])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses


def _documents(batch):
    """(begin, end) of the documents of each row: positions that begin again tell them, where there is no mask."""
    found = []
    width = batch["input_ids"].shape[1]
    for row in range(len(batch["input_ids"])):
        begins = [0]
        if batch.get("attention_mask") is None and batch.get("position_ids") is not None:
            begins = (batch["position_ids"][row] == 0).nonzero()[:, 0].tolist()
        found.append(list(zip(begins, [*begins[1:], width], strict=True)))
    return found
