"""The command line: parse, call, print. Every command stands for a call of the API."""

from __future__ import annotations

import os
import sys
import traceback
from difflib import get_close_matches
from typing import Any

import click

from ..ir.errors import BuildError, EinfallError

# A thread that spins after a torch call takes the core from the kernel that follows; torch and TVM read these once.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "TVM_THREAD_POOL_SPIN_COUNT": "1000"}
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_COMMANDS = {
    "explain": "kernels", "compile": "kernels", "tune": "tuning", "report": "report", "bench": "measuring", "check": "measuring",
    "db": "database", "targets": "machine", "doctor": "machine",
}  # fmt: skip


class Commands(click.Group):
    """Commands whose modules are imported when they are used; a near miss is answered with the right name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of a user's path."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None."""
        if cmd_name not in _COMMANDS:
            return None
        from importlib import import_module

        command = getattr(import_module(f".{_COMMANDS[cmd_name]}", __name__), f"{cmd_name}_command")
        return command if isinstance(command, click.Command) else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a hint for a name that is nearly right."""
        suggest(ctx, self.list_commands(ctx), args)
        return super().resolve_command(ctx, args)


def suggest(ctx: click.Context, known: list[str], args: list[str]) -> None:
    """Fail with the nearest of `known` if the first argument is none of them."""
    if args and args[0] not in known and not args[0].startswith("-"):
        near = get_close_matches(args[0], known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Commands are {', '.join(known)}."
        ctx.fail(f"No such command {args[0]!r}.{hint}")


def _version() -> str:
    from .. import __version__

    return str(__version__)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="einfall")
def cli() -> None:
    """Cascades of Einsums, turned into fused, tuned kernels."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and exit: 0 done, 1 a check or build failed, 2 bad input."""
    unset = tuple(name for name in ENVIRONMENT if name not in os.environ)
    os.environ.update({name: ENVIRONMENT[name] for name in unset})
    sys.exit(run(arguments, unset))


def run(arguments: list[str] | None = None, unset: tuple[str, ...] = ()) -> int:
    """Run a command line and return the exit status; every error is one message on stderr.

    `unset` names the variables of `ENVIRONMENT` that were set here and not by the user.
    """
    try:
        result: Any = cli.main(args=arguments, prog_name="einfall", standalone_mode=False, obj=unset)
        return result if isinstance(result, int) else DONE
    except click.exceptions.Abort:
        click.echo("einfall: interrupted", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return BAD_INPUT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; say no more, not even at exit
        return DONE
    except EinfallError as error:
        _show(f"{type(error).__name__}: {error}")
        return FAILED if isinstance(error, BuildError) else BAD_INPUT
    except Exception as error:
        _show(f"internal error: {type(error).__name__}: {error}\n  this is a bug of einfall; EINFALL_DEBUG=1 shows where")
        return FAILED


def _show(message: str) -> None:
    from ..configuration import current

    click.echo(f"einfall: {message}", err=True)
    try:
        debug = current().debug
    except EinfallError:  # the environment itself is what is wrong
        debug = False
    if debug:
        click.echo(traceback.format_exc(), err=True)
