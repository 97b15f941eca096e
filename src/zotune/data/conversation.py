"""Conversations: messages as a row holds them, before a chat template makes text of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zotune.data.templates import Record, named, require_characters, value
from zotune.errors import DataError, unknown

Turn = dict[str, Any]
"""A message: its role, its content, which is text, and all else that it holds, such as ``tool_calls``."""

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that any template may have; others are those that a template names."""

SAID = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys besides the content that hold what a message says; others, such as ids and names, are about it."""

_SHAREGPT = {"human": "user", "gpt": "assistant"}
_HELP = "A conversation is a list of {role, content}, whose roles are system, user and assistant."
_TOOLS = "Give a list of objects, one per tool, or leave the field out."


@dataclass(frozen=True)
class Conversation:
    """What was said.

    Attributes:
        turns: The messages.
        where: The name of its row for messages.
        tools: What the assistant may call, as the row describes it; None where it does not.
    """

    turns: tuple[Turn, ...]
    where: str
    tools: Any = None

    @classmethod
    def read(cls, record: Record, field: str, where: str) -> Conversation:
        """The conversation in a field of a row, with the tools in its field ``tools``.

        A message has ``role`` and ``content``, or ShareGPT's ``from`` and ``value``; what else it holds stays with it.

        Raises:
            DataError: The field is not there or holds no conversation, the conversation is empty, begins with the
                assistant or has no turn of theirs, or a role or a content is not text.
        """
        found = value(record, field, where, "data.messages")
        where = f"{where}: the field {field!r}"
        if not isinstance(found, list | tuple):
            raise DataError(f"{where} holds {named(found)}. {_HELP}")
        turns = tuple(_turn(message, f"{where}, message {number}") for number, message in enumerate(found, start=1))
        spoken = [turn["role"] for turn in turns]
        if not turns:
            raise DataError(f"{where} holds an empty conversation. Leave the row out. {_HELP}")
        if "assistant" not in spoken:
            for number, turn in enumerate(turns, start=1):
                if not is_known(turn):
                    raise stranger(turn, f"{where}, message {number}")
            raise DataError(f"{where} has no turn of the assistant, so there is nothing to learn.")
        if spoken[0] == "assistant":
            raise DataError(f"{where} begins with the assistant's turn, so there is nothing to answer.")
        tools = record.get("tools")
        return cls(turns, where, None if _is_nothing(tools) else tools)


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {named(message)}. {_HELP}")
    names = ("from", "value") if "role" not in message and "from" in message else ("role", "content")
    others = {key: held for key, held in message.items() if key not in names and not _is_nothing(held)}
    given = message
    if message.get(names[1]) is None and "tool_calls" in others:
        # Columns of a file cannot say which of these it was, and some templates would write out a null.
        given = message | {names[1]: ""}
    for name in names:
        if name not in given:
            raise DataError(f"{where} has no {name!r}. {_HELP}")
        if not isinstance(given[name], str):
            raise DataError(f"{where}: its {name!r} holds {named(given[name])}, not text. {_HELP}")
        require_characters(given[name], f"{where}: its {name!r}")
    role, content = (given[name] for name in names)
    role = _SHAREGPT.get(role, role) if names[0] == "from" else role
    if "tool_calls" in others:
        others["tool_calls"] = _with_objects(others["tool_calls"])
    return {**others, "role": role, "content": content}


def _with_objects(calls: Any) -> Any:
    """Tool calls whose arguments are objects, where they were the JSON of one, as OpenAI's interface gives them.

    Templates write arguments as JSON, and would write a text as a quoted one; servers hand them objects, too.
    """
    if not isinstance(calls, list | tuple):
        return calls
    return [_with_object(call) for call in calls]


def _with_object(call: Any) -> Any:
    if not isinstance(call, dict) or not isinstance(function := call.get("function"), dict):
        return call
    try:
        found = json.loads(function.get("arguments", ""))
    except (TypeError, ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": found}} if isinstance(found, dict) else call


def _is_nothing(held: Any) -> bool:
    """Whether a part of a message is as good as not there; a Parquet file has every key in every message."""
    return held is None or (isinstance(held, str | list | tuple | dict) and not held)


def is_known(turn: Turn) -> bool:
    """Whether a message's role is one that any template may have."""
    return turn["role"] in ROLES


def stranger(turn: Turn, where: str) -> DataError:
    """What to say of a message whose role is none."""
    return DataError(f"{where}: {unknown('role', turn['role'], ROLES)}")


def turns_of(prompt: str, answer: str) -> tuple[Turn, Turn]:
    """A user's turn and the assistant's."""
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}


def read_tools(found: Any, where: str) -> list[dict[str, Any]]:
    """The tools in a row, a list of objects; or its JSON as one text, since a column's objects all have equal keys.

    Args:
        found: What the row holds.
        where: Names the conversation in messages.

    Raises:
        DataError: It is neither.
    """
    try:
        tools = json.loads(found) if isinstance(found, str) else found
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: the row's 'tools' are text that is not JSON: {error}. {_TOOLS}") from error
    if not isinstance(tools, list | tuple):
        raise DataError(f"{where}: the row's 'tools' hold {named(tools)}. {_TOOLS}")
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, dict):
            raise DataError(f"{where}: tool {number} of the row's 'tools' is {named(tool)}. {_TOOLS}")
    return list(tools)


def at_risk(turn: Turn) -> Iterator[str]:
    """Keys of what a message says that a template may know nothing of, or leave out for what else there is."""
    others = [key for key in turn if key not in ("role", "content")]
    if (others or turn["role"] not in ("system", "user", "assistant")) and turn["content"].strip():
        yield "content"
    yield from (key for key in others if key in SAID)


def with_other(turn: Turn, key: str) -> Iterator[list[Turn]]:
    """For each thing that a message holds under a key, the message without it, and with another one if it is text."""
    held = turn[key]
    if isinstance(held, list | tuple) and len(held) > 1:
        yield from ([turn | {key: [*held[:at], *held[at + 1 :]]}] for at in range(len(held)))
    elif isinstance(held, str):
        # A text that is also the template's default shows only when it is another one.
        yield [_without(turn, key), turn | {key: f"x{held}x"}]
    else:
        yield [_without(turn, key)]


def _without(turn: Turn, key: str) -> Turn:
    return turn | {"content": ""} if key == "content" else {name: turn[name] for name in turn if name != key}
