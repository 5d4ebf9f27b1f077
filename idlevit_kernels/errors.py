"""The errors of this package. Each message names the op, the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


class ArgumentError(Exception):
    """An argument does not fit, which its caller can mend: what is raised is a TypeError or a ValueError as well."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument of a type that does not fit, or a model or block of a kind that cannot idle."""


class ArgumentValueError(ArgumentError, ValueError):
    """An argument of the right type whose value, shape or content does not fit."""


class BackendError(RuntimeError):
    """No backend that was asked for can run the call. ``reasons`` maps each candidate to all of its reasons."""

    def __init__(self, op: str, call: str, reasons: Mapping[str, Sequence[str]]):
        self.op = op
        self.reasons = {name: list(lines) for name, lines in reasons.items()}
        lines = [f"{op}: no usable backend for {call}"]
        for name, why in self.reasons.items():
            lines.append(f"  backend {name!r} cannot run it:")
            lines.extend(f"    - {line}" for line in why)
        lines.append("  Use backend='auto' to fall back to one that can; `idlevit info` shows what is installed.")
        super().__init__("\n".join(lines))


class Words(str):
    """What came, in words: shown as it is, where another string is a value and shown in quotes."""

    def __repr__(self) -> str:
        return str(self)


def describe(value: Any) -> str:
    """A tensor as ``float32[2, 197, 384] on cpu``; anything else as its repr."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return repr(value)


def value_error(op: str, argument: str, expected: str, got: Any) -> ArgumentValueError:
    return ArgumentValueError(f"{op}: {argument} must be {expected}, got {describe(got)}")


def type_error(op: str, argument: str, expected: str, got: Any) -> ArgumentTypeError:
    shown = describe(got) if isinstance(got, torch.Tensor) else f"{type(got).__name__} {got!r}"
    return ArgumentTypeError(f"{op}: {argument} must be {expected}, got {shown}")


def refuse_renamed(op: str, given: Mapping[str, Any], renamed: Mapping[str, str]) -> None:
    """Refuses a keyword that is not known; of one that has another name now, the message says which."""
    for name in given:
        if name in renamed:
            raise ArgumentTypeError(f"{op}: {name}= was replaced in version 0.2.0: use {renamed[name]}")
        raise ArgumentTypeError(f"{op}: it has no argument {name!r}")
