"""Chat templates by name, for tokenizers that bring none and for runs in which all models use the same one.

Each is the published text of its family, written here as a jinja template over `messages`, `bos_token`, `eos_token`
and `turn_end`: the token that closes a turn for this tokenizer (`<|eot_id|>`, `<|im_end|>` or `<end_of_turn>` where it
has one, else its eos), so that FuseChat's `openchat_3.5` renders with every model's own separator. A template that
spells tokens which the tokenizer does not have is refused when a document is encoded: nothing would close the turn.

`qwen`, `internlm2` and `yi` are the same text as `chatml`; `internlm2` begins with bos.

A tool's answer is a turn of the role `tool` in `chatml` and its like and in `llama-3`; the others have no such role and
refuse it. Tool calls as objects are written by none: families differ, and a tokenizer's own template knows how.

Deliberately not done: default system prompts (a training text is not the place to add words).
"""

__all__ = ["NAMED_TEMPLATES", "turn_end"]

from collections.abc import Container

_CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
_OPEN = "{% if messages[0]['role'] == 'system' %}"
_PAIRED = "{{ raise_exception('this template has no role ' ~ m['role']) }}"
_NO_TOOLS = f"{{% for m in messages %}}{{% if m['role'] == 'tool' %}}{_PAIRED}{{% endif %}}"


def _by_role(*, system: str | None, user: str, assistant: str, before: str = "{{ bos_token }}") -> str:
    """A template that says each turn by its role; `system` None: there is no such turn."""
    said = f"{{% elif m['role'] == 'system' %}}{system}" if system is not None else ""
    return (
        f"{before}{{% for m in messages %}}{{% if m['role'] == 'user' %}}{user}"
        f"{{% elif m['role'] == 'assistant' %}}{assistant}{said}{{% else %}}{_PAIRED}{{% endif %}}{{% endfor %}}"
    )


NAMED_TEMPLATES = {
    "openchat_3.5": _by_role(
        system="{{ m['content'] }}{{ turn_end }}",
        user="GPT4 Correct User: {{ m['content'] }}{{ turn_end }}",
        assistant="GPT4 Correct Assistant: {{ m['content'] }}{{ turn_end }}",
    ),
    "vicuna": _by_role(
        system="{{ m['content'] }} ",
        user="USER: {{ m['content'] }} ",
        assistant="ASSISTANT: {{ m['content'] }}{{ eos_token }}",
    ),
    "llama-2": _by_role(
        system="",
        before=f"{_OPEN}{{% set said = '<<SYS>>\\n' ~ messages[0]['content'] ~ '\\n<</SYS>>\\n\\n' %}}{{% endif %}}",
        user="{{ bos_token }}[INST] {% if said and loop.index0 == 1 %}{{ said }}{% endif %}{{ m['content'] }} [/INST]",
        assistant=" {{ m['content'] }} {{ eos_token }}",
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    ),
    "mistral": _by_role(
        system=None, user="[INST] {{ m['content'] }} [/INST]", assistant=" {{ m['content'] }}{{ eos_token }}"
    ),
    "gemma": (
        f"{{{{ bos_token }}}}{_NO_TOOLS}<start_of_turn>"
        "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    ),
    "chatml": _CHATML,
    "qwen": _CHATML,
    "yi": _CHATML,
    "internlm2": "{{ bos_token }}" + _CHATML,
    "phi-3": f"{{{{ bos_token }}}}{_NO_TOOLS}<|{{{{ m['role'] }}}}|>\n{{{{ m['content'] }}}}<|end|>\n{{% endfor %}}",
    "zephyr": f"{_NO_TOOLS}<|{{{{ m['role'] }}}}|>\n{{{{ m['content'] }}}}{{{{ eos_token }}}}\n{{% endfor %}}",
}


def turn_end(special_tokens: Container[str], eos_token: str) -> str:
    """Returns the token that closes a turn for a tokenizer with these special tokens."""
    return next((t for t in ("<|eot_id|>", "<|im_end|>", "<end_of_turn>") if t in special_tokens), eos_token)
