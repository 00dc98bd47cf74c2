"""Chats: the messages of a row checked, and rendered by the tokenizer's template as a prompt and a completion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sterna.errors import InvalidArgument, InvalidFile
from sterna.training.models import first_line

Message = Mapping[str, Any]
"""`role` and `content`, both texts, and whatever else the chat template reads, as plain JSON."""

Chat = tuple[Message, ...]
"""Messages, the last of which is the assistant's: it is the completion, those before it are the prompt."""


def read_chat(cells: Sequence[Any], where: str) -> Chat | None:
    """The messages in the cells of a row, one list after the other; None where a cell holds nothing or the assistant says nothing.

    Raises InvalidFile, which begins with `where`, for what is no list of messages, and where the last message is not the assistant's.
    """
    if any(cell is None for cell in cells):
        return None
    messages: list[Message] = []
    for cell in cells:
        if not isinstance(cell, list | tuple):
            raise InvalidFile(f"{where} holds {_kind(cell)}, expected a list of messages, each with role and content")
        messages += [_message(message, f"{where}, message {number}") for number, message in enumerate(cell, len(messages) + 1)]
    if not messages:
        return None
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise InvalidFile(f"{where}: the last of {len(messages)} messages has the role {role[:40]!r}; expected 'assistant', whose text is learned")
    if len(messages) == 1 or (len(cells) > 1 and len(cells[-1]) != 1):
        raise InvalidFile(f"{where}: expected one message of the assistant to be learned, after the messages that it answers")
    return tuple(messages) if messages[-1]["content"].strip() else None


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, Mapping):
        raise InvalidFile(f"{where} is {_kind(given)}, expected a mapping with role and content")
    for key in ("role", "content"):
        if not isinstance(given.get(key), str):
            raise InvalidFile(f"{where}: {key} is {_kind(given[key]) if key in given else 'missing'}, expected a text")
    try:  # Parquet has every key of any message in all of them, as None
        text = json.dumps({key: value for key, value in given.items() if value is not None}, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidFile(f"{where} is not plain text and JSON ({first_line(error)})") from error
    message: Message = json.loads(text)
    return message


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def rendered(tokenizer: Any, chat: Chat) -> tuple[str, str]:
    """The texts of the prompt, up to where the assistant's turn begins, and of the completion, with what the template closes it by.

    Raises InvalidArgument where the tokenizer has no template, the template refuses the chat, or writes the prompt otherwise once it is answered.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidArgument(
            "the rows are chats, and the tokenizer has no chat template; give it one and save it, or give rows with prompt and completion as texts"
        )
    shown = f"the chat that ends in {chat[-1]['content'].strip()[:40]!r}"
    messages = [dict(message) for message in chat]
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program of somebody else's, and may raise anything
        raise InvalidArgument(f"the chat template refuses {shown}: {first_line(error)}") from error
    if not whole.startswith(prompt) or len(whole) == len(prompt):
        raise InvalidArgument(
            f"the chat template writes the messages otherwise once they are answered, so what is to be learned of {shown} cannot be told; "
            "give rows with prompt and completion as texts"
        )
    return prompt, whole[len(prompt) :]
