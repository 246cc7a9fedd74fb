"""Where the user is: the line that called us, and how it spells the operands.

Both are read from the running frame, only when an error is worded or a record is open. A frame is
the user's unless its file lies in one of the library's inner folders or in torch; `models/` counts
as a user.
"""

from __future__ import annotations

import ast
import linecache
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType, ModuleType

import torch

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_INNER = tuple(
    os.path.join(_ROOT, folder) + os.sep
    for folder in ("meshlib", "layouts", "kernels", "ops", "optim", "interop")
)
_FOREIGN = (os.sep + "torch" + os.sep, os.sep + "optree" + os.sep, os.sep + "einops" + os.sep)


@dataclass(frozen=True)
class Call:
    """The user's expression: its text, and text and place of each operand in it (or nothing)."""

    line: str
    text: str = ""
    operands: tuple[str, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    is_operator: bool = False

    def replaced(self, changes: dict[int, str]) -> str:
        """The expression with some operands' texts replaced."""
        out, end = [], len(self.text)
        for number in sorted(changes, key=lambda i: self.spans[i], reverse=True):
            start, stop = self.spans[number]
            out.append(self.text[stop:end])
            out.append(changes[number])
            end = start
        out.append(self.text[:end])
        return "".join(reversed(out))


def user_frame() -> FrameType | None:
    """The innermost frame that is neither ours nor torch's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if (
            not name.startswith(_INNER)
            and not any(part in name for part in _FOREIGN)
            and not name.startswith("<frozen")
            and os.path.basename(name) != "contextlib.py"
        ):
            return frame
        frame = frame.f_back
    return None


def user_line() -> str:
    """The user's place as "train.py:12"; "" when there is none."""
    frame = user_frame()
    if frame is None:
        return ""
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def user_call(operands: Sequence[object]) -> Call:
    """The user's expression that led here, if its source can be read and shows these operands."""
    count = len(operands)
    frame = user_frame()
    if frame is None:
        return Call("")
    line = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
    positions = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    text = _segment(frame.f_code.co_filename, positions)
    if text is None:
        return Call(line)
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        return Call(line)
    parts: list[ast.expr]
    if isinstance(node, ast.BinOp):
        parts = [node.left, node.right]
    elif isinstance(node, ast.Compare) and len(node.comparators) == 1:
        parts = [node.left, *node.comparators]
    elif isinstance(node, ast.UnaryOp):
        parts = [node.operand]
    elif isinstance(node, ast.Subscript):
        parts = [node.value]
    elif isinstance(node, ast.Call):
        listed = [
            e for a in node.args for e in (a.elts if isinstance(a, ast.List | ast.Tuple) else [a])
        ]
        parts = [a for a in listed if not isinstance(a, ast.Starred) and not _is_literal(a)]
        if isinstance(node.func, ast.Attribute) and len(parts) < count:
            parts.insert(0, node.func.value)
    else:
        return Call(line)
    parts = [p for p in parts if not _is_another(p, frame, operands)]
    if len(parts) < count or "\n" in text or not _match(parts, frame, operands):
        return Call(line)
    spans = tuple((p.col_offset, p.end_col_offset or 0) for p in parts[:count])
    if len(text) != len(text.encode()):
        return Call(line)  # offsets are in bytes: do not guess
    names = tuple(text[a:b] for a, b in spans)
    return Call(line, text, names, spans, not isinstance(node, ast.Call))


def _is_literal(part: ast.expr) -> bool:
    """Whether an argument is a number, a string or a signed number."""
    if isinstance(part, ast.UnaryOp):
        part = part.operand
    return isinstance(part, ast.Constant)


def _match(parts: Sequence[ast.expr], frame: FrameType, operands: Sequence[object]) -> bool:
    """Whether plain names stand for the operands at their places: not so in a nested op."""
    for part, operand in zip(parts, operands, strict=False):
        if isinstance(part, ast.Name):
            value = frame.f_locals.get(part.id, frame.f_globals.get(part.id))
            if value is not operand:
                return False
    return True


def _is_another(part: ast.expr, frame: FrameType, operands: Sequence[object]) -> bool:
    """Whether a name stands for something that is no operand: a number, a flag, a module."""
    if isinstance(part, ast.Attribute):
        root = part.value
        while isinstance(root, ast.Attribute):
            root = root.value
        if not isinstance(root, ast.Name):
            return False
        value = frame.f_locals.get(root.id, frame.f_globals.get(root.id))
        return isinstance(value, ModuleType)
    if not isinstance(part, ast.Name):
        return False
    value = frame.f_locals.get(part.id, frame.f_globals.get(part.id))
    return all(value is not x for x in operands) and not isinstance(value, torch.Tensor)


def _segment(filename: str, positions: tuple[int | None, ...]) -> str | None:
    first, last, start, stop = positions
    if first is None or last is None or start is None or stop is None:
        return None
    lines = [linecache.getline(filename, n) for n in range(first, last + 1)]
    if not any(lines):
        return None
    data = [text.encode() for text in lines]
    data[-1] = data[-1][:stop]
    data[0] = data[0][start:]
    return b"".join(data).decode()
