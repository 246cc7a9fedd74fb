"""Pictures: every device stands in the cell of its block, in every form that a picture takes."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from gallery import MESHES, mesh, values
from hypothesis import given
from strategies import cases

import shardwise as sw
from shardwise import strategies
from shardwise.layouts.holders import PARTS, spans
from shardwise.layouts.layout import make
from shardwise.layouts.picture import LIMIT, Bars, Cell, Grid, Group, Lines, Part, Picture, Table
from shardwise.layouts.show import register

DOCS = Path(__file__).parents[2] / "docs"
EIGHT = mesh(i=2, j=2, k=2)
SVG = "{http://www.w3.org/2000/svg}"


def flat(parts: tuple[Part, ...]) -> Iterator[Part]:
    for part in parts:
        yield part
        if isinstance(part, Group):
            yield from flat(part.parts)


def grids(picture: Picture, in_text: bool = True) -> list[Grid]:
    found = [p for p in flat(picture.parts) if isinstance(p, Grid) and p.in_text is in_text]
    assert found
    return found


def devices(line: str, on: sw.Mesh) -> list[dict[str, int]]:
    """The coordinates that `+ (0,0-3|5)` stands for."""
    found = re.fullmatch(r"(?:[+;] )?\(([\d,|-]*)\)", line)
    assert found, line
    axes = []
    for text in found[1].split(",") if found[1] else []:
        ends = [part.split("-") for part in text.split("|")]
        axes.append([i for end in ends for i in range(int(end[0]), int(end[-1]) + 1)])
    return [dict(zip(on.axes, at, strict=True)) for at in itertools.product(*axes)]


def ranges(picture: Picture) -> dict[str, int]:
    """From the line that says which dims are rows and columns: side to dim."""
    said = {}
    for side, dim in re.findall(r"(rows|columns): dim (\d+)", str(picture)):
        said[side] = int(dim)
    return said


@given(case=cases(count=1, max_ndim=5))
def test_every_device_is_in_the_cell_of_its_block_once(case: Any) -> None:
    layout = case.layouts[0]
    shape = tuple(case.value.shape)
    picture = sw.show(layout, mesh=case.mesh, shape=shape)
    sides = ranges(picture)
    seen: Counter[tuple[int, ...]] = Counter()
    for grid in grids(picture):
        panel = {int(d): span for d, span in re.findall(r"dim (\d+) (\d+:\d+)", grid.title)}
        for row, cells in zip(grid.rows, grid.cells, strict=True):
            for column, cell in zip(grid.columns, cells, strict=True):
                wanted = {d: f"0:{n}" for d, n in enumerate(shape)} | panel
                wanted |= {sides[s]: t for s, t in (("rows", row), ("columns", column)) if t}
                for line in cell.lines:
                    for coord in devices(line, case.mesh):
                        seen[tuple(coord.values())] += 1
                        index = layout.index(shape, case.mesh, coord)
                        assert {d: f"{i.start}:{i.stop}" for d, i in enumerate(index)} == wanted
    assert seen == Counter(tuple(c.values()) for c in case.mesh.coords)


@given(case=cases(count=1, max_ndim=4))
def test_text_and_svg_show_the_same_cells(case: Any) -> None:
    picture = sw.show(case.layouts[0], mesh=case.mesh, shape=tuple(case.value.shape))
    lines = [x for g in grids(picture) for row in g.cells for cell in row for x in cell.lines]
    printed = Counter(re.findall(r"(?:[+;] )?\([\d,|-]+\)", str(picture).split("cells:")[1]))
    assert printed == Counter(lines)
    root = ElementTree.fromstring(picture._repr_html_())
    drawn = Counter(t.text for t in root.iter(f"{SVG}text"))
    assert all(drawn[line] >= count for line, count in Counter(lines).items())


@given(case=cases(count=1, max_ndim=4))
def test_a_device_has_the_colour_of_its_block(case: Any) -> None:
    picture = sw.show(case.layouts[0], mesh=case.mesh, shape=tuple(case.value.shape))
    blocks = {
        tuple(coord.values()): cell.hue
        for grid in grids(picture)
        for row in grid.cells
        for cell in row
        for line in cell.lines
        for coord in devices(line, case.mesh)
    }
    held = {}
    for grid in grids(picture, in_text=False):
        for row, cells in zip(grid.rows, grid.cells, strict=True):
            for column, cell in zip(grid.columns, cells, strict=True):
                words = " ".join((grid.title, row, column))
                coord = {a: int(i) for a, i in re.findall(r"\b([abc]) (\d+)", words)}
                held[tuple(coord[a] for a in case.mesh.axes)] = cell.hue
    assert held == blocks


def test_parts_of_a_sum_are_joined_and_copies_share_a_cell() -> None:
    picture = sw.show("batch seq/j embed {U:i}", mesh=EIGHT, shape=(4, 6, 8))
    (grid,) = grids(picture)
    assert [c.lines for (c,) in grid.cells] == [
        ("(0,0,0-1)", "+ (1,0,0-1)"),
        ("(0,1,0-1)", "+ (1,1,0-1)"),
    ]
    assert "{U:i}: partial sums over i: the value is the sum of 2 parts" in str(picture)
    assert "replicated over k: 2 copies" in str(picture)
    held = [c.lines for c in grids(picture, in_text=False)[1].cells[1]]
    assert held == [("1", "part 1"), ("1", "part 1")]


STATES = {
    "n {R:i,j}": "{R:i,j}: 4 copies over i,j; gradients are parts of a sum",
    "n {V:k}": "{V:k}: each of 2 devices over k holds a value of its own",
    "n @host": "in host memory",
    "n @disk": "on disk",
    "n @i=-1": "only at i -1",
    "n/i/k": "each device holds 3 (3 elements)",
}


@pytest.mark.parametrize("text", STATES)
def test_states_are_said(text: str) -> None:
    assert STATES[text] in str(sw.show(text, mesh=EIGHT, shape=(12,)))


def test_values_of_their_own_are_set_apart_from_parts_of_a_sum() -> None:
    (grid,) = grids(sw.show("n {V:j U:k}", mesh=EIGHT, shape=(12,)))
    assert grid.cells[0][0].lines == ("(0-1,0,0)", "+ (0-1,0,1)", "; (0-1,1,0)", "+ (0-1,1,1)")


def test_a_sub_mesh_holds_and_the_rest_is_empty() -> None:
    picture = sw.show("n/j @i=-1", mesh=EIGHT, shape=(12,))
    assert [c.lines for c in grids(picture)[0].cells[0]] == [("(1,0,0-1)",), ("(1,1,0-1)",)]
    outside, inside = grids(picture, in_text=False)
    assert {c for row in outside.cells for c in row} == {Cell(("-",))}
    assert [c.hue for row in inside.cells for c in row] == [0, 0, 1, 1]


def test_numbers_are_written_as_ranges() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2|5|7-8"


def subjects() -> dict[str, Any]:
    on = mesh(data=2, tensor=2)
    x = sw.shard(values(4, 8), on, "batch/data embed/tensor")
    with sw.record() as plan:
        sw.reshard(x.sum(), "")
    return {
        "tensor": x,
        "scalar": x.sum(),
        "cube": sw.zeros((4, 6, 8, 2), EIGHT, "a/i b/j c/k d"),
        "mesh": EIGHT,
        "tree": {"w": x, "rest": [x.sum(), torch.ones(2), None, 3, x.layout]},
        "strategy": strategies.rows(
            {"w_up": "embed/data ffn/tensor", "*": "..."},
            compute={"w_up": "embed ffn/tensor {R:data}"},
            activations={"hidden": "batch/data seq embed", "ffn": "batch/data seq ffn/tensor"},
        ).replace(save="shard"),
        "plan": plan,
    }


SHOWN = subjects()


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_printed(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"show_{name}", str(sw.show(SHOWN[name])))


@pytest.mark.parametrize("name", SHOWN)
def test_svg_is_xml_inside_its_frame(name: str) -> None:
    root = ElementTree.fromstring(sw.show(SHOWN[name])._repr_html_())
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for shape in root:
        assert 0 <= float(shape.get("x", 0)) <= width
        assert 0 <= float(shape.get("y", 0)) <= height
    for rect in root.iter(f"{SVG}rect"):
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width
        assert float(rect.attrib["y"]) + float(rect.attrib["height"]) <= height


@pytest.mark.parametrize("name", SHOWN)
def test_colour_is_only_added_on_request(name: str) -> None:
    picture = sw.show(SHOWN[name])
    plain, painted = picture.text(), picture.text("ansi")
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", painted) == plain
    has_colour = any(c.hue is not None for g in flat(picture.parts) if isinstance(g, Grid) and g.in_text for r in g.cells for c in r)  # fmt: skip  # noqa: E501
    assert ("\x1b[30;48;2;" in painted) == has_colour


def test_names_are_escaped() -> None:
    name = '<a & "b">\n\x00 \' \ud800'
    picture = sw.show({name: SHOWN["tensor"]})
    assert len(str(picture).splitlines()) == len(str(sw.show({"x": SHOWN["tensor"]})).splitlines())
    root = ElementTree.fromstring(picture._repr_html_())
    assert any('<a & "b">\\n\\x00 \'' in (t.text or "") for t in root.iter(f"{SVG}text"))


@pytest.mark.parametrize("name", SHOWN)
def test_files_hold_what_is_shown(name: str, tmp_path: Path) -> None:
    picture = sw.show(SHOWN[name])
    for suffix in (".svg", ".txt", ".html"):
        picture.save(tmp_path / f"x{suffix}")
    picture.save(str(tmp_path / "y.svg"))
    assert (tmp_path / "x.txt").read_text() == f"{picture}\n"
    assert (tmp_path / "x.svg").read_text() == picture._repr_html_() + "\n"
    assert (tmp_path / "y.svg").read_bytes() == (tmp_path / "x.svg").read_bytes()
    assert picture._repr_html_() in (tmp_path / "x.html").read_text()


def test_png_is_drawn_by_matplotlib(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'train' is not installed")
    picture = sw.show(SHOWN["tensor"])
    picture.save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    root = ElementTree.fromstring(picture._repr_html_())
    size = [int.from_bytes(data[i : i + 4]) for i in (16, 20)]
    for pixels, key in zip(size, ("width", "height"), strict=True):
        assert abs(pixels - 2 * float(root.attrib[key])) <= 2


def test_png_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"shardwise\[train\]"):
        sw.show(EIGHT).save(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'x\.pdf' must end in one of \.svg, \.html, \.txt, \.png"
    ):
        sw.show(EIGHT).save(tmp_path / "x.pdf")


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("n/a", (4096,)),
        ("n/a m/b", (4096, 64)),
        ("n/b m/a k", (64, 4096, 2)),
        ("n/a m/b k/c", (4096, 64, 4)),
    ],
)
def test_large_ones_are_elided_and_say_so(text: str, shape: tuple[int, ...]) -> None:
    on = sw.make_mesh({"a": 1024, "b": 64, "c": 2}, transport="abstract")
    picture = sw.show(text, mesh=on, shape=shape)
    for in_text in (True, False):
        cells = [c for g in grids(picture, in_text) for row in g.cells for c in row]
        shown = [c for c in cells if c.lines != ("\u2026",)]
        assert 8 <= len(shown) <= LIMIT
        if in_text:
            total = on.group_size(tuple(a for axes in sw.Layout(text).dims for a in axes))
            assert f"drawn: {len(shown)} of {total:,} blocks" in str(picture)
            last = [devices(line, on)[0]["a"] for line in shown[-1].lines]
            assert last == [1023]
    assert "drawn: 64 of 131,072 devices" in str(sw.show(on))


def test_many_parts_of_a_sum_are_counted() -> None:
    on = sw.make_mesh({"a": 100}, transport="abstract")
    (grid,) = grids(sw.show("n {U:a}", mesh=on, shape=(3,)))
    lines = grid.cells[0][0].lines
    assert len(lines) == PARTS + 1
    assert lines[-1] == f"\u2026 {100 - PARTS} more"


@pytest.mark.parametrize("axes", MESHES)
def test_a_mesh_shows_the_rank_of_each_coordinate(axes: Any) -> None:
    on = mesh(**axes)
    ranks = [int(c.lines[0]) for g in grids(sw.show(on)) for row in g.cells for c in row]
    assert ranks == list(range(on.size))


def test_a_sub_mesh_shows_the_ranks_of_the_whole() -> None:
    (grid,) = grids(sw.show(EIGHT.at(i=1)))
    assert [[c.lines[0] for c in row] for row in grid.cells] == [["4", "5"], ["6", "7"]]
    assert grid.rows == ("j 0", "j 1")
    assert grid.columns == ("k 0", "k 1")


def test_a_tree_adds_up_bytes() -> None:
    x = SHOWN["tensor"]
    picture = sw.show({"a": x, "b": (x.to(torch.float32), None)})
    (table,) = [p for p in flat(picture.parts) if isinstance(p, Table)]
    assert [row[0] for row in table.rows] == ["a", "b.0", "b.1"]
    assert [row[2] for row in table.rows] == ["64", "32", ""]
    assert "3 leaves, 96 bytes per device (96 B)" in str(picture)


SIZES = {"batch": 8, "seq": 4, "embed": 8, "ffn": 16}


def test_a_strategy_on_a_mesh_shows_each_role() -> None:
    roles = {"w_up": "embed -> ffn", "w_gate": "embed -> ffn", "ffn": "batch seq ffn"}
    picture = sw.show(strategies.tensor_3d(), mesh=EIGHT, sizes=SIZES, roles=roles)
    titles = [p.text for p in flat(picture.parts) if isinstance(p, Lines) and p.strong]
    assert titles == ["mesh(i=2, j=2, k=2)", "w_up, w_gate at rest", "w_up, w_gate at use", "ffn"]
    rest, used, _ = grids(picture)
    assert rest.rows == ("0:2", "2:4", "4:6", "6:8")
    assert rest.cells[1][1].lines == ("(1,1,0)",)
    assert used.cells[0][1].lines == ("(0-1,1,0)",)
    assert "embed 8/k/i  ffn 16/j" in str(picture)


def test_roles_default_to_those_whose_dims_have_sizes() -> None:
    picture = sw.show(strategies.tensor_1d(), mesh=mesh(tensor=2), sizes=SIZES)
    titles = [p.text for p in flat(picture.parts) if isinstance(p, Lines) and p.strong]
    assert "hidden" in titles
    assert any(t.startswith("w_up, w_gate") for t in titles)
    assert "no picture, for want of names or sizes: w_q" in str(picture)


def test_one_axis_strategies_speak_for_open_rows_by_roles() -> None:
    roles = {"w_up": "embed -> ffn", "hidden": "batch seq embed"}
    picture = sw.show(strategies.fsdp(), mesh=mesh(data=4), sizes=SIZES, roles=roles)
    assert [c.lines for (c,) in grids(picture)[0].cells] == [(f"({i})",) for i in range(4)]
    assert "embed 8  ffn 16  {R:data}" in str(picture)


MISTAKES: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
    "int has no picture; it shows: a tensor, a layout": (TypeError, lambda: sw.show(3)),
    "a tree of tensors, a plan": (TypeError, lambda: sw.show(object())),
    "the tree is a|w is a object, not a tensor": (TypeError, lambda: sw.show({"w": object()})),
    "'n/i' alone has no sizes": (TypeError, lambda: sw.show("n/i")),
    "needs sizes=": (TypeError, lambda: sw.show(strategies.data(), mesh=EIGHT)),
    "need a mesh": (TypeError, lambda: sw.show(strategies.data(), sizes=SIZES)),
    r"a mesh takes no 'mesh' \(known: none\)": (TypeError, lambda: sw.show(EIGHT, mesh=EIGHT)),
    "a layout takes no 'shap'; did you mean 'shape'": (
        TypeError,
        lambda: sw.show("n", mesh=EIGHT, shap=(3,)),
    ),
    "not divisible by axis 'i'": (sw.LayoutError, lambda: sw.show("n/i", mesh=EIGHT, shape=(3,))),
    "speaks of 1 dims": (sw.LayoutError, lambda: sw.show("n", mesh=EIGHT, shape=(3, 3))),
    "unknown axis 'x'": (sw.MeshError, lambda: sw.show("n/x", mesh=EIGHT, shape=(4,))),
    "w: no size for dim 'z'": (
        sw.LayoutError,
        lambda: sw.show(strategies.data("i"), mesh=EIGHT, sizes=SIZES, roles={"w": "z -> ffn"}),
    ),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_named(words: str) -> None:
    error, call = MISTAKES[words]
    with pytest.raises(error, match=words):
        call()


def test_a_tensor_shows_itself_in_a_notebook() -> None:
    x = SHOWN["tensor"]
    assert x._repr_html_() == sw.show(x)._repr_html_()
    assert repr(sw.show(x)) == str(sw.show(x))


def test_a_picture_is_a_value() -> None:
    picture = sw.show(EIGHT)
    assert picture == sw.show(EIGHT)
    assert hash(picture) == hash(sw.show(EIGHT))
    with pytest.raises(dataclasses.FrozenInstanceError):
        picture.parts = ()  # pyright: ignore


def test_rooms_above_register_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        pass

    monkeypatch.setattr("shardwise.layouts.show._DRAWERS", {})

    def bars(x: Clock, hour: int = 0) -> tuple[Bars, ...]:
        return (Bars(("hour",), (hour,), (str(hour),)),)

    register(Clock, "a clock", bars, ("hour",))
    assert str(sw.show(Clock(), hour=3)).endswith(" 3")
    with pytest.raises(TypeError, match="it shows: a clock"):
        sw.show(3)


def test_names_of_dims_come_from_the_string() -> None:
    text = str(sw.show("batch/i ... _ vocab/j", mesh=EIGHT, shape=(2, 3, 4, 6)))
    assert text.startswith("batch 2/i  dim 1 3  dim 2 4  vocab 6/j  on mesh")
    layout = make((("i",), ()))
    assert str(sw.show(layout, mesh=EIGHT, shape=(2, 3))).startswith("dim 0 2/i  dim 1 3  on")


def test_pictures_of_the_documentation_are_those_of_the_presets() -> None:
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.pictures()
    assert {p.name for p in (DOCS / "pictures").iterdir()} == set(made)
    for name, picture in made.items():
        written = (DOCS / "pictures" / name).read_text()
        assert written == picture._repr_html_() + "\n", "run docs/pictures.py"
