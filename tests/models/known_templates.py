"""Chat templates of well-known models, shortened to what a user's turn reaches."""

from __future__ import annotations

from tiny import CHATML

QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif %}{%- for message in messages %}{%- if (message.role == 'user') or (message.role == 'assistant') %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
_LLAMA3_TURNS = (
    "{{- bos_token }}{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\n' }}{{- 'Today Date: ' + date_string + '\n\n' }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA31 = "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}" + _LLAMA3_TURNS
LLAMA32 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}" + _LLAMA3_TURNS
)
_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
MISTRAL_STRIP = MISTRAL.replace("message['content'] + ' [/INST]'", "message['content'].strip() + ' [/INST]'")
GEMMA = (
    "{{ bos_token }}{% for message in messages %}" + _ALTERNATE + "{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% elif message['content'] is iterable %}"
    "{% for item in message['content'] %}{{ item['text'] | trim }}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLAMA2 = (
    "{% set system_message = 'You are a helpful, respectful and honest assistant.' %}{% for message in messages %}"
    + _ALTERNATE
    + "{% if loop.index0 == 0 %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% endif %}"
    "{% endfor %}"
)
VICUNA = (
    "{{ 'A chat between a curious user and an assistant. ' }}{% for m in messages %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
NO_TRAILER = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
NO_GENERATION_PROMPT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)

# What stands before and after the words, and which outer blanks are trimmed: "both", "right" or "none".
GOOD = {
    "chatml": (CHATML, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "none"),
    "qwen2.5": (
        QWEN25,
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "none",
    ),
    "llama3.1": (
        LLAMA31,
        "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "both",
    ),
    "mistral": (MISTRAL, "<s>[INST] ", " [/INST]", "none"),
    "mistral that strips": (MISTRAL_STRIP, "<s>[INST] ", " [/INST]", "both"),
    "gemma": (GEMMA, "<s><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "both"),
    "gemma3": (GEMMA3, "<s><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "both"),
    "phi3": (PHI3, "<|user|>\n", "<|end|>\n<|assistant|>\n", "none"),
    "zephyr": (ZEPHYR, "<|user|>\n", "</s>\n<|assistant|>\n", "none"),
    "llama2": (
        LLAMA2,
        "<s>[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant.\n<</SYS>>\n\n",
        " [/INST]",
        "right",
    ),
    "vicuna": (VICUNA, "A chat between a curious user and an assistant. USER: ", " ASSISTANT:", "none"),
    "nothing after the words": (NO_TRAILER, "<s>", "", "none"),
    "no generation prompt": (NO_GENERATION_PROMPT, "<|im_start|>user\n", "<|im_end|>\n", "none"),
}
