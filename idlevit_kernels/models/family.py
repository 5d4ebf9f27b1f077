"""Families of models: where in a model consecutive blocks stand, and what is particular to them.

``register_family`` makes one known to ``apply_idle`` and all that builds on it. The families of this package are
registered by the same call, in ``apply``; those of users are asked first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from ..block.parts import Form, find_kind, forget_form, register_form
from ..errors import type_error

_METHODS = ("find", "blocks", "set_blocks", "num_prefix_tokens", "default_scorer", "why_unsupported")


class Family(Protocol):
    """Where the blocks of some models stand. Derive from it to have what is usual; ``find``, ``blocks`` and
    ``num_prefix_tokens`` have to be written.

    A *place* is the module that holds the consecutive blocks of one encoder; a model may hold several, any depth down.
    A family whose image tokens stay one sequence from the first block to the last can be trained by
    ``IdleViTForTraining`` if it has ``embed(place, images)``, which returns the tokens of the first block and the
    keyword arguments of each block, and ``head(place, x)``: logits and features, those of ``IdleViTOutput``, from the
    last block's tokens.

    Attributes:
        name: as the errors and lists of families give it.
        forms: how the blocks are read and called; none where another family has registered them.
    """

    name: str
    forms: tuple[Form, ...] = ()

    def find(self, model: nn.Module) -> list[Any]:
        """The places in the model, in order; ``places`` looks for them by their class."""
        ...

    def blocks(self, place: Any) -> list[nn.Module]:
        """All blocks of the place, in the order they run, whatever stages they lie in."""
        ...

    def num_prefix_tokens(self, place: Any) -> int:
        """P, the tokens before the image's (class token, registers), which never idle."""
        ...

    def set_blocks(self, place: Any, blocks: list[nn.Module]) -> None:
        """Puts others in the place of its blocks."""
        others = dict(zip(self.blocks(place), blocks, strict=True))
        for module in list(place.modules()):
            for name, child in module._modules.items():
                if child is not None and child in others:
                    module._modules[name] = others[child]

    def default_scorer(self, place: Any) -> str:
        """What ``scorer="auto"`` stands for."""
        return "cls" if self.num_prefix_tokens(place) else "mean"

    def why_unsupported(self, place: Any) -> str | None:
        """Why the place rules idling out, beyond what the form says of its blocks; None if it does not."""
        return None


def places(model: nn.Module, *kinds: str | type) -> list[Any]:
    """The modules of these classes in the model, itself included, in order; none within another.

    A class that is a string is one of ``versions.CLASSES``; where its library is not loaded, there is none.
    """
    known = [kind if isinstance(kind, type) else find_kind(kind) for kind in kinds]
    classes = tuple(kind for kind in known if kind is not None)
    return outermost(model, lambda module: isinstance(module, classes)) if classes else []


def outermost(model: nn.Module, holds: Callable[[nn.Module], bool]) -> list[Any]:
    """The modules of which it holds, in order; none within another."""
    found: dict[nn.Module, None] = {}

    def walk(module: nn.Module) -> None:
        if holds(module):
            found[module] = None
            return
        for child in module.children():
            walk(child)

    walk(model)
    return list(found)


_families: list[Family] = []


def register_family(family: Family) -> None:
    """Teaches ``apply_idle``, and all that takes its models, a new architecture.

    A family of the same name is replaced, so that a cell of a notebook can run twice. Where two families find the same
    blocks, the one that was registered last has them.

    Args:
        family: an object like ``Family``. See examples/own_vit.py and "Adding a family" in CONTRIBUTING.md.

    Raises:
        TypeError: it lacks something, which the message names.
        ValueError: a class of its blocks is known already.
    """
    op = "register_family"
    if isinstance(family, type):
        raise type_error(op, "family", f"an object: {family.__name__}()", family)
    missing = [name for name in ("name", "forms") if not hasattr(family, name)]
    missing += [f"{name}()" for name in _METHODS if not callable(getattr(family, name, None))]
    if missing:
        raise type_error(op, "family", f"like ik.Family, with {', '.join(missing)}", family)
    known = next((f for f in _families if f.name == family.name), None)
    if known is not None:
        unregister_family(known)
    done: list[Form] = []
    try:
        for form in family.forms:
            register_form(form)
            done.append(form)
    except ValueError:
        for form in done:
            forget_form(form)
        if known is not None:
            register_family(known)
        raise
    _families.append(family)


def unregister_family(family: Family) -> None:
    """Undoes ``register_family``. Remove idle blocks of such models before."""
    _families.remove(family)
    for form in family.forms:
        forget_form(form)


def family_names() -> list[str]:
    return [family.name for family in _families]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """One place in a model, its family and its blocks; ``name``: of the place, "" where it is the model itself."""

    family: Family
    place: Any
    blocks: list[nn.Module]
    name: str


def encoders(model: nn.Module) -> list[Encoder]:
    """All that some family finds, in the order in which they stand in the model."""
    names = {module: name for name, module in model.named_modules()}
    order = {module: i for i, module in enumerate(names)}
    taken: set[nn.Module] = set()
    found = []
    for family in reversed(_families):
        for place in family.find(model):
            blocks = list(family.blocks(place))
            if blocks and not taken.intersection(blocks):
                taken.update(blocks)
                found.append(Encoder(family, place, blocks, names.get(place, "")))
    return sorted(found, key=lambda encoder: order.get(encoder.place, 0))
