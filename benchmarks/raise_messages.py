"""List every error message of a checkout, so that two checkouts can be compared.

    python benchmarks/raise_messages.py CHECKOUT                  # type and message, sorted
    python benchmarks/raise_messages.py --diff BEFORE AFTER       # removed and new messages

A message is the text after ``raise Type(``. A value that is filled in is written as ``{…}``,
whatever its expression, and a constant of the module is written as its text. The file in which a
message occurs, and the number of its occurrences, make no difference.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

FOLDERS = ("safeshield", "wrappers", "policies")


def text_of(node: ast.expr, constants: Mapping[str, str]) -> str:
    """Return a message with {…} in place of the values that are filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "{…}"
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, constants)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, constants) + text_of(node.right, constants)
    return constants.get(node.id, "{…}") if isinstance(node, ast.Name) else "{…}"


def constants_of(tree: ast.Module) -> dict[str, str]:
    """Return the texts that a module assigns to names at its outermost level."""
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = text_of(node.value, found)
            if text != "{…}":
                found[node.targets[0].id] = text
    return found


def called(node: ast.expr) -> str:
    """Return the name of the function that a call names: `error` of `gym.error(...)`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def errors_of(tree: ast.Module) -> Iterator[str]:
    """Yield "Type: message" of every error that a module makes.

    Errors that a helper returns for its caller to raise are included. They are calls whose name
    ends in Error or Warning and that have an argument.
    """
    constants = constants_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call = node.exc
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
            call = node.value
            if not called(call.func).endswith(("Error", "Needed", "Exit")):
                continue
        else:
            continue
        yield f"{called(call.func)}: {' | '.join(text_of(part, constants) for part in call.args)}"


def messages(checkout: Path) -> set[str]:
    """Return the messages of the package in a checkout."""
    found: set[str] = set()
    for folder in FOLDERS:
        for path in sorted((checkout / folder).rglob("*.py")):
            found.update(errors_of(ast.parse(path.read_text())))
    if not found:
        raise SystemExit(f"{checkout} holds no package: expected {', '.join(FOLDERS)}")
    return found


def main() -> None:
    """List one checkout or compare two; a comparison has the exit status of diff."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", nargs="+", type=Path)
    parser.add_argument("--diff", action="store_true", help="compare two checkouts")
    args = parser.parse_args()
    if len(args.checkouts) != 1 + args.diff:
        parser.error("one checkout, or with --diff two")
    found = [messages(path) for path in args.checkouts]
    if not args.diff:
        print("\n".join(sorted(found[0])))
        return
    gone, new = found[0] - found[1], found[1] - found[0]
    for sign, texts in (("-", gone), ("+", new)):
        for text in sorted(texts):
            print(sign, text)
    print(f"{len(gone)} vanished, {len(new)} new, of {len(found[0])} before")
    sys.exit(bool(gone or new))


if __name__ == "__main__":
    main()
