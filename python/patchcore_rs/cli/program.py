"""How the command line ends: errors in one line on stderr, exit codes that scripts can rely on."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sys
import traceback
import warnings
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import click

from patchcore_rs._text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROGRAM = "patchcore-rs"
DEBUG = "patchcore_rs.debug"  # where a context keeps whether to show tracebacks


OUTPUT = "the output"  # stdout, in messages
_UNWRITABLE = (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EBADF)


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
    """A group whose errors are one line on stderr and whose exit codes are those of `ExitCode`.

    `running` is the command that was asked for last.
    """

    running: click.Command | None = None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's; remembers the command."""
        name, self.running, rest = super().resolve_command(ctx, args)
        return name, self.running, rest

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run, then end the process with the code that fits."""
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # started with it closed, as by `>&-`
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the rest of the process
            # Names of files need not be valid in the terminal's encoding.
            if hasattr(getattr(sys, name), "reconfigure"):
                getattr(sys, name).reconfigure(errors="backslashreplace")
        code = self._run(*args, **extra)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            code = _abandon_output()
        except OSError as error:
            _complain(f"error: {OUTPUT}: {error.strerror}")
            code = _abandon_output()
        sys.exit(int(code) if isinstance(code, int) else ExitCode.OK)

    def _run(self, *args: Any, **extra: Any) -> Any:
        """Run, and say what went wrong; the code that fits, or what the command returned."""
        try:
            with warnings.catch_warnings(), _notes():
                warnings.simplefilter("default", UserWarning)
                warnings.showwarning = partial(_show_warning, self)
                return super().main(*args, **extra | {"standalone_mode": False})
        except (KeyboardInterrupt, click.Abort):
            _complain("interrupted")
            return ExitCode.INTERRUPTED
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else PROGRAM
            _complain(f"error: {error.format_message()} (see '{command} --help')")
            return ExitCode.USAGE
        except Failure as error:
            _complain(f"error: {error.format_message()}")
            return error.code
        except BrokenPipeError:
            return _abandon_output()
        except (
            SystemExit
        ) as error:  # click's: 0 after completion, 1, our ANOMALY, where the reader of its help has gone
            return _abandon_output() if error.code else ExitCode.OK
        except OSError as error:  # of click's own writing: the help, the version
            _complain(f"error: {OUTPUT}: {error.strerror}")
            return _abandon_output()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Without a command, show the help."""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(ExitCode.USAGE)
        return super().parse_args(ctx, args)

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
            raise _failure(error, self.commands.get(ctx.invoked_subcommand or "", self)) from error


@contextlib.contextmanager
def kept(failures: list[BaseException]) -> Iterator[None]:
    """Keep what the block raises, so that what is finished can be told before it is raised again."""
    try:
        yield
    except BrokenPipeError:  # nobody reads the answer
        raise
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - raised again later
        failures.append(error)


def first_words(failures: Sequence[BaseException]) -> str | None:
    """What the JSON of an answer says of the failures kept, None where there are none."""
    if not failures:
        return None
    if isinstance(failures[0], KeyboardInterrupt):
        return "interrupted"
    return _failure(failures[0], click.get_current_context().command).message


_QUOTES = "'\""
_ARGUMENT = re.compile(r"\b([a-z_]+)=('[^']*'|\"[^\"]*\"|\w+)?")  # as a message names it to those who write Python
_SPOKEN = {
    "call calibrate(normal_images)": "give --calibrate",
    "normal_images must": "--calibrate must",
    "partial_fit": "fit --add-to",
    "clip=False": "--no-clip",
}


def in_shell_words(text: str, command: click.Command) -> str:
    """A message of the package with the command's own options in the place of Python's arguments and calls."""
    options = {option for parameter in command.params for option in parameter.opts}

    def spelled(match: re.Match[str]) -> str:
        option = f"--{match[1].replace('_', '-')}"
        if option not in options:
            return match[0]
        value = "" if match[2] in (None, "True") else match[2].strip(_QUOTES)  # a flag has no value
        return f"{option} {value}" if value else option

    for call, words in _SPOKEN.items():
        text = text.replace(call, words)
    return _ARGUMENT.sub(spelled, text)


def _failure(error: BaseException, command: click.Command) -> Failure:
    """Bad input, or something that went wrong with good input."""
    text = in_shell_words(str(error) or type(error).__name__, command)
    if isinstance(error, OSError):
        # Whatever writes a file names it.
        if error.strerror and (error.filename is not None or error.errno in _UNWRITABLE):
            text = f"{OUTPUT if error.filename is None else os.fsdecode(error.filename)}: {error.strerror}"
        wrong = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
        return Failure(text, ExitCode.USAGE if isinstance(error, wrong) else ExitCode.FAILURE)
    if isinstance(error, MemoryError):
        return Failure(f"out of memory: {text}" if str(error) else "out of memory", ExitCode.FAILURE)
    from patchcore_rs.images.files import ImageError

    if isinstance(error, ImageError):
        return Failure(f"{text}; --skip-unreadable leaves such images out", ExitCode.USAGE)
    if isinstance(error, ValueError | TypeError | ImportError):
        return Failure(text, ExitCode.USAGE)
    told = type(error) is RuntimeError or type(error).__module__.startswith(__package__.partition(".")[0])
    kind = "" if told else f"{type(error).__name__}: "
    return Failure(f"{kind}{text} (--debug shows where)", ExitCode.FAILURE)


def _abandon_output() -> ExitCode:
    """The reader has gone, as in `| head`: let the interpreter's last flush go nowhere."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file needs none of this
        output = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output)
        os.close(nowhere)
    return ExitCode.FAILURE


class _Notes(logging.Handler):
    """Shows what the package logs, such as files that were left out, as lines beside the answer."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record: a warning always, a note unless the command runs quietly."""
        context = click.get_current_context(silent=True)
        if record.levelno >= logging.WARNING:
            _complain(f"warning: {record.getMessage()}")
        elif context is None or not context.params.get("quiet"):
            _complain(f"note: {record.getMessage()}")


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Show what is logged of files left out and of the memory that large calls take."""
    logger, handler = logging.getLogger("patchcore_rs"), _Notes()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _complain(text: str) -> None:
    line = " ".join(printable(part.strip()) for part in text.splitlines() if part.strip())
    click.echo(f"{PROGRAM}: {line}", err=True)


def _show_warning(program: Program, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        context = click.get_current_context(silent=True)  # None in the threads that read images
        command = context.command if context else program.running or program
        _complain(f"warning: {in_shell_words(str(message), command)}")
