"""What holds for the repository: packaging, import directions, documentation that runs."""

import ast
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
import types
import zipfile
from pathlib import Path

import pytest

import shardwise

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "shardwise"
FOLDERS = ("kernels", "layouts", "meshlib", "models", "ops", "optim")  # links in src/shardwise
SOURCES = [
    file
    for folder in (*(ROOT / name for name in FOLDERS), PACKAGE)
    for file in sorted(folder.rglob("*.py"))  # does not follow links
    if "__pycache__" not in file.parts
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(shardwise.__path__, "shardwise.")
    if module.name != "shardwise.__main__"
)


def run_python(code: str, cwd: Path, *path: Path) -> str:
    """Standard output of a fresh interpreter that stands in `cwd` and sees `path` first."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    env["PYTHONSAFEPATH"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_folders_are_relative_links_into_the_root() -> None:
    links = {path.name: os.readlink(path) for path in PACKAGE.iterdir() if path.is_symlink()}
    assert links == {name: f"../../{name}" for name in FOLDERS}


def test_every_file_is_a_module_and_is_imported_under_one_name(tmp_path: Path) -> None:
    code = """if True:
        import importlib, os, sys
        for name in NAMES:
            importlib.import_module(name)
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file and os.path.realpath(file).startswith(ROOT):
                print(os.path.realpath(file), name)
    """
    code = code.replace("NAMES", repr(MODULES)).replace("ROOT", repr(f"{ROOT}/"))
    lines = run_python(code, tmp_path, ROOT / "src").splitlines()
    found = sorted(line.split()[0] for line in lines)
    assert found == sorted(str(file) for file in SOURCES if file.name != "__main__.py")
    assert {line.split()[1].split(".")[0] for line in lines} == {"shardwise"}


def test_importing_the_library_starts_and_loads_nothing_else(tmp_path: Path) -> None:
    # A triton that can be imported, so that an import of it shows on every machine.
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("")
    code = """if True:
        import sys, torch
        before = set(sys.modules)
        import shardwise
        print(torch.distributed.is_initialized())
        print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
        print(*sorted(name for name in sys.modules if name.startswith("shardwise.cli")))
    """
    started, loaded, commands = run_python(code, tmp_path, ROOT / "src", tmp_path).split("\n")[:3]
    assert started == "False"
    assert not {"triton", "matplotlib", "rich", "transformers"} & set(loaded.split())
    assert "shardwise" in loaded.split()
    assert commands == ""


def lint_imports(root: Path) -> tuple[int, str]:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as run; run()",
            str(ROOT / "pyproject.toml"),
            "--no-cache",
        ],
        env={**os.environ, "PYTHONPATH": str(root / "src"), "PYTHONSAFEPATH": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_folders_import_in_one_direction() -> None:
    code, text = lint_imports(ROOT)
    assert code == 0, text
    assert "layers KEPT" in text


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("meshlib", "layouts"),
        ("kernels", "meshlib"),
        ("meshlib", "kernels"),
        ("layouts", "ops"),
        ("layouts", "kernels"),
        ("ops", "models"),
        ("models", "optim"),
        ("ops", "cli"),
        ("optim", "checkpoint"),
        ("checkpoint", "cli"),
        ("checkpoint", "models"),
        ("interop", "checkpoint"),
        ("optim", "interop"),
    ],
)
def test_a_wrong_direction_is_noticed(tmp_path: Path, importer: str, imported: str) -> None:
    package = tmp_path / "src" / "shardwise"
    for name in ("", *FOLDERS, "checkpoint", "cli", "interop"):
        (package / name).mkdir(parents=True, exist_ok=True)
        (package / name / "__init__.py").write_text("")
    (package / importer / "wrong.py").write_text(f"from .. import {imported}\n")
    code, text = lint_imports(tmp_path)
    assert code == 1, text
    assert f"shardwise.{importer} is not allowed to import shardwise.{imported}" in text
    (package / importer / "wrong.py").unlink()
    assert lint_imports(tmp_path)[0] == 0


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_inside_the_package_are_relative(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        for name in names:
            assert name.split(".")[0] not in ("shardwise", *FOLDERS), f"line {node.lineno}: {name}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_longer_than_its_ceiling(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 600, "split it by idea"


def test_kernels_package_is_a_docstring_only() -> None:
    (statement,) = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)
    assert isinstance(statement.value.value, str)


def test_transformers_is_not_broken_by_the_folder_named_kernels(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra 'oracle' is not installed")
    code = """if True:
        import shardwise
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
        size = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=1))
        GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    """
    run_python(code, tmp_path, ROOT, ROOT / "src")  # the root first: the worst case


@pytest.mark.parametrize("module", ["shardwise", *MODULES])
def test_modules_and_what_they_export_are_documented(module: str) -> None:
    loaded = importlib.import_module(module)
    is_package = hasattr(loaded, "__path__")
    assert loaded.__doc__ or module.endswith(".cli"), "no module docstring"
    if not is_package and not hasattr(loaded, "__all__"):
        return
    names = getattr(loaded, "__all__", [name for name in vars(loaded) if name[0] != "_"])
    missing = [
        name
        for name in names
        if not isinstance(value := getattr(loaded, name), types.ModuleType)
        and callable(value)
        and str(getattr(value, "__module__", "")).startswith("shardwise")
        and not (value.__doc__ or "").strip()
    ]
    assert not missing, f"no docstring: {missing}"


def python_blocks(file: Path) -> list[tuple[int, str]]:
    """Line number and text of each ```python block."""
    text = file.read_text()
    return [
        (text[: found.start(1)].count("\n"), found[1])
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


@pytest.mark.parametrize("file", [f for f in DOCS if f.exists()], ids=lambda f: f.name)
def test_python_in_the_documentation_runs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Blocks of one file go on from each other, as a reader takes them.
    names: dict[str, object] = {"__name__": file.stem}
    for line, block in python_blocks(file):
        exec(compile("\n" * line + block, str(file), "exec"), names)


def test_the_readme_shows_a_program() -> None:
    blocks = python_blocks(ROOT / "README.md")
    assert any("shardwise as sw" in block for _, block in blocks)


@pytest.mark.parametrize("file", [f for f in DOCS if f.exists()], ids=lambda f: f.name)
def test_documented_commands_exist(file: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = re.findall(r"^```console\n(.*?)^```$", file.read_text(), re.DOTALL | re.MULTILINE)
    used = set(re.findall(r"^\$? *make ([\w-]+)", "\n".join(commands), re.MULTILINE))
    assert used <= targets
    for path in re.findall(r"\b(?:examples|benchmarks|tests)/[\w/.-]+\b", file.read_text()):
        assert (ROOT / path).exists(), path


def test_readme_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make train" in text
    assert "make test" in text


def requirement_name(text: str) -> str:
    found = re.match(r"[\w.-]+", text)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def test_every_dependency_is_pinned_in_constraints() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    names = {requirement_name(name) for name in pins}
    asked = PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"]
    for extra in PROJECT["project"]["optional-dependencies"].values():
        asked = asked + extra
    assert {requirement_name(text) for text in asked} <= names
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values())  # no local version


def test_version_is_said_once() -> None:
    assert PROJECT["project"]["version"] == shardwise.__version__


def test_types_are_checked_in_every_folder() -> None:
    # pyright follows no link that it is not told of
    included = PROJECT["tool"]["pyright"]["include"]
    assert {f"src/shardwise/{name}" for name in FOLDERS} <= set(included)


def test_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that a user would install, built from a copy without leftovers."""
    copy = tmp_path_factory.mktemp("copy")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*FOLDERS, "src"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", "out", "."],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (copy / "out").glob("*.whl")
    return path


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    expected = {
        "shardwise/" + str(file.relative_to(PACKAGE if file.is_relative_to(PACKAGE) else ROOT))
        for file in SOURCES
    }
    assert {n for n in inside if not n.endswith(".cu")} == expected | {"shardwise/py.typed"}
    info = f"shardwise-{shardwise.__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in names
    entry = zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    assert "shardwise = shardwise.cli.main:main" in entry


def test_wheel_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """if True:
        import importlib, pkgutil, shardwise
        for module in pkgutil.walk_packages(shardwise.__path__, "shardwise."):
            if not module.name.endswith("__main__"):
                print(importlib.import_module(module.name).__file__)
    """
    files = run_python(code, tmp_path, tmp_path / "site").splitlines()
    assert len(files) == len(MODULES)
    assert all(file.startswith(str(tmp_path)) for file in files)
