"""Conversations -> text by the chat template, cut into what is read and what is learned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import Any

from megatron_rb.data.conversation import BoxRef, Conversation, MediaRef, NameRef, Turn
from megatron_rb.data.problems import BadSample, quoted
from megatron_rb.data.tokenizer import IMAGE_TOKEN, VIDEO_TOKEN, VISION_END, VISION_START, Tokenizer

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
"""Used when neither the configuration nor the tokenizer brings a template."""

Message = dict[str, Any]

PLACEHOLDERS = {
    "image": f"{VISION_START}{IMAGE_TOKEN}{VISION_END}",
    "video": f"{VISION_START}{VIDEO_TOKEN}{VISION_END}",
}
"""How Qwen's chat templates write media; a message with media is given to the template as text that holds these."""


@dataclass(frozen=True)
class TextSpan:
    """A stretch of a rendered conversation."""

    text: str
    learned: bool
    """Loss is taken on its tokens."""


class RewrittenTurns(BadSample):
    """The template writes a turn differently once others follow, so that the turns share no sequence."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template, rendered in transformers' sandbox."""

    source: str
    variables: Mapping[str, str] = field(default_factory=dict)
    system_prompt: str = ""
    """For conversations that bring no system turn; empty = none."""

    @cached_property
    def words(self) -> frozenset[str]:
        """Every name, attribute and text in the template: a message's field that is not among them is not written."""
        from jinja2 import TemplateError, nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        try:
            tree = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(self.source)
        except TemplateError:  # such as transformers' own tags; their text is in the source all the same
            return frozenset(re.findall(r"\w+", self.source))
        kinds = ((nodes.Name, "name"), (nodes.Getattr, "attr"), (nodes.Const, "value"))
        return frozenset(str(getattr(node, field)) for kind, field in kinds for node in tree.find_all(kind))

    def pieces(self, conversation: Conversation, loss_turns: str = "all") -> list[TextSpan]:
        """The whole conversation in order; what the model has to write itself is learned.

        Args:
            loss_turns: `all` assistant turns are learned, or the `last`; what a turn says of itself goes before.

        Raises:
            RewrittenTurns: the template writes earlier turns differently once later ones are there.
            BadSample: the template fails, or cannot write something that the conversation holds.
        """
        if conversation.alone:
            return list(self._last_piece(self._messages(conversation), conversation.tools))
        learned = learned_turns(conversation.turns, loss_turns)
        messages = self._messages(conversation)
        added = len(messages) - len(conversation.turns)
        return list(self._pieces(messages, conversation.tools, {number + added for number in learned}))

    def prompt(self, conversation: Conversation) -> str:
        """The conversation, with the opening of the assistant's next turn."""
        return self._render(self._messages(conversation), conversation.tools, opens=True)

    def _pieces(self, messages: list[Message], tools: Sequence[Any], learned: Set[int]) -> Iterator[TextSpan]:
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:number], tools, opens=True)
            answered = self._render(messages[: number + 1], tools, opens=False)
            yield TextSpan(_continuation(done, prompt), learned=False)
            yield _answer(_continuation(prompt, answered), message, number in learned)
            done = answered
        if messages[-1]["role"] != "assistant":
            yield TextSpan(_continuation(done, self._render(messages, tools, opens=False)), learned=False)

    def _last_piece(self, messages: list[Message], tools: Sequence[Any]) -> Iterator[TextSpan]:
        """The last turn alone, after a prompt as the model will see it when it has to write that turn."""
        prompt = self._render(messages[:-1], tools, opens=True)
        yield TextSpan(prompt, learned=False)
        yield _answer(_continuation(prompt, self._render(messages, tools, opens=False)), messages[-1], True)

    def _messages(self, conversation: Conversation) -> list[Message]:
        self._check(conversation)
        turns = conversation.turns
        messages = [_message(turn, "reasoning_content" in self.words) for turn in turns]
        if self.system_prompt and (not turns or turns[0].role != "system"):
            return [{"role": "system", "content": self.system_prompt}, *messages]
        return messages

    def _check(self, conversation: Conversation) -> None:
        held = {
            "tools": bool(conversation.tools),
            "tool_calls": any(turn.tool_calls for turn in conversation.turns),
            "tool": any(turn.role == "tool" for turn in conversation.turns),
        }
        for word, there in held.items():
            if there and word not in self.words:
                what = "turns of a tool" if word == "tool" else repr(word)
                raise BadSample(
                    f"key {word}",
                    f"the chat template cannot write {what}; set data.chat_template to one that does, as Qwen's do",
                )

    def _render(self, messages: list[Message], tools: Sequence[Any], opens: bool) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its annotation says str, it returns texts and spans
        try:
            rendered, _ = render(
                conversations=[messages],
                tools=list(tools) or None,
                chat_template=self.source,
                add_generation_prompt=opens,
                **self.variables,
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise BadSample("chat template", f"the chat template refuses the conversation: {error}") from error
        return str(rendered[0])


def build_template(file: str, tokenizer: Tokenizer, system_prompt: str) -> ChatTemplate:
    """The template of a file, else the tokenizer's own, else ChatML.

    Raises:
        ValueError: the file does not exist.
    """
    source = tokenizer.chat_template or CHATML
    if file:
        if not Path(file).is_file():
            raise ValueError(f"no chat template {file}; data.chat_template must be a Jinja file, or empty")
        source = Path(file).read_text(encoding="utf-8")
    return ChatTemplate(source, tokenizer.template_variables, system_prompt)


def learned_turns(turns: Sequence[Turn], loss_turns: str) -> list[int]:
    """Numbers of the turns that are learned: as each says, else as `loss_turns` says for all of them."""
    answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    wanted = answers if loss_turns == "all" else answers[-1:]
    marks = {number: turns[number].learned for number in answers}
    return [number for number in answers if (marks[number] if marks[number] is not None else number in wanted)]


def _message(turn: Turn, knows_thoughts: bool) -> Message:
    """A turn as templates take it. Thoughts go into the text where the template has no place for them."""
    content = "".join(map(_text, turn.parts))
    if turn.reasoning and not knows_thoughts:
        content = f"<think>\n{turn.reasoning}\n</think>\n\n{content}"
    message: Message = {"role": turn.role, "content": content, **dict(turn.names)}
    if turn.reasoning and knows_thoughts:
        message["reasoning_content"] = turn.reasoning
    if turn.tool_calls:
        message["tool_calls"] = list(turn.tool_calls)
    return message


def _text(part: str | MediaRef | BoxRef | NameRef) -> str:
    if isinstance(part, MediaRef):
        return PLACEHOLDERS[part.kind]
    assert isinstance(part, str), "boxes are written before the template sees them"
    return part


def _answer(text: str, message: Message, learned: bool) -> TextSpan:
    """An assistant's turn as the template wrote it; it must not have left out what is to be learned."""
    held = [message.get("reasoning_content", ""), *(call["function"]["name"] for call in message.get("tool_calls", ()))]
    lost = [part for part in held if part.strip() not in text]
    if learned and lost:
        raise BadSample("chat template", f"the chat template leaves out {quoted(lost[0])}, which is to be learned")
    return TextSpan(text, learned)


def _continuation(start: str, text: str) -> str:
    if not text.startswith(start):
        common = len(commonprefix([start, text]))
        raise RewrittenTurns(
            "chat template",
            f"the chat template rewrites earlier turns ({start[common : common + 20]!r} became "
            f"{text[common : common + 20]!r}), so answers cannot be told from prompts; "
            f"set data.chat_template to one that does not",
        )
    return text[len(start) :]
