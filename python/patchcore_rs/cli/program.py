"""How the command line ends: errors in one line on stderr, exit codes that scripts can rely on."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from enum import IntEnum
from typing import Any, NoReturn

import click

from patchcore_rs._text import printable

PROGRAM = "patchcore-rs"
DEBUG = "patchcore_rs.debug"  # where a context keeps whether to show tracebacks


class ExitCode(IntEnum):
    """What a script can rely on."""

    OK = 0
    ANOMALY = 1
    USAGE = 2
    FAILURE = 3
    INTERRUPTED = 130


class Failure(click.ClickException):
    """An error that ends the program with a code of `ExitCode`."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        """Say `message`, then exit."""
        super().__init__(message)
        self.code = exit_code


class Program(click.Group):
    """A group whose errors are one line on stderr and whose exit codes are those of `ExitCode`."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run, then end the process with the code that fits."""
        # Names of files need not be valid in the terminal's encoding.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        extra["standalone_mode"] = False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default", UserWarning)
                warnings.showwarning = _show_warning
                code = super().main(*args, **extra)
                sys.stdout.flush()
        except (KeyboardInterrupt, click.Abort):
            _complain("interrupted")
            code = ExitCode.INTERRUPTED
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else PROGRAM
            _complain(f"error: {error.format_message()} (see '{command} --help')")
            code = ExitCode.USAGE
        except Failure as error:
            _complain(f"error: {error.format_message()}")
            code = error.code
        except BrokenPipeError:
            code = _abandon_output()
        sys.exit(int(code) if isinstance(code, int) else ExitCode.OK)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """The commands in the order a newcomer meets them."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn what it raises into one line and a code."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, click.ClickException):
            raise
        except BrokenPipeError:
            ctx.exit(_abandon_output())
        except Exception as error:
            if ctx.meta.get(DEBUG):
                traceback.print_exc()
            raise _failure(error) from error


def _failure(error: Exception) -> Failure:
    """Bad input, or something that went wrong with good input."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError):
        if error.filename is not None and error.strerror:
            text = f"{os.fsdecode(error.filename)}: {error.strerror}"
        wrong = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
        return Failure(text, ExitCode.USAGE if isinstance(error, wrong) else ExitCode.FAILURE)
    if isinstance(error, MemoryError):
        return Failure(f"out of memory: {error}" if str(error) else "out of memory", ExitCode.FAILURE)
    if isinstance(error, ValueError | TypeError | ImportError):
        return Failure(text, ExitCode.USAGE)
    kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
    return Failure(f"{kind}{text} (--debug shows where)", ExitCode.FAILURE)


def _abandon_output() -> ExitCode:
    """The reader has gone, as in `| head`: let the interpreter's last flush go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return ExitCode.FAILURE


def _complain(text: str) -> None:
    line = " ".join(printable(part.strip()) for part in text.splitlines() if part.strip())
    click.echo(f"{PROGRAM}: {line}", err=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        _complain(f"warning: {message}")
