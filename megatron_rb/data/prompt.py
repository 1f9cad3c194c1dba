"""Conversations -> text by the chat template, cut into what is read and what is learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import Any

from megatron_rb.data.problems import BadSample
from megatron_rb.data.rows import Turn
from megatron_rb.data.tokenizer import IMAGE_TOKEN, VIDEO_TOKEN, VISION_END, VISION_START, Tokenizer

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
"""Used when neither the configuration nor the tokenizer brings a template."""

PLACEHOLDERS = {
    "image": f"{VISION_START}{IMAGE_TOKEN}{VISION_END}",
    "video": f"{VISION_START}{VIDEO_TOKEN}{VISION_END}",
}
"""How Qwen's chat templates write media; a message with media is given to the template as text that holds these."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation."""

    text: str
    learned: bool
    """Loss is taken on its tokens."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template, rendered in transformers' sandbox."""

    source: str
    variables: Mapping[str, str] = field(default_factory=dict)
    system_prompt: str = ""
    """For conversations that bring no system turn; empty = none."""

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """The whole conversation in order; what the model has to write itself is learned.

        Raises:
            BadSample: the template fails, or writes earlier turns differently once later ones are there.
        """
        return list(self._pieces(self._messages(turns)))

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The conversation, with the opening of the assistant's next turn."""
        return self._render(self._messages(turns), opens=True)

    def _pieces(self, messages: list[dict[str, str]]) -> Iterator[Piece]:
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:number], opens=True)
            answered = self._render(messages[: number + 1], opens=False)
            yield Piece(_continuation(done, prompt), learned=False)
            yield Piece(_continuation(prompt, answered), learned=True)
            done = answered
        if messages[-1]["role"] != "assistant":
            yield Piece(_continuation(done, self._render(messages, opens=False)), learned=False)

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, str]]:
        messages = [{"role": turn.role, "content": _content(turn)} for turn in turns]
        if self.system_prompt and (not turns or turns[0].role != "system"):
            return [{"role": "system", "content": self.system_prompt}, *messages]
        return messages

    def _render(self, messages: list[dict[str, str]], opens: bool) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its annotation says str, it returns texts and spans
        try:
            rendered, _ = render(
                conversations=[messages], chat_template=self.source, add_generation_prompt=opens, **self.variables
            )
        except (TemplateError, TypeError) as error:
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


def _content(turn: Turn) -> str:
    return "".join(part if isinstance(part, str) else PLACEHOLDERS[part.kind] for part in turn.parts)


def _continuation(start: str, text: str) -> str:
    if not text.startswith(start):
        common = len(commonprefix([start, text]))
        raise BadSample(
            "chat template",
            f"the chat template rewrites earlier turns ({start[common : common + 20]!r} became "
            f"{text[common : common + 20]!r}), so answers cannot be told from prompts; "
            f"set data.chat_template to one that does not",
        )
    return text[len(start) :]
