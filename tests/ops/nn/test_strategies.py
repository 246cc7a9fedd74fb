"""Strategies: rows join by name, tables are refused or left whole before anything runs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import shardwise as sw
from shardwise import nn, strategies
from shardwise.layouts.rows import ROLES, is_pattern


@pytest.mark.parametrize(
    ("strategy", "role", "rest", "compute"),
    [
        (strategies.data(), "w_up", "...", "... {R:data}"),
        (strategies.fsdp(), "w_up", ".../data", "... {R:data}"),
        (strategies.tensor_1d(), "w_up", "embed ffn/tensor", "embed ffn/tensor"),
        (
            strategies.data() * strategies.tensor_1d(),
            "w_o",
            "heads/tensor head_dim embed",
            "heads/tensor head_dim embed {R:data}",
        ),
        (
            strategies.fsdp() * strategies.tensor_1d(),
            "w_down",
            "ffn/tensor embed .../data",
            "ffn/tensor embed {R:data}",
        ),
        (strategies.tensor_1d(), "q_norm", "head_dim", "head_dim {R:tensor}"),
        (strategies.tensor_1d(), "attn_norm", "embed", "embed"),
        (
            strategies.tensor_1d(kv="replicate"),
            "w_k",
            "embed kv_heads head_dim",
            "embed kv_heads head_dim {R:tensor}",
        ),
    ],
)
def test_rows(strategy: sw.Strategy, role: str, rest: str, compute: str) -> None:
    assert strategy.rest_row(role) == rest
    assert strategy.compute_row(role) == compute


def test_activations_join_the_batch_axes_in_order() -> None:
    s = strategies.data() * strategies.data("depth") * strategies.tensor_1d()
    assert s["ffn"] == "batch/data/depth seq ffn/tensor"
    assert s["block_in"] == "batch/data/depth seq embed {R:tensor}"
    assert s["expert_in"] == "expert slot/data/depth embed {R:tensor}"


@pytest.mark.parametrize(
    ("row", "shape", "expected"),
    [
        ("ffn/tensor embed .../data", (8, 6), "_/tensor/data _"),
        ("ffn/tensor embed .../data", (2, 6), "_/tensor _/data"),
        (".../data", (3, 6), "_ _/data"),
    ],
)
def test_the_first_dim_that_divides_is_cut(row: str, shape: tuple[int, int], expected: str) -> None:
    mesh = sw.make_mesh({"data": 2, "tensor": 2})
    s = strategies.rows({"w": row})
    layout = s.layouts({"w": nn.Param(f"{shape[0]} {shape[1]}")}, {}, mesh)["w"]
    assert str(layout) == expected


def test_what_no_dim_lets_be_cut_stays_whole_and_is_reported() -> None:
    mesh = sw.make_mesh({"data": 4})
    declaration = {"a": nn.Param("3 8"), "b": nn.Param("3 5")}
    with pytest.warns(UserWarning, match=r"left whole.*: b \(60 bytes\)"):
        params = nn.init(sw.random.key(0), declaration, {}, mesh, strategies.fsdp())
    assert str(params["a"].layout) == "_ _/data"
    assert str(params["b"].layout) == "_ _"
    w = sw.value_and_grad(lambda p: (strategies.fsdp().use(p)["b"] ** 2).sum())(params)[1]["b"]
    torch.testing.assert_close(w.full_tensor(), 2 * params["b"].full_tensor())


def test_all_rows_that_do_not_fit_are_listed_by_path() -> None:
    mesh = sw.make_mesh({"tensor": 4})
    declaration = {"x": {"w_up": nn.Param("embed -> ffn")}, "w_down": nn.Param("ffn -> embed")}
    with pytest.raises(sw.LayoutError) as error:
        strategies.tensor_1d().layouts(declaration, {"embed": 4, "ffn": 6}, mesh)
    text = "of size 6 is not divisible by 4 ('tensor'); pad it: pad.ffn = 4"
    assert f"x.w_up: rest row of w_up: dim 'ffn' {text}" in str(error.value)
    assert f"w_down: rest row of w_down: dim 'ffn' {text}" in str(error.value)


MISTAKES = {
    "did you mean 'hidden'": lambda: strategies.tensor_1d()["hiden"],
    "option save = 'disk'": lambda: strategies.data().replace(save="disk"),
    "did you mean 'layer'": lambda: strategies.data().option("layers"),
    "put axis 'x' on two dims": lambda: strategies.fsdp("x") * strategies.tensor_1d("x"),
    "is no dim": lambda: sw.Strategy({"w": "a//b"}),
    "kv = 'x'.*known: 'cut', 'replicate'": lambda: strategies.tensor_1d(kv="x"),  # pyright: ignore
    "data: '' is no name": lambda: strategies.data(""),
    "data: 'a/b' is no name": lambda: strategies.data("a/b"),
    "data: 3 is no name": lambda: strategies.data(3),  # pyright: ignore
    "tensor_3d: axes 'i', 'j', 'i' must differ": lambda: strategies.tensor_3d(k="i"),
    "precision: compute = torch.int8": lambda: sw.Precision(compute=torch.int8),
    "matches two patterns": lambda: strategies.rows({"*_a": "x", "w_*": "y"}).rest_row("w_a"),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_named(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MISTAKES[words]()


def test_toml_round_trip_and_table() -> None:
    s = (strategies.fsdp() * strategies.tensor_1d()).replace(
        rest={"special": "a b/tensor", 'a "role" \\': "a"},
        precision=sw.Precision(torch.bfloat16),
        recompute="cheap",
    )
    assert strategies.from_toml(s.to_toml()) == s
    mesh = sw.make_mesh({"data": 2, "tensor": 2})
    s = (strategies.fsdp() * strategies.tensor_1d()).replace(precision=s.precision)
    quick = s.replace(precision=sw.Precision(fp8=True))
    assert "fp8 = true" in quick.to_toml()
    assert strategies.from_toml(quick.to_toml()) == quick != s
    assert "fp8" not in s.to_toml()
    assert "fp8" in str(sw.show(quick))
    shown = str(s.table({"w_up": nn.Param("embed -> ffn")}, {"embed": 8, "ffn": 8}, mesh))
    assert "w_up       [8/data 8/tensor]  embed ffn/tensor {R:data}  32" in shown
    assert "embed ffn/tensor {R:data}" in str(s)


MISTYPED: dict[str, Any] = {
    "unsupported operand": lambda: strategies.data() * 3,  # pyright: ignore
    "matmul.* = 3; expected strings": lambda: strategies.data().replace(matmul=3),  # pyright: ignore
    "rest = 3; expected a table": lambda: strategies.data().replace(rest=3),  # pyright: ignore
    "fp8 = 'yes'; expected True or False": lambda: sw.Precision(fp8="yes"),  # pyright: ignore
    "precision = 'bf16'": lambda: strategies.data().replace(precision="bf16"),  # pyright: ignore
}


@pytest.mark.parametrize("words", MISTYPED)
def test_values_of_a_wrong_type_are_named(words: str) -> None:
    with pytest.raises(TypeError, match=words):
        MISTYPED[words]()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[precision]\ncompute = "bf16"', "compute = 'bf16'.*'bfloat16'"),
        ('[precision]\ncompute = "nn"', "compute = 'nn'"),
        ('[precision]\ncompute = "int8"', "compute = 'int8'"),
        ("[precision]\ncompute = 3", "compute = 3"),
        ("[precision]\nfp8 = 1", "fp8 = 1; expected true or false"),
        ('[precision]\ncomputes = "float32"', "unknown key 'computes'; did you mean 'compute'"),
        ("[strategy]\nsave = 1", "'save' = 1; expected strings"),
        ("[strategy]\nrest = 3", "rest = 3; expected a table"),
        ("[strategy.rest]\nw = 3", "'w' = 3; expected strings"),
        ("strategy = 3", r"expected the table \[strategy\]"),
        ("[strategy]\nequal = 3", "equal = 3"),
        ('[strategy]\nequal = [["a"]]', "groups of 2 or 3"),
        ("[strategies]", "unknown table 'strategies'; did you mean 'strategy'"),
    ],
)
def test_a_file_with_mistakes_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        strategies.from_toml(text)


def test_a_strategy_can_be_copied_sent_and_hashed() -> None:
    s = strategies.fsdp() * strategies.tensor_2d()
    for other in (copy.deepcopy(s), pickle.loads(pickle.dumps(s))):
        assert other == s
        assert hash(other) == hash(s)
    assert len({s, copy.copy(s), strategies.data()}) == 2
    with pytest.raises(TypeError, match="item assignment"):
        s.rest["w_up"] = "..."  # pyright: ignore


UP = {"w_up": nn.Param("embed -> ffn"), "attn_norm": nn.Param("embed")}
SIZES = {"embed": 8, "ffn": 8, "heads": 2}


@pytest.mark.parametrize("table", ["rest", "compute"])
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("embd ffn/tensor", "says 'embd' where the parameter has 'embed'; did you mean 'embed'"),
        ("ffn/tensor embed", r"says 'ffn' where the parameter has 'embed' \(embed ffn\)"),
        ("... embed/tensor", "says 'embed' where the parameter has 'ffn'"),
    ],
)
def test_rows_that_name_other_dims_are_refused(table: Any, row: str, words: str) -> None:
    changes: Any = {table: {"w_up": row}}
    s = strategies.tensor_1d().replace(**changes)
    with pytest.raises(sw.LayoutError, match=f"w_up: {table} row of w_up: '{row}' {words}"):
        s.layouts(UP, SIZES, sw.make_mesh({"tensor": 2}))


@pytest.mark.parametrize("row", ["_ ffn/tensor", "... ffn/tensor", "embed/tensor ...", "8 8"])
def test_free_names_are_free(row: str) -> None:
    s = strategies.tensor_1d().replace(rest={"w_up": row})
    s.layouts(UP, SIZES, sw.make_mesh({"tensor": 2}))


def test_a_role_that_nothing_has_is_told() -> None:
    mesh = sw.make_mesh({"tensor": 2})
    s = strategies.tensor_1d().replace(rest={"w_upp": "embed/tensor ffn"})
    with pytest.warns(UserWarning, match="rest row of 'w_upp'.*did you mean 'w_up'"):
        s.layouts(UP, SIZES, mesh)
    for preset in (*PRESETS.values(), strategies.sequence_parallel(kv="replicate")):
        assert not {r for r in preset.rest if not is_pattern(r)} - ROLES


def test_whole_keys_are_offered_where_their_heads_do_not_divide() -> None:
    mesh = sw.make_mesh({"tensor": 4})
    declared = {"w_k": nn.Param("embed -> kv_heads head_dim")}
    sizes = {"embed": 4, "heads": 6, "kv_heads": 1, "head_dim": 4}
    s = strategies.tensor_1d()
    words = """dim 'kv_heads' of size 1 .*kv="replicate".*pad.kv_heads = 4"""
    with pytest.raises(sw.LayoutError, match=words):
        s.layouts(declared, sizes, mesh)
    with pytest.raises(sw.LayoutError, match=words) as caught:
        s.check(sizes, mesh)
    assert "pad.kv_heads = 4, which pads heads along" in str(caught.value)


PRESETS = {
    "data": strategies.data(),
    "fsdp": strategies.fsdp(),
    "1d": strategies.tensor_1d(),
    "1d whole kv": strategies.tensor_1d(kv="replicate"),
    "sequence": strategies.sequence_parallel(),
    "2d": strategies.tensor_2d(),
    "2d direct": strategies.tensor_2d(method="direct"),
    "2.5d": strategies.tensor_2p5d(),
    "3d": strategies.tensor_3d(),
    "3d whole kv": strategies.tensor_3d(kv="replicate"),
    "fsdp x 3d": strategies.fsdp() * strategies.tensor_3d(),
    "1d inside 2.5d's depth": strategies.tensor_1d("depth") * strategies.tensor_2d(),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_strategy_is_saved_as_toml_and_read_back(name: str) -> None:
    strategy = PRESETS[name]
    assert strategies.from_toml(strategy.to_toml()) == strategy


@pytest.mark.parametrize(
    ("name", "axes", "sizes", "text"),
    [
        (
            "2d",
            {"row": 2, "col": 4},
            {},
            "axes 'row', 'col' are the sides of a square, so they must be of one size; "
            "mesh(row=2, col=4) has 2, 4",
        ),
        (
            "3d",
            {"i": 2, "j": 2, "k": 4},
            {},
            "axes 'i', 'j', 'k' are the sides of a cube, so they must be of one size; "
            "mesh(i=2, j=2, k=4) has 2, 2, 4",
        ),
        (
            "3d",
            {"i": 2, "j": 2, "k": 2},
            {"batch": 6},
            "dim 'batch' of size 6 (tokens, images, labels and 1 more) is not "
            "divisible by 4 ('i/j')",
        ),
        (
            "sequence",
            {"tensor": 4},
            {"seq": 10},
            "dim 'seq' of size 10 (hidden) is not divisible by 4 ('tensor')",
        ),
        (
            "2d",
            {"row": 3, "col": 3},
            {"heads": 8, "vocab": 50257},
            "dim 'heads' of size 8 (heads, attended) is not divisible by 3 ('col'); "
            "pad it: pad.heads = 3\n"
            "dim 'vocab' of size 50257 (logits) is not divisible by 3 ('col'); "
            "pad it: pad.vocab = 3",
        ),
        (
            "2.5d",
            {"depth": 2, "row": 2, "col": 2},
            {"embed": 9, "batch": 2},
            "dim 'batch' of size 2 (tokens, images, labels and 7 more) is not divisible by 4 "
            "('depth/row')\n"
            "dim 'embed' of size 9 (hidden, block_in) is not divisible by 2 ('col')",
        ),
    ],
)
def test_what_cannot_run_is_refused_first(
    name: str, axes: dict[str, int], sizes: dict[str, int], text: str
) -> None:
    mesh = sw.make_mesh(axes, transport="abstract")
    with pytest.raises(sw.LayoutError) as caught:
        PRESETS[name].check(sizes, mesh)
    assert text in str(caught.value)


def test_a_missing_axis_is_refused_with_the_nearest_name() -> None:
    mesh = sw.make_mesh({"rows": 2, "col": 2}, transport="abstract")
    with pytest.raises(sw.MeshError, match="rows"):
        strategies.tensor_2d().check({}, mesh)


def test_unequal_sides_are_refused_where_parameters_are_laid_out() -> None:
    mesh = sw.make_mesh({"row": 2, "col": 4})
    with pytest.raises(sw.LayoutError, match="sides of a square"):
        nn.init(
            sw.random.key(0),
            {"w_up": nn.Param("embed -> ffn")},
            {"embed": 8, "ffn": 8},
            mesh,
            strategies.tensor_2d(),
        )
