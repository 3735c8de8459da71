"""The options that the commands share, made from the table of parameters, and what is checked before any work."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from patchcore_rs.cli.program import DEBUG
from patchcore_rs.model.parameters import AUTO, METHODS
from patchcore_rs.model.profiles import PROFILES
from patchcore_rs.model.shell import Choices, Flag

if TYPE_CHECKING:
    from patchcore_rs.model.shell import Parameter

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

# Those of all methods: PatchCore's, then what others have besides.
PARAMETERS = {name: parameter for table in METHODS.values() for name, parameter in table.items()}
PATCHCORE = "patchcore"


class ModelOption(click.Option):
    """An option for a parameter; `group` is the heading that help shows it under."""

    def __init__(self, *arguments: Any, group: str, **attributes: Any) -> None:
        """As click's."""
        super().__init__(*arguments, **attributes)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help shows the options of the parameters under their headings, after its own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for every heading."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def options(*decorators: Callable[[Decorated], Decorated]) -> Callable[[Decorated], Decorated]:
    """Several options as one decorator, shown in the order given."""

    def decorate(command: Decorated) -> Decorated:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's signature
    ctx.meta[DEBUG] = value


COMMON = options(
    click.option("-q", "--quiet", is_flag=True, help="No progress and no remarks on stderr; errors still show."),
    click.option(
        "--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show where an error came from."
    ),
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
PAGES = click.option(
    "--pages",
    type=click.Choice(["first", "all"]),
    default="first",
    show_default=True,
    help="What files of several pages stand for: the first, or an image for each, named FILE.tif#2.",
)
SKIP = click.option(
    "--skip-unreadable", is_flag=True, help="Leave out images that cannot be read, and say which; no error then."
)
EXISTING = click.Path(exists=True, path_type=Path)
# The columns that a table of evaluate may have.
METRICS = (
    "image_auroc",
    "image_auroc_interval",
    "image_average_precision",
    "part_auroc",
    "pixel_auroc",
    "pixel_average_precision",
    "pixel_f1",
    "pro",
    "aupimo",
    "misclassified",
    "full_recall_false_alarms",
)


class _ImagesPath(click.Path):
    """A folder or an image file that is there, or a page of one: `file.tif#2`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; click.BadParameter where there is no such file."""
        from patchcore_rs.images.files import split_page

        file, page = split_page(os.fspath(value))
        if page is None or not os.path.isfile(file):
            return super().convert(value, param, ctx)
        super().convert(file, param, ctx)
        return Path(value)


IMAGES = _ImagesPath(exists=True, path_type=Path)
PATHS = _ImagesPath(exists=True, allow_dash=True, path_type=Path)


def model_option(name: str, *, repeatable: bool = False, help_text: str = "") -> Callable[[Decorated], Decorated]:
    """The option for a parameter, None where it is not given; a repeatable one is a tuple, and its name a plural."""
    parameter = PARAMETERS[name]
    attributes: dict[str, Any] = {"cls": ModelOption, "group": parameter.group, "default": None}
    if isinstance(parameter.shell, Flag):
        attributes["is_flag"] = True
    elif isinstance(parameter.shell, Choices):
        attributes["type"] = click.Choice(parameter.shell.words)
    else:
        attributes |= {"metavar": parameter.shell.metavar, "type": _reader(parameter, parameter.shell.parse)}
    option = name.replace("_", "-")
    either = isinstance(parameter.shell, Flag) and parameter.auto
    declarations = [f"--{option}/--no-{option}" if either else f"--{option}"]
    if repeatable:
        declarations.append(f"{name}s")
        attributes["multiple"] = True
    text = help_text or help_of(parameter)
    return click.option(*declarations, help=f"{text}  (repeatable)" if repeatable else text, **attributes)


def model_options(*, repeatable: Collection[str] = ()) -> Callable[[Decorated], Decorated]:
    """The options for all parameters, in the order of the table."""
    return options(*(model_option(name, repeatable=name in repeatable) for name in PARAMETERS))


def method_option() -> Callable[[Decorated], Decorated]:
    """The option for the method whose parameters the others are."""
    return click.option(
        "--method",
        type=click.Choice([*METHODS]),
        default=PATCHCORE,
        help="PatchCore, or one to compare with it: PaDiM, for parts that lie alike in all images; Mahalanobis-AD, "
        "which says whether and not where; SPADE, by the training images nearest to an image.",
    )


def _reader(parameter: Parameter, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """What turns a text into a value of the parameter; click adds which option it is of where it is refused."""

    def read(text: str) -> Any:
        try:
            value = parse(text)
            return value if parameter.auto and value == AUTO else parameter.check(value, "it")
        except (TypeError, ValueError) as error:
            raise click.BadParameter(str(error)) from error

    return read


def help_of(parameter: Parameter) -> str:
    """What help says of an option for that parameter: what it is, and what it is where it is not given."""
    of = "" if parameter.name in METHODS[PATCHCORE] else f", of --method {_having(parameter.name)}"
    sentence = f"{parameter.help[0].upper()}{parameter.help[1:]}{parameter.more}{of}."
    default = parameter.default_text or _default_of(parameter)
    return f"{sentence}  [default: {default}]" if default else sentence


def _having(name: str) -> str:
    """The methods that have a parameter."""
    return " or ".join(method for method, table in METHODS.items() if name in table)


def _default_of(parameter: Parameter) -> str:
    if parameter.default is False:
        return ""
    if not parameter.auto or parameter.name not in asdict(PROFILES["paper"]):
        return _spelled(parameter.default)
    values = {name: _spelled(getattr(profile, parameter.name)) for name, profile in PROFILES.items()}
    usual = values["inspect"]
    others = [f"{value} for {name}" for name, value in values.items() if value != usual]
    return ", ".join([usual, *others])


def _spelled(value: object) -> str:
    """A default as the shell writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def take_arguments(options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Take the method and its parameters out of `options`: its name, and the arguments that were given.

    Those that are repeatable stay there.

    Raises:
        click.UsageError: one was given that the method has not.
    """
    method: str = options.pop("method")
    arguments = take_given(options, *PARAMETERS)
    repeated = [name for name in PARAMETERS if options.get(f"{name}s")]
    for name in (*arguments, *repeated):
        if name not in METHODS[method]:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} is an option of --method {_having(name)}; got --method {method}")
    return method, arguments


def take_given(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Take the options of these names out of `options`; return those that were given, as arguments of a detector."""
    values = {name: options.pop(name) for name in names if name in options}
    return {name: value for name, value in values.items() if is_given(name)}


def is_given(name: str) -> bool:
    """Whether the command that runs was given this option."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


def require_other(option: str, file: Path, inputs: Iterable[Path]) -> None:
    """Raise ValueError where the `file` to write is one that the command reads, which would be lost."""
    if file.exists() and any(other.exists() and file.samefile(other) for other in inputs):
        raise ValueError(f"{option} must be a file that this command does not read; got {file}. Choose another name")


def require_folder(file: Path) -> None:
    """Raise FileNotFoundError where the folder to write `file` in is missing: better now than after the work."""
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder to write to does not exist", str(file))
