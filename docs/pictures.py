"""Draw docs/pictures: under each preset, who holds a block's input, weights and result.

`python docs/pictures.py` writes them again; tests/layouts/test_show.py compares, so that what the
documentation shows is what the presets say.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import shardwise as sw
from shardwise import strategies
from shardwise.layouts.picture import Picture

FOLDER = Path(__file__).parent / "pictures"
SIZES = {"batch": 12, "seq": 12, "embed": 24, "ffn": 96}
ROLES = {
    "hidden": "batch seq embed",
    "block_in": "batch seq embed",
    "w_up": "embed -> ffn",
    "ffn": "batch seq ffn",
    "w_down": "ffn -> embed",
}
PRESETS: Mapping[str, tuple[sw.Strategy, Mapping[str, int]]] = {
    "data": (strategies.data(), {"data": 4}),
    "fsdp": (strategies.fsdp(), {"data": 4}),
    "tensor_1d": (strategies.tensor_1d(), {"tensor": 4}),
    "sequence_parallel": (strategies.sequence_parallel(), {"tensor": 4}),
    "tensor_2d": (strategies.tensor_2d(), {"row": 3, "col": 3}),
    "tensor_2p5d": (strategies.tensor_2p5d(), {"depth": 2, "row": 2, "col": 2}),
    "tensor_3d": (strategies.tensor_3d(), {"i": 2, "j": 2, "k": 2}),
}


def pictures() -> dict[str, Picture]:
    """The picture of each preset, by the name of its file."""
    made = {}
    for name, (strategy, axes) in PRESETS.items():
        mesh = sw.make_mesh(axes, transport="abstract")
        made[f"{name}.svg"] = sw.show(strategy, mesh=mesh, sizes=SIZES, roles=ROLES)
    return made


def main() -> None:
    """Write every picture."""
    FOLDER.mkdir(exist_ok=True)
    for name, picture in pictures().items():
        picture.save(FOLDER / name)


if __name__ == "__main__":
    main()
