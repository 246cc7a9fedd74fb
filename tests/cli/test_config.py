"""The configuration reader: what it accepts, and the exact words for what it does not."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import pytest

from shardwise.cli.build import build_strategy
from shardwise.cli.config import LATER, Config, ConfigError, Preset, StrategyTable, read_config
from shardwise.cli.reader import Check, Known, Rest, Rules, read_toml
from shardwise.layouts.strategy import OPTIONS
from shardwise.models import GPT2Config

EXAMPLE = Path(__file__).parents[2] / "examples" / "gpt_text.toml"
PRESETS = ("data", "fsdp", "tensor_1d", "tensor_3d")

GOOD = """\
[run]
steps = 100

[mesh]
data = 2
tensor = -1

[strategy]
preset = ["data", "tensor_1d"]

[model]
family = "tiny"
embed = 8

[data]
text = "plays.txt"
seq = 16
batch = 4

[optimizer]
lr = 1
"""


@dataclass(frozen=True)
class Tiny:
    embed: int
    vocab: int
    heads: int = 2
    dropout: float = 0.0
    tied: bool = True
    sizes: tuple[int, ...] = ()
    names: Mapping[str, int] = field(default_factory=dict)
    pad: Mapping[str, int] = field(default_factory=dict)


def read(folder: Path, text: str, *overrides: str) -> Config:
    (folder / "plays.txt").write_text("to be")
    path = folder / "job.toml"
    path.write_text(text)
    return read_config(
        path, families={"tiny": Tiny}, presets=PRESETS, derived=("vocab",), overrides=overrides
    )


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        read(folder, text, *overrides)
    assert str(error.value) == "\n".join(error.value.problems)
    return [line.replace(str(folder) + "/", "") for line in error.value.problems]


def with_line(text: str, table: str, line: str) -> str:
    """`text` with one more line at the head of a table."""
    return text.replace(f"[{table}]\n", f"[{table}]\n{line}\n")


def test_defaults_are_those_of_the_tables(tmp_path: Path) -> None:
    config = read(tmp_path, GOOD)
    assert config.run.steps == 100
    assert (config.run.seed, config.run.out, config.run.device) == (0, "runs/job", "auto")
    assert (config.run.log_every, config.run.eval_every, config.run.check) == (10, 200, False)
    assert config.mesh.axes == {"data": 2, "tensor": -1}
    assert list(config.mesh.axes) == ["data", "tensor"]
    assert config.strategy.preset == (Preset("data"), Preset("tensor_1d"))
    assert config.strategy.rest == {}
    assert config.precision.param == "float32"
    assert (config.model.family, config.model.fields) == ("tiny", {"embed": 8})
    assert config.data.text == tmp_path / "plays.txt"
    assert (config.data.tokenizer, config.data.split, config.data.micro_batches) == (
        "bytes",
        0.9,
        1,
    )
    assert (config.optimizer.name, config.optimizer.schedule) == ("adamw", "cosine")
    assert config.optimizer.decay is None
    assert config.optimizer.clip_norm is None


def test_a_number_may_be_written_as_an_integer(tmp_path: Path) -> None:
    assert type(read(tmp_path, GOOD).optimizer.lr) is float


def test_a_config_cannot_be_changed(tmp_path: Path) -> None:
    config = read(tmp_path, GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.steps = 3  # type: ignore[misc]


def test_all_kinds_of_values_are_read(tmp_path: Path) -> None:
    text = with_line(GOOD, "model", "sizes = [1, 2]\nnames.a = 1\ntied = false\ndropout = 1")
    text = with_line(
        text, "strategy", 'rest."w_*" = "embed/data ..."\nactivations = { ffn = "..." }'
    )
    config = read(tmp_path, text)
    assert config.model.fields == {
        "sizes": (1, 2),
        "names": {"a": 1},
        "tied": False,
        "dropout": 1.0,
        "embed": 8,
    }
    assert config.strategy.rest == {"w_*": "embed/data ..."}
    assert config.strategy.activations == {"ffn": "..."}


def test_the_familys_own_checks_are_asked(tmp_path: Path) -> None:
    (tmp_path / "plays.txt").write_text("x")
    path = tmp_path / "job.toml"
    path.write_text(GOOD.replace('"tiny"', '"gpt2"'))
    with pytest.raises(ConfigError) as error:
        read_config(
            path, families={"gpt2": GPT2Config}, presets=PRESETS, overrides=["model.heads=3"]
        )
    assert error.value.problems == (f"{path}:11: model: embed 8 is not a multiple of heads 3",)


def test_options_not_given_are_left_to_the_presets(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD).strategy.options == {}
    text = with_line(GOOD, "strategy", 'save = "shard"\nrecompute = "cheap"')
    assert read(tmp_path, text).strategy.options == {"save": "shard", "recompute": "cheap"}


def test_every_option_of_a_strategy_is_a_key() -> None:
    keys = {key.name for key in dataclasses.fields(StrategyTable)}
    later = {name.removeprefix("strategy.") for name in LATER}
    assert set(OPTIONS) - {"saved"} <= keys | later  # which memory.activations sets


def test_presets_take_their_axes_in_brackets(tmp_path: Path) -> None:
    text = GOOD.replace('"data", "tensor_1d"', '"data ( depth )", "tensor_3d(a, b, c)"')
    assert read(tmp_path, text).strategy.preset == (
        Preset("data", ("depth",)),
        Preset("tensor_3d", ("a", "b", "c")),
    )


def test_shipped_example_is_valid() -> None:
    config = read_config(EXAMPLE, families={"gpt2": GPT2Config}, presets=("data", "tensor_1d"))
    assert config.run.out == "runs/gpt_text"
    assert config.data.text.is_dir()
    assert set(config.strategy.preset) <= {
        Preset("data"),
        Preset("data", ("depth",)),
        Preset("tensor_1d"),
    }
    GPT2Config(**config.model.fields)


@pytest.mark.parametrize(
    ("table", "line", "words"),
    [
        # unknown keys and tables
        (
            "run",
            "step = 3",
            "job.toml:2: run.step: unknown key; did you mean 'steps'? (known: 'steps', 'seed', "
            "'out', 'log_every', 'eval_every', 'device', 'check', 'jit')",
        ),
        (
            "",
            "[percision]",
            "job.toml:1: percision: unknown table; did you mean 'precision'? (known: 'run', "
            "'mesh', 'strategy', 'precision', 'model', 'data', 'optimizer', 'zero', 'memory', "
            "'checkpoint')",
        ),
        (
            "model",
            "emebd = 3",
            "job.toml:12: model.emebd: unknown key; did you mean 'embed'? (known: 'embed', "
            "'vocab', 'heads', 'dropout', 'tied', 'sizes', 'names', 'pad')",
        ),
        # names
        (
            "strategy",
            'save = "gather"',
            "job.toml:9: strategy.save: unknown value 'gather'; did you mean 'gathered'? "
            "(known: 'gathered', 'shard')",
        ),
        (
            "optimizer",
            'schedule = "cosin"',
            "job.toml:21: optimizer.schedule: unknown value 'cosin'; did you mean 'cosine'? "
            "(known: 'constant', 'linear', 'cosine', 'polynomial', 'wsd', 'piecewise', 'join')",
        ),
        # types
        (
            "run",
            'seed = "0"',
            'job.toml:2: run.seed: expected an integer of at least 0, below 2**63, found "0" '
            "(a string)",
        ),
        ("run", "check = 1", "job.toml:2: run.check: expected a boolean, found 1 (an integer)"),
        (
            "run",
            "log_every = true",
            "job.toml:2: run.log_every: expected an integer of at least 1, found true (a boolean)",
        ),
        (
            "run",
            "log_every = 2.0",
            "job.toml:2: run.log_every: expected an integer of at least 1, found 2.0 (a number)",
        ),
        (
            "run",
            "out = [1, {a = 'b'}]",
            'job.toml:2: run.out: expected a string, found [1, {a = "b"}] (an array)',
        ),
        (
            "strategy",
            'rest = "embed"',
            'job.toml:9: strategy.rest: expected a table, found "embed" (a string)',
        ),
        (
            "data",
            "tokenizer = 1979-05-27",
            'job.toml:16: data.tokenizer: expected "bytes", found 1979-05-27',
        ),
        (
            "model",
            "dropout = nan",
            "job.toml:12: model.dropout: expected a number, found nan (a number)",
        ),
        (
            "model",
            "sizes = [1, 'x']",
            'job.toml:12: model.sizes: expected an integer, found "x" (a string)',
        ),
        (
            "model",
            "names = { a = 'x' }",
            'job.toml:12: model.names.a: expected an integer, found "x" (a string)',
        ),
        # values
        (
            "run",
            "eval_every = 0",
            "job.toml:2: run.eval_every: expected an integer of at least 1, found 0",
        ),
        (
            "run",
            'device = "gpu"',
            'job.toml:2: run.device: expected "auto", "cpu", "cuda" or "cuda:N", found "gpu"',
        ),
        (
            "mesh",
            "depth = 0",
            "job.toml:5: mesh.depth: expected a size of at least 1, or -1 for what is left, "
            "found 0",
        ),
        (
            "mesh",
            "depth = -1",
            "job.toml:4: mesh: expected one axis or more, at most one of them -1, "
            "found {depth = -1, data = 2, tensor = -1}",
        ),
        (
            "mesh",
            '"a b" = 2',
            'job.toml:5: mesh."a b": expected the name of an axis, found "a b"',
        ),
        (
            "data",
            "split = 1",
            "job.toml:16: data.split: expected a number between 0 and 1, found 1.0",
        ),
        (
            "optimizer",
            "b1 = 1.0",
            "job.toml:21: optimizer.b1: expected a number of at least 0, below 1, found 1.0",
        ),
        (
            "strategy",
            'compute.w_up = "embed ffn//x"',
            "job.toml:9: strategy.compute.w_up: layout 'embed ffn//x': 'ffn//x' is no dim; "
            "write name, name/axis or ...",
        ),
        # between keys
        (
            "data",
            "micro_batches = 3",
            "job.toml:19: data.batch: 4 is no multiple of data.micro_batches, 3",
        ),
        # not yet
        ("strategy", 'layer = "pipe"', "job.toml:9: strategy.layer: not supported by this version"),
        (
            "model",
            "pad.vocab = 0",
            "job.toml:12: model.pad.vocab: expected an integer of at least 1, found 0",
        ),
        (
            "model",
            'load = "."',
            "job.toml:11: model: name a family to start from nothing, or a folder to load, "
            "not both",
        ),
        (
            "",
            "[pipeline]\nchunks = 2",
            "job.toml:1: pipeline: not supported by this version",
        ),
    ],
)
def test_one_problem_in_words(tmp_path: Path, table: str, line: str, words: str) -> None:
    text = with_line(GOOD, table, line) if table else line + "\n" + GOOD
    assert problems(tmp_path, text) == [words]


@pytest.mark.parametrize(
    ("presets", "words"),
    [
        (
            '"data", "tenosr_1d"',
            "unknown value 'tenosr_1d'; did you mean 'tensor_1d'? "
            "(known: 'data', 'fsdp', 'tensor_1d', 'tensor_3d')",
        ),
        ('"data("', "'data(' is no preset; write name or name(axis, ..., option=value)"),
        ('"data()"', "'data()' is no preset; write name or name(axis, ..., option=value)"),
        ('"data(a b)"', "'data(a b)' is no preset; write name or name(axis, ..., option=value)"),
        ("3", "expected a string, found 3 (an integer)"),
        ("{ name = 'data' }", 'expected a string, found {name = "data"} (a table)'),
    ],
)
def test_a_bad_preset_in_words(tmp_path: Path, presets: str, words: str) -> None:
    text = GOOD.replace('"data", "tensor_1d"', presets)
    assert problems(tmp_path, text) == [f"job.toml:9: strategy.preset: {words}"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("steps = 100", "job.toml:1: run.steps: missing; expected an integer of at least 1"),
        (
            'family = "tiny"',
            "job.toml:13: model.embed: depends on model.family, which is missing",
        ),
        ("embed = 8", "job.toml:11: model.embed: missing; expected an integer"),
        ('text = "plays.txt"', "job.toml:15: data.text: missing; expected a path"),
        ("lr = 1", "job.toml:20: optimizer.lr: missing; expected a number above 0"),
        (
            "data = 2\ntensor = -1",
            "job.toml:4: mesh: expected one axis or more, at most one of them -1, found {}",
        ),
        ("[optimizer]\nlr = 1\n", "job.toml: optimizer.lr: missing; expected a number above 0"),
    ],
)
def test_a_missing_key_in_words(tmp_path: Path, line: str, words: str) -> None:
    assert line in GOOD
    assert problems(tmp_path, GOOD.replace(line, "#" * line.count("\n"))) == [words]


def test_all_problems_come_together_in_order_of_lines(tmp_path: Path) -> None:
    text = """\
[optimizer]
lr = "fast"

[run]
stesp = 3
seed = -1

# a comment with "quotes" and [brackets]
[mesh]
data = [
  1, # a comment
  2,
]
tensor = 1.5
[strategy]
preset = [
  "data",
  "model",
]
activations = { ffn = "a a/x b/x", "b c" = \"\"\"
[run]
\"\"\" }
[model]
family = "big"
anything = 1
[data]
text = "nothing.txt"
seq = 0
"""
    assert problems(tmp_path, text) == [
        'job.toml:2: optimizer.lr: expected a number above 0, found "fast" (a string)',
        "job.toml:4: run.steps: missing; expected an integer of at least 1",
        "job.toml:5: run.stesp: unknown key; did you mean 'steps'? (known: 'steps', 'seed', "
        "'out', 'log_every', 'eval_every', 'device', 'check', 'jit')",
        "job.toml:6: run.seed: expected an integer of at least 0, below 2**63, found -1",
        "job.toml:10: mesh.data: expected a size of at least 1, or -1 for what is left, "
        "found [1, 2] (an array)",
        "job.toml:14: mesh.tensor: expected a size of at least 1, or -1 for what is left, "
        "found 1.5 (a number)",
        "job.toml:16: strategy.preset: unknown value 'model' "
        "(known: 'data', 'fsdp', 'tensor_1d', 'tensor_3d')",
        "job.toml:20: strategy.activations.ffn: layout 'a a/x b/x': axis 'x' is used twice, "
        "by dims 1 and 2",
        "job.toml:20: strategy.activations.\"b c\": layout '[run]\\n': '[run]' is no dim; "
        "write name, name/axis or ...",
        "job.toml:24: model.family: unknown value 'big' (known: 'tiny')",
        "job.toml:26: data.batch: missing; expected an integer of at least 1",
        "job.toml:27: data.text: no such file or folder: nothing.txt",
        "job.toml:28: data.seq: expected an integer of at least 1, found 0",
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[run]\nsteps = = 3\n", "job.toml:2: not TOML: Invalid value, column 9"),
        (
            b"[run]\n\nsteps = 3\nsteps = 4\n",
            "job.toml:4: not TOML: Cannot overwrite a value, column 10",
        ),
        (b"[run]\nout = [1,\n\n", "job.toml:2: not TOML: Invalid value at the end"),
        (b"[run]\nout = '\xff'\n", "job.toml: not UTF-8: invalid start byte at byte 13"),
    ],
)
def test_a_broken_file_in_words(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_config(path, families={}, presets=())
    assert str(error.value).replace(f"{tmp_path}/", "") == words


def test_a_file_that_is_not_there_in_words(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path / "no.toml", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(ConfigError) as error:
            read_config(path, families={}, presets=())
        assert error.value.problems == (f"{path}: {why}",)


def test_windows_line_ends_do_not_shift_lines(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(b"[mesh]\r\na = [\r\n1]\r\nb = 0\r\n")
    with pytest.raises(ConfigError, match=r"job\.toml:4: mesh\.b: expected a size"):
        read_config(path, families={}, presets=())


def test_overrides_win_and_come_in_order(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        GOOD,
        "run.steps=7",
        "run.steps = 8",
        "run.out = somewhere else",
        'mesh.depth="x"',
        "mesh={ only = 4 }",
        "strategy.preset=['fsdp']",
        'strategy.rest."w_*"=embed/data ...',
        "optimizer.lr=1e-3",
        "precision.param=bfloat16",
    )
    assert config.run.steps == 8
    assert config.run.out == "somewhere else"
    assert config.mesh.axes == {"only": 4}
    assert config.strategy.preset == (Preset("fsdp"),)
    assert config.strategy.rest == {"w_*": "embed/data ..."}
    assert config.optimizer.lr == 1e-3
    assert config.precision.param == "bfloat16"


def test_fp8_is_of_the_strategy_and_needs_direct_products(tmp_path: Path) -> None:
    assert not build_strategy(read(tmp_path, GOOD)).precision.fp8
    assert build_strategy(read(tmp_path, GOOD, "precision.fp8=true")).precision.fp8
    config = read(tmp_path, GOOD, "precision.fp8=true", "strategy.matmul=ring")
    with pytest.raises(ValueError, match="fp8: needs strategy"):
        build_strategy(config)


def test_a_path_in_an_override_is_relative_to_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "other.txt").write_text("x")
    monkeypatch.chdir(tmp_path / "here")
    assert read(tmp_path, GOOD, "data.text=other.txt").data.text == Path("other.txt")
    assert problems(tmp_path, GOOD, "data.text=plays.txt") == [
        "--set data.text=plays.txt: data.text: no such file or folder: plays.txt"
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.steps=x", 'run.steps: expected an integer of at least 1, found "x" (a string)'),
        (
            "run.steps=1\nrun.seed=2",
            'run.steps: expected an integer of at least 1, found "1\\nrun.seed=2" (a string)',
        ),
        ("run.steps", "expected table.key=value"),
        ("=3", "expected table.key=value"),
        ("run..steps=3", "expected table.key=value"),
        ("run.steps.x=3", "run.steps is no table"),
        ("run.out.x=3", "run.out: expected a string, found {x = 3} (a table)"),
        ("run=3", "run: expected a table, found 3 (an integer)"),
        (
            "mesh.data=0",
            "mesh.data: expected a size of at least 1, or -1 for what is left, found 0",
        ),
        (
            "model.heds=1",
            "model.heds: unknown key; did you mean 'heads'? (known: 'embed', 'vocab', "
            "'heads', 'dropout', 'tied', 'sizes', 'names', 'pad')",
        ),
        ("pipeline.chunks=1", "pipeline: not supported by this version"),
    ],
)
def test_a_bad_override_in_words(tmp_path: Path, override: str, words: str) -> None:
    assert problems(tmp_path, GOOD, override) == [f"--set {override}: {words}"]


def test_problems_of_overrides_follow_those_of_the_file(tmp_path: Path) -> None:
    found = problems(tmp_path, with_line(GOOD, "data", "x = 1"), "run.b=1", "run.a=2", "run.c")
    assert [line.split(": ")[0] for line in found] == [
        "job.toml:16",
        "--set run.b=1",
        "--set run.a=2",
        "--set run.c",
    ]


@pytest.mark.parametrize("name", sorted(LATER))
def test_what_comes_later_is_refused_and_not_skipped(tmp_path: Path, name: str) -> None:
    override = f"{name}=1" if "." in name else f"{name}={{}}"
    assert problems(tmp_path, GOOD, override) == [
        f"--set {override}: {name}: not supported by this version"
    ]


def test_no_key_is_both_read_and_refused() -> None:
    hints = {
        name: next((t for t in get_args(hint) if t is not type(None)), hint)
        for name, hint in get_type_hints(Config).items()
    }
    read = {f"{table}.{key.name}" for table in hints for key in dataclasses.fields(hints[table])}
    assert len(read) > 30
    assert not LATER & (read | set(hints))


@dataclass(frozen=True)
class Inner:
    name: Annotated[str, Known("names")]


@dataclass(frozen=True)
class Top:
    size: Annotated[int, Check("an odd number", lambda n: n % 2)]
    inner: Inner
    others: Annotated[Mapping[str, Any], Rest()]


@dataclass(frozen=True)
class Outer:
    top: Top


def test_the_reader_knows_no_key_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("[top]\nsize = 3\nflag = true\n[top.inner]\nname = 'b'\n")
    config = read_toml(path, Outer, Rules({"names": ("a", "b")}))
    assert config == Outer(Top(3, Inner("b"), {"flag": True}))
    with pytest.raises(ConfigError) as error:
        read_toml(path, Outer, Rules({"names": ("a", "c")}), ["top.size=4"])
    assert error.value.problems == (
        f"{path}:5: top.inner.name: unknown value 'b' (known: 'a', 'c')",
        "--set top.size=4: top.size: expected an odd number, found 4",
    )
