"""Chat templates that behave as those of the families do, and a small tokenizer that writes them."""

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_CHATML = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

TEMPLATES = {
    "chatml": "{% for m in messages %}" + _CHATML + "{% endfor %}" + _ASK,
    # Qwen 2.5 and SmolLM2: a system prompt of its own where there is none
    "qwen2": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are an assistant.<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}" + _CHATML + "{% endfor %}" + _ASK,
    # Qwen 3: thoughts of earlier turns taken out, empty ones written into the last, and none asked for
    "qwen3": "{% for m in messages %}{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1] %}"
    "{{ '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if loop.last else '') + said.lstrip('\n') "
    "+ '<|im_end|>\n' }}{% else %}" + _CHATML + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    # Llama 3.2: BOS, a system turn always, with today's date in it; contents trimmed
    "llama3": "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{{ '<|head|>system<|end_head|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n\n' + first + '<|eot|>' }}"
    "{% for m in messages %}{{ '<|head|>' + m.role + '<|end_head|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|end_head|>\n\n' }}{% endif %}",
    # Mistral's later ones: the system prompt in front of the first user turn
    "mistral": "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (first if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    # and its first ones: in front of the last
    "mistral-v1": "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (first if loop.last else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    # Gemma 2: no system turn at all
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}",
    # Phi 3: an end of turn, and behind a finished conversation EOS as well
    "phi3": "{% for m in messages %}{{ '<|head|>' + m.role + '\n' + m.content + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}",
    # Vicuna: plain words, and EOS
    "vicuna": "{{ bos_token }}{% for m in messages %}{{ m.role | upper + ': ' + m.content }}"
    "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}",
}
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|end_head|>", "<|eot|>"]
_TEXT = ["The bell is with Mira. Who has the bell? You are an assistant. Today: system user model ASSISTANT"] * 20
_BEGINS = {"llama3", "mistral", "mistral-v1", "gemma", "vicuna"}  # tokenizers of these put BOS in front of a text


@lru_cache
def _trained(texts, words):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([*_TEXT, *texts], trainer)
    return raw.to_str()


def chat_tokenizer(template, texts=(), words=400, bos=None):
    """Byte-level BPE that knows `texts`, with a template of `TEMPLATES` or none."""
    raw = Tokenizer.from_str(_trained(tuple(texts), words))
    if bos or (bos is None and template in _BEGINS):
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = None if template is None else TEMPLATES[template]
    return made
