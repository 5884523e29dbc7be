"""The repository of a shield on the Hugging Face Hub: its file, a card and a picture."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import gymnasium as gym

from safeshield.data.card import DatasetCard, card_of, file_digest
from safeshield.data.dataset import OfflineDataset
from safeshield.files.atomic import written_whole
from safeshield.files.hub import SHIELD_FILE, explained, hub
from safeshield.reporting.evidence import check_log
from safeshield.shield.record import MEAN_COST
from safeshield.shield.replacement import describe
from safeshield.shield.shield import HasShield, Shield, as_shield
from safeshield.values.constraint import ConstraintSource

if TYPE_CHECKING:
    from safeshield.files.signing import PrivateKey

CARD, PICTURE = "README.md", "calibration.png"
_MARK = "library_name: safeshield"
"""Line of the header of a card by which it is recognised as one of this package."""
_PICTURED = f"![Rates and bounds of the tested thresholds]({PICTURE})"
Log = OfflineDataset | str | os.PathLike[str]
ShieldSource = Shield | HasShield | str | os.PathLike[str]


def hub_folder(
    shield: ShieldSource,
    folder: str | os.PathLike[str],
    *,
    repo_id: str = "user/name",
    log: Log | None = None,
    license: str | None = None,
    sign: PrivateKey | None = None,
) -> list[Path]:
    """Write what `Shield.push_to_hub` uploads to a folder: the shield's file, a card, a picture.

    Look at it before you publish it. The files of an earlier shield in the folder are replaced, and
    its picture is removed where the new card has none. Other files are left as they are.

    Args:
        shield: The shield, in any form that `as_shield` takes.
        folder: The folder, which is made where it does not exist.
        repo_id: Name of the repository, for the example in the card.
        log: The log from which the shield was trained, or its file, whose card becomes a part of
            the card; None leaves it out. The log itself is not written.
        license: Identifier of a licence for the card's header, such as "mit"; None leaves it out.
        sign: Private key that signs the file, see `Shield.save`.

    Returns:
        The files.

    Raises:
        OSError: A file cannot be written.
        ValueError: `license` is no identifier, the log has other spaces than the shield, `folder`
            is a file or holds a README.md whose header has no line "library_name: safeshield"; or
            as `Shield.save` and `card_of`.
        ImportError: `sign` is given, and the extra `sign` is not installed.

    >>> import tempfile
    >>> from safeshield import Shield
    >>> from safeshield.reporting import hub_folder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files = hub_folder(Shield.builtin("boat"), folder)
    >>> [file.name for file in files]
    ['shield.safetensors', 'calibration.png', 'README.md']
    """
    if license is not None and not re.fullmatch(r"[A-Za-z0-9.+-]+", license):
        raise ValueError(
            f"license must be an identifier such as 'mit' or 'apache-2.0', got {license!r:.80}"
        )
    shield = as_shield(shield)
    data = None
    if log is not None:
        read = log if isinstance(log, OfflineDataset) else OfflineDataset.load(log)
        check_log(shield, read, "log")
        data = card_of(log)
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise ValueError(f"folder must be a folder or a new one, got the file '{folder}'")
    pictured = _PICTURED in _earlier_card(place)
    place.mkdir(parents=True, exist_ok=True)
    files = [place / SHIELD_FILE]
    shield.save(files[0], sign=sign)
    record = shield.record
    if record is not None and record.kind != MEAN_COST:
        from safeshield.reporting.calibration_picture import draw_calibration

        files.append(place / PICTURE)
        draw_calibration(files[-1], shield)
    elif pictured:
        (place / PICTURE).unlink(missing_ok=True)
    card = _card(shield, repo_id, data, license, file_digest(files[0]), len(files) > 1)
    files.append(place / CARD)
    with written_whole(files[-1]) as part:
        part.write_text(card, encoding="utf-8")
    return files


def push_to_hub(
    shield: Shield,
    repo_id: str,
    *,
    log: Log | None = None,
    license: str | None = None,
    sign: PrivateKey | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload a shield; see `Shield.push_to_hub`."""
    module = hub()
    with tempfile.TemporaryDirectory(prefix="safeshield-hub-") as folder:
        hub_folder(shield, folder, repo_id=repo_id, log=log, license=license, sign=sign)
        with explained(module, repo_id, revision):
            api = module.HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=f"Shield {shield.digest}",
            )
    return str(done.oid)


# -- the card -----------------------------------------------------------------------------------


def _earlier_card(folder: Path) -> str:
    """Return the card that a folder holds, "" where it holds none.

    Raises:
        ValueError: The folder holds a README.md that is no card of this package.
    """
    path = folder / CARD
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    header = text.partition("---\n")[2].partition("\n---")[0] if text.startswith("---\n") else ""
    if _MARK not in header.splitlines():
        raise ValueError(
            f"folder must not hold a {CARD} that is no card of safeshield, but {path} has no line "
            f"'{_MARK}' in its header: name another folder, or move that file away"
        )
    return text


def _card(
    shield: Shield,
    repo_id: str,
    data: DatasetCard | None,
    license: str | None,
    sha256: str,
    picture: bool,
) -> str:
    record = shield.record
    where = None if record is None else record.environment
    head = ["---", _MARK]
    if license is not None:
        head.append(f"license: {license}")
    head += ["tags:", "- safety-shield", "- safe-reinforcement-learning", "---", ""]
    lines = [
        f"# A safety shield{f' for {_code(where)}' if where else ''}",
        "",
        "A shield of the Python package safeshield. It stands between an agent and an environment, "
        "and replaces actions after which, by a safety value that was learned from logged data, a "
        "violation of the constraint could no longer be avoided.",
        "",
        "## What is promised",
        "",
    ]
    if record is None:
        lines.append("**Nothing: this shield is not calibrated.**")
    else:
        lines += [f"> {_plain(record.promise)}", ""]
        lines += [
            "| policy | episodes | that count against it | upper bound | actions replaced |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {_code(one.policy)} | {one.episodes} | {one.violations} | {one.bound:.4g} | "
            f"{one.intervention_rate:.1%} |"
            for one in record.policies
        ]
        lines += ["", f"The calibration was made on {_plain(record.date[:10])}."]
        if picture:
            lines += ["", _PICTURED]
    if shield.log_records:
        lines += ["", "## What logs show", ""]
        lines += [f"- {_plain(one.statement)}" for one in shield.log_records]
    source = "a network estimates it" if shield.constraint is None else _code(shield.constraint)
    lines += [
        "",
        "## The shield",
        "",
        "| | |",
        "|---|---|",
        f"| trained by | {_plain(shield.trained_by) or 'not known'} |",
        f"| observations | {_code(str(shield.observation_space))} |",
        f"| actions | {_code(str(shield.action_space))} |",
        f"| constraint h | {source} |",
        f"| threshold | Q_h <= {shield.threshold:.6g}, in units of h |",
        f"| replacement | {_code(describe(shield.replacement) or 'NearestAcceptable()')} |",
        f"| digest | {_code(shield.digest)} |",
        f"| SHA-256 of {_code(SHIELD_FILE)} | {_code(sha256)} |",
        "",
        "## The data",
        "",
    ]
    lines += (
        ["The log from which it was trained is not described here."]
        if data is None
        else ["```text", str(data).replace("```", "~~~"), "```"]
    )
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "import gymnasium as gym",
        "from safeshield import SafetyShield, Shield",
        *_to_register(shield, where),
        "",
        f'shield = Shield.from_pretrained({repo_id!r})  # pip install "safeshield[hub]"',
        f"env = SafetyShield(gym.make({where or 'the id of your environment'!r}), shield)",
        "```",
        "",
        "A record says what the author of the file says. `verify=` of `from_pretrained` refuses a "
        "file that is not signed with the private key of somebody whom you know; `revision=` "
        "names the commit that you have looked at.",
        "",
    ]
    return "\n".join([*head, *lines])


def _to_register(shield: Shield, where: str | None) -> list[str]:
    """Return lines of the example that import, or name, what is not registered by itself."""
    spec = None if where is None else gym.registry.get(where)
    maker = None if spec is None else spec.entry_point
    source = shield.model.constraint
    modules = {f"the constraint {one.name!r}": _module(one.found) for one in _parts(source)}
    if where is not None:
        module = maker.partition(":")[0] if isinstance(maker, str) else _module(maker)
        modules[f"the environment {where!r}"] = module
    lines = [
        f"# Here import the module that registers {what}."
        for what, module in modules.items()
        if not f"{module}.".startswith(("safeshield.", "gymnasium."))
    ]
    suites = any(f"{module}.".startswith("safeshield.suites.") for module in modules.values())
    return [*(["import safeshield.suites"] if suites else []), *lines]


def _parts(source: ConstraintSource | None) -> tuple[ConstraintSource, ...]:
    return () if source is None else source.parts


def _module(found: object) -> str:
    return str(getattr(found, "__module__", ""))


def _plain(text: str) -> str:
    """Return text from a file as one line of Markdown that holds no markup."""
    return re.sub(r"([\\`*_<>|\[\]#!])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Return text from a file as code in a line of Markdown, also in a table."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', '/')}`"
