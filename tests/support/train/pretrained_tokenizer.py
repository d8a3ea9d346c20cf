"""The files of a pretrained model's tokenizer: bytes, special tokens, and a chat template."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

SPECIAL = ["<begin>", "<end>", "<turn>", "</s>"]
BEGIN, END, TURN, OTHER_END = range(256, 260)
CONFIG = {"eos_token": "<end>", "bos_token": "<begin>", "model_max_length": 1e30, "clean_up": False}
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
    <turn>{{ message['role'] }}: {{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{%- if add_generation_prompt %}<turn>assistant:{% endif %}"""


def tokenizer_json(template: str | None) -> bytes:
    """A tokenizer of bytes; its post-processor puts special tokens around the text, $A."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({x: i for i, x in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if template is not None:
        numbers = [(name, tokenizer.token_to_id(name)) for name in SPECIAL]
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single=template, special_tokens=numbers),
            ]
        )
    return tokenizer.to_str().encode()


BEGIN, END, TURN, OTHER_END = range(256, 260)
