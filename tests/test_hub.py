"""Shields on the Hugging Face Hub, of which a folder and a fake take the place."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from safeshield import OfflineDataset, Shield, collect
from safeshield.files import hub as files_hub
from safeshield.reporting import hub_folder
from safeshield.values.constraint import ConstraintSource

BOAT = "safeshield/Boat-v0"
COMMIT = "0123456789abcdef"


@pytest.fixture(scope="module")
def log() -> OfflineDataset:
    return collect(gym.make(BOAT, max_episode_steps=50), "random", episodes=20, seed=0)


class FakeHub:
    """The Hub as a folder, by the calls of `huggingface_hub` that safeshield makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails: Exception | None = None

    def module(self) -> Any:  # noqa: ANN401
        import huggingface_hub.errors

        return SimpleNamespace(
            HfApi=lambda token: self, hf_hub_download=self.download, errors=huggingface_hub.errors
        )

    def _called(self, name: str, **given: Any) -> None:  # noqa: ANN401
        api = __import__("huggingface_hub")
        real = (
            api.hf_hub_download if name == "download" else partial(getattr(api.HfApi, name), None)
        )
        inspect.signature(real).bind(**given)  # The real function takes these arguments too.
        self.calls.append((name, given))
        if self.fails is not None:
            raise self.fails

    def create_repo(self, repo_id: str, **given: Any) -> None:  # noqa: ANN401
        self._called("create_repo", repo_id=repo_id, **given)

    def create_branch(self, repo_id: str, **given: Any) -> None:  # noqa: ANN401
        self._called("create_branch", repo_id=repo_id, **given)

    def upload_folder(
        self, *, repo_id: str, folder_path: str, revision: str | None, commit_message: str
    ) -> Any:  # noqa: ANN401
        self._called(
            "upload_folder",
            repo_id=repo_id,
            folder_path=folder_path,
            revision=revision,
            commit_message=commit_message,
        )
        shutil.copytree(folder_path, self.folder / repo_id / (revision or "main"))
        return SimpleNamespace(oid=COMMIT)

    def download(self, repo_id: str, filename: str, *, revision: str | None, token: object) -> str:
        self._called("download", repo_id=repo_id, filename=filename, revision=revision, token=token)
        path = self.folder / repo_id / (revision or "main") / filename
        if not path.exists():
            from huggingface_hub.errors import EntryNotFoundError

            raise EntryNotFoundError("404")
        return str(path)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    pytest.importorskip("huggingface_hub")
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(files_hub, "hub", fake.module)
    monkeypatch.setattr("safeshield.reporting.hub_card.hub", fake.module)
    return fake


def test_a_shield_comes_back_as_it_was_pushed(fake: FakeHub, log: OfflineDataset) -> None:
    shield = Shield.builtin("boat")
    assert shield.push_to_hub("me/boat", log=log, license="mit", private=True) == COMMIT
    assert [name for name, _ in fake.calls] == ["create_repo", "upload_folder"]
    assert fake.calls[0][1] == {"repo_id": "me/boat", "private": True, "exist_ok": True}
    again = Shield.from_pretrained("me/boat")
    assert again.digest == shield.digest
    assert again.record == shield.record
    rows = log.observations[:20]
    np.testing.assert_array_equal(again.value(rows), shield.value(rows))
    folder = fake.folder / "me" / "boat" / "main"
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "calibration.png", "shield.safetensors"}


def test_a_revision_is_a_branch_of_its_own(fake: FakeHub) -> None:
    shield = Shield.builtin("boat")
    shield.push_to_hub("me/boat")
    shield.with_delta(0.5).push_to_hub("me/boat", revision="strict")
    assert Shield.from_pretrained("me/boat").delta == shield.delta
    assert Shield.from_pretrained("me/boat", revision="strict", token="t").delta == 0.5
    assert fake.calls[-1][1]["token"] == "t"


def test_a_file_from_the_hub_is_checked_as_any_other(fake: FakeHub, tmp_path: Path) -> None:
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    key, other = (ed25519.Ed25519PrivateKey.generate() for _ in range(2))
    Shield.builtin("boat").push_to_hub("me/boat", sign=key)
    found = Shield.from_pretrained("me/boat", verify=key.public_key())
    assert found.signature == "signature verified"
    with pytest.raises(ValueError, match="signature"):
        Shield.from_pretrained("me/boat", verify=other.public_key())
    file = tmp_path / "me" / "boat" / "main" / "shield.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="digest"):
        Shield.from_pretrained("me/boat")


def test_what_the_hub_answers_is_told(fake: FakeHub) -> None:
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    class ConnectError(Exception):
        """An error of the HTTP client, whose base class has this name."""

    RequestError = type("RequestError", (Exception,), {})
    failed = type("ConnectError", (RequestError,), {})("refused")
    words = "the Hub cannot be reached for 'me/boat': check the network, or copy the file here"
    for fails in (LocalEntryNotFoundError("offline"), failed):
        fake.fails = fails
        with pytest.raises(ConnectionError, match=words):
            Shield.from_pretrained("me/boat")
    with pytest.raises(ConnectionError, match=words):
        Shield.builtin("boat").push_to_hub("me/boat")
    fake.fails = HFValidationError("no")
    with pytest.raises(ValueError, match=r"'user/name', got 'a/b/c'; for a file .* Shield.load"):
        Shield.from_pretrained("a/b/c")
    fake.fails = None
    words = "no shield.safetensors in 'me/none' at revision 'v1', or it is private: check the name"
    with pytest.raises(FileNotFoundError, match=words):
        Shield.from_pretrained("me/none", revision="v1")
    fake.fails = PermissionError("the cache")
    with pytest.raises(PermissionError, match="the cache"):
        Shield.from_pretrained("me/boat")


def test_a_plain_text_stays_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        Shield.load("me/boat")
    Path("me").mkdir()
    Shield.builtin("boat").save("me/boat")
    assert Shield.load("me/boat").digest == Shield.builtin("boat").digest


def test_without_the_extra_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'run pip install "safeshield\[hub\]"'):
        Shield.from_pretrained("me/boat")
    with pytest.raises(ImportError, match=r'run pip install "safeshield\[hub\]"'):
        Shield.builtin("boat").push_to_hub("me/boat")


def test_importing_and_filtering_needs_no_hub() -> None:
    program = (
        "import sys, numpy as np, safeshield; from safeshield import Shield\n"
        "Shield.builtin('boat').filter(np.zeros(2, 'f4'), np.zeros(2, 'f4'))\n"
        "import safeshield.reporting\n"
        "assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# -- the card -----------------------------------------------------------------------------------


def test_the_card_says_what_the_record_and_the_log_say(tmp_path: Path, log: OfflineDataset) -> None:
    shield = Shield.builtin("boat")
    files = hub_folder(shield, tmp_path, repo_id="me/my_boat", log=log, license="apache-2.0")
    card = files[-1].read_text(encoding="utf-8")
    assert "license: apache-2.0\n" in card
    assert shield.record is not None
    assert f"> {shield.record.promise}" in card.replace("\\", "")
    assert shield.digest in card
    assert "20 episodes" in card
    # The example runs, with a path in place of the network.
    (block,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert "Shield.from_pretrained('me/my_boat')" in block
    block = block.replace("Shield.from_pretrained('me/my_boat')", f"Shield.load({str(files[0])!r})")
    names: dict[str, Any] = {}
    exec(compile(block, "card", "exec"), names)
    assert names["env"].reset(seed=0)[1]["shield/certified"]


def test_the_example_names_what_must_be_registered(tmp_path: Path, log: OfflineDataset) -> None:
    shield = Shield.builtin("boat")
    assert shield.record is not None

    def block(changed: Shield) -> str:
        text = hub_folder(changed, tmp_path)[-1].read_text(encoding="utf-8")
        (found,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        return str(found)

    assert "Here import" not in block(shield)
    assert "suites" not in block(shield)
    foreign = block(replace(shield, record=replace(shield.record, environment="Mine-v0")))
    assert "# Here import the module that registers the environment 'Mine-v0'." in foreign
    importlib.import_module("safeshield.suites")  # It registers the benchmarks' environments.
    suite = replace(shield.record, environment="SafetyCarGoal1Gymnasium-v0")
    assert "\nimport safeshield.suites\n" in block(replace(shield, record=suite))
    own = shield.with_constraint(ConstraintSource("mine@1", lambda states: states[:, 0]))
    assert "# Here import the module that registers the constraint 'mine@1'." in block(own)


def test_a_folder_with_another_readme_is_refused_and_an_old_picture_removed(tmp_path: Path) -> None:
    shield = Shield.builtin("boat")
    hub_folder(shield, tmp_path)
    hub_folder(shield.with_delta(0.1), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "shield.safetensors"}
    (tmp_path / "calibration.png").write_bytes(b"of somebody else")
    hub_folder(shield.with_delta(0.1), tmp_path)
    assert (tmp_path / "calibration.png").exists()
    for text in ("# Mine\n", "---\ntags: []\n---\nlibrary_name: safeshield\n"):
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(ValueError, match="has no line 'library_name: safeshield' in its head"):
            hub_folder(shield, tmp_path)
        assert (tmp_path / "README.md").read_text() == text


def test_the_card_of_a_shield_without_a_record_promises_nothing(tmp_path: Path) -> None:
    bare = replace(Shield.builtin("boat").with_delta(0.1), trained_by="<b>|\n# me `x`")
    files = hub_folder(bare, tmp_path)
    assert [file.name for file in files] == ["shield.safetensors", "README.md"]
    card = files[-1].read_text(encoding="utf-8")
    assert "**Nothing: this shield is not calibrated.**" in card
    assert "confidence" not in card
    assert "is not described here" in card
    # What a file says is text, no markup.
    assert r"| trained by | \<b\>\| \# me \`x\` |" in card
    with pytest.raises(ValueError, match="license must be an identifier such as 'mit'"):
        hub_folder(bare, tmp_path, license="mit\ntags: [x]")
