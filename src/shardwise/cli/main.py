"""The command line: `shardwise train FILE`. Exit codes: 0 done, 1 failed, 2 bad input."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from ..meshlib.errors import LayoutError, MeshError
from .config import ConfigError


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    made = argparse.ArgumentParser(prog="shardwise", description="sharded tensors for PyTorch")
    commands = made.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the model of a TOML file")
    train.add_argument("file", help="the file, see docs/configuration.md")
    train.add_argument(
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
        from . import build
        from .config import read_config
        from .train import train
    except ModuleNotFoundError as missing:
        print(
            f"shardwise train needs {missing.name}: pip install 'shardwise[train]'", file=sys.stderr
        )
        return 1
    try:
        config = read_config(
            given.file,
            families={name: family.config for name, family in build.FAMILIES.items()},
            presets=tuple(build.PRESETS),
            derived=build.DERIVED,
            overrides=given.overrides,
        )
        train(config)
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
