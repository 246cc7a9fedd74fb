"""The command line: its commands, and exit codes: 0 done, 1 failed, 2 bad input."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..checkpoint import CheckpointError
from ..meshlib.errors import LayoutError, MeshError
from ..meshlib.mesh import is_launched
from .config import ConfigError


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    made = argparse.ArgumentParser(prog="shardwise", description="sharded tensors for PyTorch")
    commands = made.add_subparsers(dest="command", required=True)
    add = {name: commands.add_parser(name, help=text) for name, text in HELP.items()}
    train, plan, show, inspect, doctor = add.values()
    train.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint, if there is one"
    )
    plan.add_argument("--diff", metavar="FILE", help="against the plan of another file")
    show.add_argument("--save", metavar="PATH", help="write .svg, .png, .html or .txt instead")
    for command in (train, plan):
        command.add_argument("file", help="the file, see docs/configuration.md")
    show.add_argument("file", help="a file, or a layout with sizes: '64/data 512/tensor tensor=4'")
    show.add_argument("view", nargs="?", choices=("strategy", "mesh"), help="of a file")
    inspect.add_argument("checkpoint", help="a directory of checkpoints, or one step-... in it")
    inspect.add_argument("--step", type=int, help="which; the newest unless given")
    inspect.add_argument("--verify", action="store_true", help="compare every byte with its hash")
    doctor.add_argument("file", nargs="?", help="a file whose mesh is looked at")
    for command in (plan, inspect, doctor):
        command.add_argument("--json", action="store_true", help="as JSON")
    for command in (train, plan, show, doctor):
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
        sys.stdout.flush()
    except ModuleNotFoundError as missing:
        print(
            f"shardwise {given.command} needs {missing.name}: pip install 'shardwise[train]'",
            file=sys.stderr,
        )
        return 1
    except CheckpointError as error:  # a ValueError, but of the disk and not of the input
        return _failed(f"{type(error).__name__}: {error}")
    except (ConfigError, LayoutError, MeshError, ValueError, FileNotFoundError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError as error:
        if given.command == "train":  # a run whose output is gone has not come to its end
            return _failed(f"the output was closed: {error}")
        # `inspect ... | head` has read enough; what is still buffered must not be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return _failed("interrupted")
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)  # in a job this ends the process
        return 1
    return 0


def _failed(text: str) -> int:
    """Say why. In a job the process ends here: an orderly exit would keep the others waiting."""
    print(text, file=sys.stderr, flush=True)
    if is_launched():
        sys.stdout.flush()
        os._exit(1)
    return 1


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

    if given.view or given.file.endswith(".toml"):
        picture = shown(_config(given.file, given.overrides), given.view or "strategy")
    else:
        picture = drawn(given.file)
    if given.save:
        picture.save(given.save)
    else:
        print(picture)


def _inspect(given: argparse.Namespace) -> None:
    from .look import as_json, inspected

    manifest = inspected(given.checkpoint, given.step, given.verify)
    print(as_json(manifest) if given.json else manifest)
    if given.verify and not given.json:
        print("every byte is as it was written")


def _doctor(given: argparse.Namespace) -> None:
    from .doctor import doctor, lines

    found = doctor(_config(given.file, given.overrides) if given.file else None)
    print(json.dumps(found) if given.json else lines(found))


HELP = {
    "train": "train the model of a TOML file",
    "plan": "what one step of a file would move, without running it",
    "show": "a file's strategy or mesh, or any layout, as a picture",
    "inspect": "what a checkpoint holds",
    "doctor": "versions, devices, and the mesh that a program would get here",
}
COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": _train,
    "plan": _plan,
    "show": _show,
    "inspect": _inspect,
    "doctor": _doctor,
}
