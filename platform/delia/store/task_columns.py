"""Columns of a user's file -> SeedTask: five layouts, one form of chat.

    messages            [{"role": "user" | "assistant" | "system", "content": text}, ...]
    sharegpt            [{"from": "human" | "gpt" | "system", "value": text}, ...] in `conversations`
    prompt_completion   two texts
    alpaca              `instruction`, optional `input` (on the next line of the same turn, or on the line
                        before: `input_first`), `output`

Any layout may have a `system` column: the system turn, where it is not blank. Other columns are
`id`, `suite`, `phrasing`, `licence` and `base_messages` (a list with role and content); columns that
have no meaning here are left alone. Null is the same as absent, for Parquet can't leave a field out.
"""

from collections.abc import Mapping
from typing import Any, Literal

from delia.config import FrozenConfig
from delia.errors import TaskFileError
from delia.schema import ROLES, Message, Messages, Role, SeedTask

Layout = Literal["messages", "prompt_completion", "alpaca", "sharegpt", "auto"]
NEEDED_BY_LAYOUT: dict[Layout, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
OPTIONAL = ("input", "system", "id", "suite", "phrasing", "licence", "base_messages")
PLAIN_ROLES: dict[str, Role] = {role: role for role in ROLES}
SHAREGPT_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}


class ColumnMapping(FrozenConfig):
    """Which layout a file has, and what its columns are called.

    `role` and `content` are the keys of a message, `sender` and `value` those of a sharegpt turn.
    "auto" takes the one layout whose columns the first row of train has.

    `input_first` puts the instruction after its input, in training and in use alike: Post-Ins (Liu et al.
    2023, "Instruction Position Matters in Sequence Generation with Large Language Models", arXiv 2308.12097).
    Only the alpaca layout says which part is which.
    """

    layout: Layout = "auto"
    messages: str = "messages"
    role: str = "role"
    content: str = "content"
    conversations: str = "conversations"
    sender: str = "from"
    value: str = "value"
    prompt: str = "prompt"
    completion: str = "completion"
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    system: str = "system"
    id: str = "id"
    suite: str = "suite"
    phrasing: str = "phrasing"
    licence: str = "licence"
    base_messages: str = "base_messages"
    input_first: bool = False


def resolve_layout(columns: ColumnMapping, first: Mapping[str, Any]) -> ColumnMapping:
    """Return the mapping with its layout named, "auto" decided by the first row.

    Raises:
        TaskFileError: No layout fits, or more than one.
    """
    if columns.layout != "auto":
        return _check_order(columns)
    names = columns.model_dump()
    needed = {layout: [names[field] for field in fields] for layout, fields in NEEDED_BY_LAYOUT.items()}
    fitting = [layout for layout, wanted in needed.items() if set(wanted) <= set(first)]
    if len(fitting) == 1:
        return _check_order(columns.model_copy(update={"layout": fitting[0]}))
    if fitting:
        raise TaskFileError(
            f"the columns {_show(first)} fit the layouts {fitting}; set columns.layout to one of them"
        )
    raise TaskFileError(
        f"the columns {_show(first)} fit no layout; needed are"
        f" {'; '.join(f'{wanted} for {layout}' for layout, wanted in needed.items())};"
        " set columns.layout and the names, for example columns.prompt=question"
    )


def _check_order(columns: ColumnMapping) -> ColumnMapping:
    if columns.input_first and columns.layout != "alpaca":
        raise TaskFileError(
            f"columns.input_first moves the instruction behind its input, which the layout {columns.layout!r} does"
            " not tell apart; give the file columns `instruction` and `input`, or unset input_first"
        )
    return columns


def parse_row(fields: Mapping[str, Any], columns: ColumnMapping, *, is_train: bool) -> SeedTask:
    """Turn one object into a row; `task_id` stays empty where the object has no id.

    Args:
        fields: The object; values of any type.
        columns: With a layout other than "auto".
        is_train: Whether the row must end in an assistant turn, even where it has `base_messages`.

    Raises:
        TaskFileError: What is wrong, without the place.
    """
    base_messages: Messages = ()
    if fields.get(columns.base_messages) is not None:
        base_messages = _parse_turns(fields[columns.base_messages], columns, columns.base_messages)
        _check_turns(base_messages, columns.base_messages)
        if base_messages[-1].role != "user":
            raise TaskFileError(f"{columns.base_messages} must end in a user turn, which the base answers")
    may_be_open = bool(base_messages) and not is_train
    messages = _parse_chat(fields, columns, may_be_open=may_be_open)
    _check_turns(messages, "the chat")
    if messages[-1].role != "assistant" and not may_be_open:
        raise TaskFileError(
            "no assistant turn at the end; add one"
            + (", train rows need it" if is_train else f", or {columns.base_messages} in its place")
        )
    return SeedTask(
        task_id=_parse_id(fields.get(columns.id), columns.id),
        messages=messages,
        suite=_parse_label(fields, columns.suite, default="task"),
        phrasing=_parse_label(fields, columns.phrasing, default=""),
        licence=_parse_label(fields, columns.licence, default=""),
        base_messages=base_messages,
    )


def render_row(row: SeedTask) -> dict[str, Any]:
    """Return the object that `parse_row` reads back as this row, in the messages layout."""
    fields: dict[str, Any] = {"id": row.task_id, "messages": _render_turns(row.messages)}
    labels = {"suite": (row.suite, "task"), "phrasing": (row.phrasing, ""), "licence": (row.licence, "")}
    fields |= {name: value for name, (value, default) in labels.items() if value != default}
    if row.base_messages:
        fields["base_messages"] = _render_turns(row.base_messages)
    return fields


def check_text(value: Any, what: str) -> str:
    """Return the value if it is text that can be stored and tokenised.

    Raises:
        TaskFileError: Not text, or text with NUL or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise TaskFileError(f"{what} must be text, not {type(value).__name__}")
    if "\0" in value:
        raise TaskFileError(f"{what} holds a NUL character, so it is binary; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TaskFileError(
            f"{what} holds a lone surrogate (\\u{ord(value[error.start]):04x} at character"
            f" {error.start}), which is no text; write the whole character"
        ) from error
    return value


def _parse_chat(fields: Mapping[str, Any], columns: ColumnMapping, *, may_be_open: bool) -> Messages:
    names = columns.model_dump()
    needed = [names[field] for field in NEEDED_BY_LAYOUT[columns.layout]]
    wanted = needed[:1] if may_be_open else needed  # an open row may leave the answer's column out
    if missing := [name for name in wanted if name not in fields]:
        settings = [f"columns.{field}" for field, name in names.items() if name in missing]
        raise TaskFileError(
            f"no column {missing}: the layout {columns.layout!r} needs {needed}, found {_show(fields)};"
            f" map it with {' and '.join(settings)}, or set columns.layout"
        )
    if columns.layout == "messages":
        chat = _parse_turns(fields[columns.messages], columns, columns.messages)
    elif columns.layout == "sharegpt":
        chat = _parse_turns(fields[columns.conversations], columns, columns.conversations, is_sharegpt=True)
    else:
        chat = _parse_pair(fields, *needed, columns=columns)
    system = fields.get(columns.system)
    if system is None or not check_text(system, columns.system).strip():
        return chat
    return (Message(role="system", content=system), *chat)


def _parse_pair(
    fields: Mapping[str, Any], prompt_name: str, answer_name: str, *, columns: ColumnMapping
) -> Messages:
    prompt = _check_content(fields[prompt_name], prompt_name)
    addition = fields.get(columns.input) if columns.layout == "alpaca" else None
    if addition is not None and check_text(addition, columns.input).strip():
        parts = (addition, prompt) if columns.input_first else (prompt, addition)
        prompt = "\n".join(parts)
    turns = [Message(role="user", content=prompt)]
    if fields.get(answer_name) is not None:
        turns.append(Message(role="assistant", content=_check_content(fields[answer_name], answer_name)))
    return tuple(turns)


def _parse_turns(value: Any, columns: ColumnMapping, name: str, *, is_sharegpt: bool = False) -> Messages:
    if not isinstance(value, list):
        raise TaskFileError(f"{name} must be a list of turns, not {type(value).__name__}")
    fields = ("sender", "value") if is_sharegpt else ("role", "content")
    role_key, content_key = (str(columns.model_dump()[field]) for field in fields)
    roles = SHAREGPT_ROLES if is_sharegpt else PLAIN_ROLES
    turns: list[Message] = []
    for position, turn in enumerate(value, start=1):
        what = f"turn {position} of {name}"
        if not isinstance(turn, dict):
            raise TaskFileError(f"{what} must be an object, not {type(turn).__name__}")
        for field, key in zip(fields, (role_key, content_key), strict=True):
            if key not in turn:
                raise TaskFileError(
                    f"{what} has no {key!r}, found {_show(turn)}; map it with columns.{field}"
                )
        role = check_text(turn[role_key], f"the {role_key} of {what}")
        if role not in roles:
            raise TaskFileError(f"{what} has the unknown role {role[:40]!r}; the roles are {list(roles)}")
        content = _check_content(turn[content_key], f"the {content_key} of {what}")
        turns.append(Message(role=roles[role], content=content))
    return tuple(turns)


def _render_turns(messages: Messages) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _check_content(value: Any, what: str) -> str:
    text = check_text(value, what)
    if not text.strip():
        raise TaskFileError(f"{what} is empty or only whitespace; write the text or remove the row")
    return text


def _check_turns(messages: Messages, what: str) -> None:
    """Hold the order: at most one system turn, first; then user and assistant by turns."""
    num_system = 1 if messages and messages[0].role == "system" else 0
    for position, message in enumerate(messages[num_system:]):
        wanted = ROLES[1 + position % 2]
        if message.role != wanted:
            raise TaskFileError(
                f"wrong turn order in {what}: turn {num_system + position + 1} is {message.role!r} where"
                f" {wanted!r} must stand; a system turn may come first, then user and assistant alternate"
            )
    if len(messages) == num_system:
        raise TaskFileError(f"no user turn in {what}; write at least one")


def _parse_id(value: Any, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _check_content(value, name)


def _parse_label(fields: Mapping[str, Any], name: str, *, default: str) -> str:
    value = fields.get(name)
    return default if value is None else check_text(value, name)


def _show(fields: Mapping[str, Any]) -> str:
    """Return the names of an object's fields, cut short: a file may have any number."""
    names = [str(name)[:40] for name in fields]
    return f"{names[:20]}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")
