"""Settings on the command line: ``--set name=value``, files of settings, and their help."""

from __future__ import annotations

import json
import textwrap
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin

from typer.core import TyperCommand

from safeshield.files.reading import read_whole
from safeshield.files.settings import Field, fields_of

if TYPE_CHECKING:
    from safeshield.training.registry import Algorithm

R = TypeVar("R")


def settings_of(kind: type[R], settings: list[str], **values: Any) -> R:  # noqa: ANN401
    """Return a configuration made of texts such as "seed=3" and of values.

    Args:
        kind: Class of the configuration.
        settings: Texts "name=value", which take precedence over `values`.
        values: Values of settings by name. The other settings have their defaults.

    Raises:
        ValueError: A setting is unknown, or a value has another type.
    """
    hints = {field.name: field.kind for field in fields_of(kind)}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip()
        if not equals:
            raise ValueError(f"--set takes name=value, got '{setting}'")
        if name not in hints:
            raise ValueError(f"--set {name}: no such setting; known: {', '.join(hints)}")
        values[name] = parse(f"--set {name}", text.strip(), hints[name])
    return kind(**values)


def parse(name: str, text: str, hint: Any) -> Any:  # noqa: ANN401 - of any type
    """Return the value that a text stands for, of the type that an annotation asks for.

    Args:
        name: Name of the setting or option in error messages.
        text: Text from the command line.
        hint: Annotation of the setting, without its rule.

    Raises:
        ValueError: The text is no such value.

    >>> parse("--set widths", "(64, 64)", tuple[int, ...])
    (64, 64)
    >>> from typing import Literal
    >>> parse("--set penalty", "prop1", float | Literal["prop1"] | None)
    'prop1'
    """
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        first, *others = (one for one in get_args(hint) if one is not NoneType)
        if text.lower() == "none" and NoneType in get_args(hint):
            return None
        words = [word for one in others for word in get_args(one)]
        if text in words:
            return text
        try:
            return parse(name, text, first)
        except ValueError as error:
            raise ValueError(f"{error}; or one of {words}" if words else str(error)) from None
    if origin is tuple:
        parts = [part for part in text.strip("()[] ").split(",") if part.strip()]
        item = get_args(hint)[0]
        fixed = [one for one in get_args(hint) if one is not ...]
        if len(fixed) == len(get_args(hint)) and len(parts) != len(fixed):
            raise ValueError(f"{name}: takes {len(fixed)} values, got '{text}'")
        return tuple(parse(name, part.strip(), item) for part in parts)
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name}: must be true or false, got '{text}'")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise ValueError(f"{name}: must be {kind}, got '{text}'") from None
    if origin is not None and text not in (choices := get_args(hint)):
        raise ValueError(f"{name}: must be one of {list(choices)}, got '{text}'")
    return text


# -- files --------------------------------------------------------------------------------------


def read_settings(path: Path, kind: type[Any]) -> dict[str, Any]:
    """Return the settings in a TOML or YAML file, as values by name.

    TOML has no null, so the text "none" stands for None where a setting may be None.

    Args:
        path: The file. Its suffix selects the format.
        kind: Class of the configuration to which the settings belong.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is neither TOML nor YAML, or names a setting unknown to the class.
        ModuleNotFoundError: The file is YAML and PyYAML is not installed.
    """
    try:
        text = read_whole(path).decode()
        return _settings_in(path, text, kind)
    except (RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a text of settings: {error}") from error


def _settings_in(path: Path, text: str, kind: type[Any]) -> dict[str, Any]:
    """Return the settings in the text of a file; see `read_settings`."""
    if path.suffix.lower() == ".toml":
        try:
            values: object = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not TOML: {error}") from error
    elif path.suffix.lower() in (".yaml", ".yml"):
        values = _yaml(path, text)
    else:
        raise ValueError(f"a file of settings must end in .toml, .yaml or .yml, got '{path}'")
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings as name and value, got a {type(values)}")
    return known_settings(str(path), values, kind)


def known_settings(
    where: str, values: dict[str, Any], kind: type[Any], *, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return settings from a file, with None in place of the text "none" where it may stand.

    Args:
        where: Place of the settings in error messages.
        values: Values by name.
        kind: Class of the configuration to which the settings belong.
        without: Settings of the class that the file may not set there.

    Raises:
        ValueError: A setting is unknown to the class, or may not be set there.
    """
    hints = {field.name: field.kind for field in fields_of(kind) if field.name not in without}
    unknown = [str(name) for name in values if name not in hints]
    if unknown:
        raise ValueError(
            f"{where}: no such setting: {', '.join(unknown)}; known: {', '.join(hints)}"
        )
    return {
        name: None if value == "none" and type(None) in get_args(hints[name]) else value
        for name, value in values.items()
    }


def preset_settings(where: str, name: str | None, algorithm: Algorithm) -> dict[str, Any]:
    """Return the settings of an algorithm's preset; none where no preset is named.

    Args:
        where: Name of the option, or of the file's entry, for error messages.
        name: Name of the preset.
        algorithm: The algorithm.

    Raises:
        ValueError: The algorithm has no such preset.
    """
    if name is not None and name not in algorithm.presets:
        known = sorted(algorithm.presets) or "none"
        raise ValueError(f"{where} {name}: {algorithm.name} knows {known}")
    return dict(algorithm.presets[name]) if name is not None else {}


def _yaml(path: Path, text: str) -> object:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"reading {path} needs PyYAML: run pip install pyyaml, or write the settings as TOML"
        ) from error
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


def write_settings(path: Path, config: object, heading: str) -> None:
    """Write a configuration as a TOML file that `read_settings` can read.

    Args:
        path: The file.
        config: Configuration whose settings are written.
        heading: Text that is written above them as comments.
    """
    lines = [f"# {line}" for line in heading.splitlines()]
    for field in fields_of(type(config)):
        value = getattr(config, field.name)
        # For the types that settings have, TOML and JSON are written alike.
        lines.append(f"{field.name} = {json.dumps('none' if value is None else value)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# -- help ---------------------------------------------------------------------------------------


def command_with(settings: Callable[[], str]) -> type[TyperCommand]:
    """Return the class of a command whose help ends with the text that `settings` returns."""

    class Command(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - typer's own click
            super().format_help(ctx, formatter)
            formatter.write(settings())

    return Command


def fields_help(kind: type[Any]) -> list[str]:
    """Return the help of each setting of a class: default, meaning with its unit, and rule."""
    return [_entry(*_told(field)) for field in fields_of(kind)]


def settings_help(algorithms: Iterable[Algorithm]) -> str:
    """Return the text that ``safeshield train --help`` prints about the settings of algorithms.

    Each setting is listed with its default, its meaning and unit, and the rule that its values must
    satisfy. A setting that is the same in several algorithms is listed once.

    Args:
        algorithms: The registered algorithms.
    """
    owners: dict[tuple[str, str], list[str]] = {}
    listed = sorted(algorithms, key=lambda one: (not one.offline, one.name))
    for one in listed:
        for field in fields_of(one.config_type):
            owners.setdefault(_told(field), []).append(one.name)
    parts = [
        "Settings: --set NAME=VALUE, or NAME = VALUE in a file for --config.",
        "Settings shared by several algorithms with one default come first, then those of each.\n",
    ]
    shared = {told: names for told, names in owners.items() if len(names) > 1}
    for (head, body), names in shared.items():
        parts.append(_entry(f"{head}  ({', '.join(names)})", body))
    for one in listed:
        presets = f" (--preset {', '.join(one.presets)})" if one.presets else ""
        how = f"--algorithm {one.name}{presets}" if one.offline else f"{one.name}, in Python only"
        head = f"\n{how}: {one.kind.__name__}\n"
        parts.append(f"{head}{textwrap.fill(one.summary, 96)}\n")
        own = [told for told, names in owners.items() if names == [one.name]]
        parts += [_entry(*told) for told in own]
    return "\n".join(parts) + "\n"


def _told(field: Field) -> tuple[str, str]:
    return f"{field.name}={text_of(field.default)}", f"{field.meaning} [{field.rule}]"


def text_of(value: object) -> str:
    """Return a value as the text that ``--set`` accepts."""
    if isinstance(value, list | tuple):
        return ",".join(map(text_of, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _entry(head: str, body: str) -> str:
    # A name that is broken at its hyphen could not be searched for.
    indent = " " * 6
    text = textwrap.fill(
        body, 96, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return f"  {head}\n{text}"
