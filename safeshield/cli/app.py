"""The Typer application, and the arguments and error handling that all commands share.

The commands import large packages inside their functions, so that ``safeshield --help`` starts
quickly.
"""

from __future__ import annotations

import contextlib
import functools
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn, ParamSpec, TypeVar

from safeshield.requirements import explained

try:
    import typer
except ModuleNotFoundError as error:
    raise explained(error) from error

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="safeshield",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


_HELD: ContextVar[contextlib.ExitStack | None] = ContextVar("held outputs", default=None)
"""What the present command holds until it ends."""


class Device(StrEnum):
    """Device on which an agent is trained."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"safeshield {version('safeshield')}")
        raise typer.Exit


@app.callback()
def _of_all(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Safety shields for reinforcement learning agents, learned from logged data."""


def load_plugins(files: list[Path] | None) -> list[Path] | None:
    """Import the files that register algorithms, and return them. The callback of ``--plugin``."""
    for file in files or []:
        try:
            from safeshield.cli.plugins import load_plugin

            load_plugin(file)
        except (ValueError, TypeError, OSError, ImportError, SyntaxError) as error:
            _fail(f"--plugin {file}: {type(error).__name__}: {error}")
    return files


EnvId = Annotated[str, typer.Argument(help="Gymnasium environment id, or module:id.")]
Source = Annotated[
    Path,
    typer.Argument(metavar="SOURCE", help="File of a shield or an agent, .safetensors."),
]
Out = Annotated[Path, typer.Argument(help="File to write.", dir_okay=False)]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.", min=0)]
Episodes = Annotated[int, typer.Option(help="Number of whole episodes.", min=1)]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="Call the policy's predict with deterministic=True."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        help="Python file with your own algorithms, constraints or policies. The file is run. "
        "Repeatable.",
        is_eager=True,
        callback=load_plugins,
        dir_okay=False,
    ),
]
Verify = Annotated[
    Path | None,
    typer.Option(
        help="PEM file of a public key: refuse a file that is not signed with its private key."
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="Load an SB3 zip file, which can run any code its author put in it."
    ),
]


def clear_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Decorate a command so that an error that the user can repair is printed as one line.

    The process then exits with status 2. SIGTERM ends a command as Ctrl-C does, with one line and
    the status 128 + the signal's number. `command` is the function of the command; the decorated
    function is returned.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        _end_on_sigterm()
        try:
            with contextlib.ExitStack() as held:
                _HELD.set(held)
                return command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt as error:
            stop(
                error,
                "what was not finished is not written",
            )
        except ModuleNotFoundError as error:
            if kwargs.get("debug"):
                raise
            _fail(str(explained(error)))
        except Exception as error:
            if kwargs.get("debug") or not _is_users(error):
                raise
            _fail(str(error) or type(error).__name__)

    return wrapped


def stop(error: KeyboardInterrupt, left: str) -> NoReturn:
    """End the process because of a signal, and say what the command has left.

    Args:
        error: The error that the signal raised.
        left: What the command has left, in words.
    """
    number = getattr(error, "number", signal.SIGINT)
    typer.echo(f"stopped by {signal.Signals(number).name}: {left}", err=True)
    raise typer.Exit(128 + number) from None


def this_command() -> str:
    """Return the present command as it can be typed again, for messages."""
    return shlex.join(["safeshield", *sys.argv[1:]])


def _end_on_sigterm() -> None:
    from safeshield.training.stopping import terminated

    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminated)


def _fail(text: str) -> NoReturn:
    typer.echo(f"error: {' '.join(text.split())}", err=True)
    raise typer.Exit(2) from None


def _is_users(error: Exception) -> bool:
    import gymnasium as gym

    kinds = (ValueError, TypeError, OSError, ImportError, FloatingPointError, gym.error.Error)
    graph = sys.modules.get("safeshield.nn.graph")  # It imports PyTorch.
    return isinstance(error, kinds) or (
        graph is not None and isinstance(error, graph.CannotExportError)
    )


def check_output(
    path: Path,
    suffixes: tuple[str, ...] | None,
    name: str = "OUT",
    *,
    claim: bool = True,
    expected: int = 0,
) -> None:
    """Check that the output file `path` can be written, before the command starts its work.

    The path is then held until the command ends, so that no other command writes it.

    Args:
        path: The file.
        suffixes: Endings that its name may have; None for any.
        name: Name of the argument in messages.
        claim: Whether to hold the path. False for a file that the work itself holds.
        expected: Size of what will be written, in bytes, as far as it is known.

    Raises:
        ValueError: The name does not end in one of `suffixes`, or another run has the file.
        OSError: It is a folder, its folder does not exist, nothing can be written there, or the
            disk has too little free space.
    """
    from safeshield.files.atomic import check_writable
    from safeshield.files.lock import claimed

    if suffixes is not None and path.suffix.lower() not in suffixes:
        raise ValueError(f"{name} must end in {' or '.join(suffixes)}, got '{path}'")
    check_writable(path, expected)
    held = _HELD.get()
    if claim and held is not None:
        held.enter_context(claimed(path))


def check_folder(folder: Path, file: str) -> None:
    """Make the folder of the results, before the work begins.

    Args:
        folder: The folder.
        file: Name of a file that will be written there.

    Raises:
        OSError: It cannot be made, nothing can be written there, or the disk is full.
    """
    from safeshield.files.atomic import check_writable

    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder / file)
    except OSError as error:
        raise OSError(
            f"--out must be a folder in which you may write, or one that can be made, got "
            f"'{folder}': {error.strerror or error}; choose another folder"
        ) from error
