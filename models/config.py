"""What every model's config shares: sizes by dim name, and padding of the dims that need it.

A config's fields are true sizes. `sizes` is what parameters are made with: the fields, and the dims
that follow from them, rounded up where `pad` says so. Padding is made of zeros and stays zero in
training, so it changes no result; it is cut off again when a model is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from ..meshlib.errors import nearest


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of the models' configs.

    Attributes:
        pad: dim to the multiple that its size is rounded up to, for axes that do not divide it.
    """

    pad: Mapping[str, int] = field(default_factory=dict)

    DERIVED: ClassVar[tuple[str, ...]] = ("head_dim",)  # properties that are sizes of dims
    PADDED: ClassVar[tuple[str, ...]] = ("vocab", "heads", "kv_heads", "ffn")

    def __post_init__(self) -> None:
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


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
