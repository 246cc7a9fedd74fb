"""What every model's config shares: sizes by dim name, and padding of the dims that need it.

A config's fields are true sizes. `sizes` is what parameters are made with: the fields, and the dims
that follow from them, rounded up where `pad` says so. Padding is made of zeros and stays zero in
training, so it changes no result; it is cut off again when a model is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..layouts.rows import Frozen
from ..meshlib.errors import nearest

# annotation of a field -> types that it takes, and their name
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "an integer"),
    "int | None": ((int, type(None)), "an integer or None"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "True or False"),
    "Mapping[str, int]": ((Mapping,), "dim to multiple, such as {'vocab': 64}"),
    "Mapping[str, Any] | None": ((Mapping, type(None)), "a mapping or None"),
}
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "dropout": (lambda x: 0 <= x < 1, "expected in [0, 1)"),
    "theta": (lambda x: 0 < x < math.inf, "expected above 0"),
    "eps": (lambda x: 0 <= x < math.inf, "expected at least 0"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of the models' configs.

    Attributes:
        pad: dim to the multiple that its size is rounded up to, for axes that do not divide it.
    """

    pad: Mapping[str, int] = field(default_factory=dict)

    DERIVED: ClassVar[tuple[str, ...]] = ("head_dim",)  # properties that are sizes of dims
    PADDED: ClassVar[tuple[str, ...]] = ("vocab", "heads", "kv_heads", "ffn")

    def check_types(self) -> None:
        """Refuse values of other types than the fields', before anything is derived from them.

        Raises:
            TypeError: naming the field, the value, and what was expected.
        """
        for f in fields(self):
            types, expected = _TYPES.get(str(f.type), ((object,), ""))
            value = getattr(self, f.name)
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                if object not in types:
                    raise TypeError(f"{f.name} = {value!r}; expected {expected}")
            elif isinstance(value, Mapping):
                object.__setattr__(self, f.name, Frozen(value))
        for name, multiple in self.pad.items():
            if not isinstance(multiple, int) or isinstance(multiple, bool):
                raise TypeError(f"pad.{name} = {multiple!r}; expected an integer")

    def __post_init__(self) -> None:
        self.check_types()
        for name, (fits, expected) in _RANGES.items():
            if not fits(getattr(self, name, 0.5)):
                raise ValueError(f"{name} = {getattr(self, name)}; {expected}")
        for name, multiple in self.pad.items():
            if name not in self.PADDED:
                raise ValueError(f"pad: {name!r} cannot be padded{nearest(name, self.PADDED)}")
            if multiple < 1:
                raise ValueError(f"pad.{name} = {multiple}; expected at least 1")
        for name, size in self.true_sizes.items():
            if size < 1:
                raise ValueError(f"{name} = {size}; expected at least 1")

    @property
    def true_sizes(self) -> dict[str, int]:
        """Dim to size, without padding."""
        named = [f.name for f in fields(self)] + list(self.DERIVED)
        found = {name: getattr(self, name) for name in named}
        return {
            name: size
            for name, size in found.items()
            if isinstance(size, int) and not isinstance(size, bool)
        }

    @property
    def sizes(self) -> dict[str, int]:
        """Dim to size, padded. Padded key-value heads bring their query heads with them."""
        sizes = self.true_sizes
        multiples = dict(self.pad)
        if "heads" in sizes:
            kv, heads = sizes.get("kv_heads", sizes["heads"]), sizes["heads"]
            if "kv_heads" in multiples and "heads" not in multiples:
                sizes["heads"] = _rounded(kv, multiples["kv_heads"]) * (heads // kv)
            elif kv == heads and "heads" in multiples:  # no groups: they are one dim
                multiples["kv_heads"] = multiples["heads"]
        return {name: _rounded(size, multiples.get(name, 1)) for name, size in sizes.items()}

    @property
    def group(self) -> int:
        """True query heads to a key-value head."""
        sizes: Any = self.true_sizes
        return sizes["heads"] // sizes.get("kv_heads", sizes["heads"])


@dataclass(frozen=True, kw_only=True)
class EqualHeads(Config):
    """Config whose heads share `embed`, also for keys and values; `ffn` 0 is four times embed."""

    if TYPE_CHECKING:  # fields of every subclass
        embed: int = 0
        heads: int = 0
        ffn: int = 0

    DERIVED = ("head_dim", "kv_heads")

    def __post_init__(self) -> None:
        self.check_types()
        if not self.ffn:
            object.__setattr__(self, "ffn", 4 * self.embed)
        super().__post_init__()
        if self.embed % self.heads:
            raise ValueError(f"embed {self.embed} is not a multiple of heads {self.heads}")

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.embed // self.heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads: as many as query heads."""
        return self.heads


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
