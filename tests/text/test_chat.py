from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from jaxserve.config import ConfigError
from jaxserve.text.chat import ChatTemplate
from jaxserve.types import ParamError
from tests.text.conftest import TEMPLATE

TRIMMING = (
    "{{ bos_token }}\n{%- for m in messages %}\n    {% if m.role == 'system' and not loop.first %}\n"
    "        {{ raise_exception('system must come first') }}\n    {% endif %}\n"
    "    {% generation %}[{{ m.role }}]{{ m.content | trim }}{% endgeneration %}\n{% endfor %}\n"
    "{%- if add_generation_prompt %}[assistant]{% endif %}"
)
TOOLS = (
    "{% set ns = namespace(count=0) %}{% if tools %}{% for t in tools %}{% set ns.count = ns.count + 1 %}"
    "{{ t | tojson }}{{ t | tojson(indent=2) }}\n{% endfor %}{{ ns.count }} tools{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function.name }}:{{ c.function.arguments | tojson }}"
    "{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
USER = {"role": "user", "content": " Hi there <b>&</b> "}
CHAT = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Hello, "}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wie ist's in Köln?",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}


@pytest.mark.parametrize("template", [TEMPLATE, TRIMMING, TOOLS], ids=["chatml", "trimming", "tools"])
@pytest.mark.parametrize(
    "messages",
    [CHAT, [USER], [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]],
    ids=["three", "one", "call"],
)
@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "tools": [WEATHER]},
        {"add_generation_prompt": False, "continue_final_message": True},
    ],
    ids=["prompt", "bare", "tools", "continue"],
)
def test_renders_as_transformers_does(template: str, messages: list, options: dict[str, Any], folder: Path) -> None:
    if options.get("continue_final_message") and not messages[-1]["content"]:
        return
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder), bos_token="<|endoftext|>")
    ours = ChatTemplate({"default": template}, {"bos_token": "<|endoftext|>"})
    expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    assert ours.render(messages, **options) == expected


def chatml() -> ChatTemplate:
    return ChatTemplate({"default": TEMPLATE})


def test_content_may_be_text_parts() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    as_text = {"role": "user", "content": "one\ntwo"}
    assert chatml().render([{"role": "user", "content": parts}]) == chatml().render([as_text])


def test_arguments_of_tool_calls_may_be_json_text() -> None:
    template = ChatTemplate({"default": TOOLS})
    call = {**CALL, "function": {"name": "weather", "arguments": json.dumps(CALL["function"]["arguments"])}}
    for content in ({"content": None}, {}):
        message = {"role": "assistant", "tool_calls": [call], **content}
        assert template.render([message]) == 'weather:{"city": "Köln"}'


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert "system\nx" in chatml().render(messages)
    assert ChatTemplate({"default": "{% if messages[0].role == 'developer' %}dev{% endif %}"}).render(messages) == "dev"


def test_options_reach_the_template() -> None:
    template = ChatTemplate({"default": "{% if enable_thinking is defined and not enable_thinking %}quick{% endif %}"})
    assert template.render([USER], options={"enable_thinking": False}) == "quick"
    assert template.render([USER]) == ""


def test_a_template_for_tools_is_used_with_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"})
    assert (template.render([USER]), template.render([USER], tools=[WEATHER])) == ("plain", "tools")


def test_the_caller_keeps_its_messages() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    ]
    before = json.dumps(messages)
    ChatTemplate({"default": "{{ messages[1].tool_calls[0].function.arguments }}"}).render(messages)
    assert json.dumps(messages) == before


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "text",
        [123],
        [{}],
        [None],
        [{"role": 123, "content": "x"}],
        [{"role": "wizard", "content": "x"}],
        [{"role": "user\n", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 123}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "assistant"}],
        [{"role": "user", "content": "x", "extra": object()}],
        [{"role": "assistant", "content": "x", "tool_calls": {}}],
        [{"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "assistant", "content": "x", "tool_calls": ["f"]}],
    ],
)
def test_bad_messages_are_refused(messages: Any) -> None:
    with pytest.raises(ParamError) as error:
        chatml().render(messages)
    assert error.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no such role') }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 // 0 }}",
        "{{ messages[7].role }}",
        "{{ undefined_function() }}",
        "{% include 'other' %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace(__class__=1) %}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ raise_exception.__globals__.os }}",
        "{{ strftime_now(5) }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_template_that_fails_refuses_the_messages(template: str) -> None:
    with pytest.raises(ParamError) as error:
        ChatTemplate({"default": template}).render([USER])
    assert error.value.param == "messages"


@pytest.mark.parametrize(
    "name",
    [
        "messages",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "bos_token",
        "range",
        "raise_exception",
        "continue_final_message",
        "__class__",
        "a b",
        "self",
    ],
)
def test_options_cannot_replace_what_is_ours(name: str) -> None:
    with pytest.raises(ParamError) as error:
        ChatTemplate({"default": TEMPLATE}, {"bos_token": "<s>"}).render([USER], options={name: 1})
    assert error.value.param == "chat_template_kwargs"


def test_continuing_needs_a_message_that_can_go_on() -> None:
    for template, messages, options in [
        (TEMPLATE, CHAT, {"add_generation_prompt": True}),
        (TEMPLATE, [{"role": "assistant", "content": ""}], {"add_generation_prompt": False}),
        ("nothing", CHAT, {"add_generation_prompt": False}),
    ]:
        with pytest.raises(ParamError) as error:
            ChatTemplate({"default": template}).render(messages, continue_final_message=True, **options)
        assert error.value.param == "continue_final_message"


def test_where_templates_come_from(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = folder / "tokenizer_config.json"
    assert ChatTemplate.from_folder(folder).render([USER]).startswith("<|im_start|>")
    config.write_text(
        json.dumps({"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]})
    )
    assert ChatTemplate.from_folder(folder).render([USER], tools=[WEATHER]) == "t"
    (folder / "chat_template.jinja").write_text("from the file")
    assert ChatTemplate.from_folder(folder).render([USER]) == "from the file"
    option = tmp_path_factory.mktemp("option") / "mine.jinja"
    option.write_text("mine")
    assert ChatTemplate.from_folder(folder, file=option).render([USER]) == "mine"


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(ParamError, match="no chat template.*--chat-template"):
        ChatTemplate.from_folder(tmp_path).render([USER])


def test_broken_templates_are_errors_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be parsed"):
        ChatTemplate({"default": "{% if %}"})
    with pytest.raises(ConfigError, match="cannot be read"):
        ChatTemplate.from_folder(tmp_path, file=tmp_path / "missing.jinja")
