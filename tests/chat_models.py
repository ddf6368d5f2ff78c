"""Tokenizers with chat templates for the tests: SmolLM2's template, and two in the manner of Llama 3.1's and 3.2's.

The last two are written for these tests from the published prompt format; Meta's own files are under its licence.
"""

from pathlib import Path

from llama3.tokenizer import NAMED_SPECIAL_TOKENS
from tests.test_tokenizer import Trainee, save, trained

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's (Apache-2.0)."""

PLAIN_LLAMA = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
"""Llama 3's format and nothing else."""

DATED_LLAMA = """{{- bos_token }}
{#- Today's date, unless the caller gives one. -#}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- set turn = namespace(system="", first=0) %}
{%- if messages and messages[0].role == "system" %}
    {%- set turn.system = messages[0].content | trim %}
    {%- set turn.first = 1 %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Knowledge ends: December 2023\\nDate: " ~ date_string ~ "\\n\\n" ~ turn.system ~ "<|eot_id|>" }}
{% for message in messages[turn.first:] %}
    {%- if message.role == "system" %}
        {{- raise_exception("a system message may only come first") }}
    {%- elif message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" ~ message.content | tojson ~ "<|eot_id|>" }}
        {%- continue %}
    {%- else %}
        {{- "<|start_header_id|>" ~ message["role"] ~ "<|end_header_id|>\\n\\n" }}
        {%- generation %}{{- message["content"] | trim ~ "<|eot_id|>" }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{%- endif %}
"""
"""A date, the system prompt taken out of the loop, tools, JSON, and the tag that marks an assistant's text."""


def chat_tokenizer(folder: Path, template: str) -> Path:
    """A small tokenizer in Hugging Face's layout with this template, and the special tokens that it needs."""
    folder.mkdir(parents=True, exist_ok=True)
    if "im_start" in template:
        names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
        save(folder, trained("smollm"), chat_template=template, **names)
        return folder
    made = Trainee.from_str(trained("llama").to_str())
    made.add_special_tokens([*NAMED_SPECIAL_TOKENS])
    made.add_tokens(["<tool>"])
    save(folder, made, chat_template=template, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    return folder
