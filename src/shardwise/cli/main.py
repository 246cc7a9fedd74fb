"""The command line: train, plan, show. Exit codes: 0 done, 1 failed, 2 bad input."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from ..meshlib.errors import LayoutError, MeshError
from .config import ConfigError


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    made = argparse.ArgumentParser(prog="shardwise", description="sharded tensors for PyTorch")
    commands = made.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the model of a TOML file")
    train.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint, if there is one"
    )
    plan = commands.add_parser(
        "plan", help="what one step of a file would move, without running it"
    )
    plan.add_argument("--json", action="store_true", help="the plan as JSON")
    plan.add_argument("--diff", metavar="FILE", help="against the plan of another file")
    show = commands.add_parser(
        "show", help="a file's strategy or mesh, or any layout, as a picture"
    )
    show.add_argument("--save", metavar="PATH", help="write .svg, .png, .html or .txt instead")
    for command in (train, plan):
        command.add_argument("file", help="the file, see docs/configuration.md")
    show.add_argument("file", help="a file, or a layout with sizes: '64/data 512/tensor tensor=4'")
    show.add_argument("view", nargs="?", choices=("strategy", "mesh"), help="of a file")
    for command in (train, plan, show):
        command.add_argument(
            "--set",
            action="append",
            default=[],
            dest="overrides",
            metavar="TABLE.KEY=VALUE",
            help="replace a value of the file; may be given again",
        )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and give its exit code."""
    given = parser().parse_args(arguments)
    try:
        COMMANDS[given.command](given)
    except ModuleNotFoundError as missing:
        print(
            f"shardwise {given.command} needs {missing.name}: pip install 'shardwise[train]'",
            file=sys.stderr,
        )
        return 1
    except (ConfigError, LayoutError, MeshError, ValueError, FileNotFoundError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _config(file: str, overrides: Sequence[str]) -> Any:
    from . import build
    from .config import read_config

    return read_config(
        file,
        families={name: family.config for name, family in build.FAMILIES.items()},
        presets=tuple(build.PRESETS),
        derived=build.DERIVED,
        overrides=overrides,
    )


def _train(given: argparse.Namespace) -> None:
    from .train import train

    train(_config(given.file, given.overrides), resume=given.resume)


def _plan(given: argparse.Namespace) -> None:
    from .look import planned

    made = planned(_config(given.file, given.overrides))
    if given.diff:
        print(made.diff(planned(_config(given.diff, given.overrides))))
    else:
        print(made.to_json() if given.json else made)


def _show(given: argparse.Namespace) -> None:
    from .look import drawn, shown

    if given.view:
        picture = shown(_config(given.file, given.overrides), given.view)
    else:
        picture = drawn(given.file)
    if given.save:
        picture.save(given.save)
    else:
        print(picture)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": _train,
    "plan": _plan,
    "show": _show,
}
