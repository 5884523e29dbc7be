"""Reading logs from files: exact, in the memory of the arrays, and whole or not at all."""

from __future__ import annotations

import tempfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeshield.data import OfflineDataset, card_of, storage
from safeshield.data.storage import DSRL_KEYS

FLAGS = ("terminals", "timeouts")


def dsrl_arrays(steps: int, width: int = 3, seed: int = 0) -> dict[str, Any]:
    """The arrays of a DSRL file, in float64; episodes of at most 7 steps."""
    rng = np.random.default_rng(seed)
    ends = (np.arange(steps) % 7 == 6) | (np.arange(steps) == steps - 1)
    terminals = ends & (rng.random(steps) < 0.5)
    return {
        "observations": rng.normal(size=(steps, width)),
        "next_observations": rng.normal(size=(steps, width)),
        "actions": rng.uniform(-1, 1, (steps, 2)),
        "rewards": rng.normal(size=steps),
        "costs": rng.integers(0, 2, steps).astype(float),
        "terminals": terminals,
        "timeouts": ends & ~terminals,
    }


def write_hdf5(path: Path, arrays: dict[str, Any], **options: Any) -> Path:  # noqa: ANN401
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file.create_dataset(key, data=value, **options)
    return path


def fields(log: OfflineDataset) -> dict[str, Any]:
    names = {"terminals": "terminated", "timeouts": "truncated"}
    return {key: getattr(log, names.get(key, key)) for key in DSRL_KEYS}


@given(
    steps=st.integers(1, 60),
    dtype=st.sampled_from(["f2", "<f4", ">f4", "<f8", ">f8", "i1", "i8", "u2"]),
    flags=st.sampled_from(["?", "f4", "f8", "u1", "i8"]),
    rows=st.none() | st.integers(1, 70),
    filters=st.sampled_from(
        [
            {},
            {"compression": "gzip"},
            {"compression": "gzip", "shuffle": True},
            {"compression": "gzip", "fletcher32": True},
            {"shuffle": True, "fletcher32": True},
        ]
    ),
    columns=st.booleans(),
    block=st.integers(1, 400) | st.just(storage.BLOCK_BYTES),
    cores=st.sampled_from([1, 3]),
    seed=st.integers(0, 999),
)
def test_hdf5_is_read_as_numpy_casts_it(
    steps: int,
    dtype: str,
    flags: str,
    rows: int | None,
    filters: dict[str, Any],
    columns: bool,
    block: int,
    cores: int,
    seed: int,
) -> None:
    """Whatever dtype, layout, chunks, blocks, threads: the same float32 numbers and flags."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_cores", lambda: cores)
        patch.setattr(storage, "_LEAST_CHUNK", 1)
        patch.setattr(storage, "BLOCK_BYTES", block)
        arrays = stored(steps, dtype, flags, columns, seed)
        with h5py.File(Path(folder) / "log.hdf5", "w") as file:
            for key, value in arrays.items():
                chunks = rows and (min(rows, steps), *(min(2, n) for n in value.shape[1:]))
                some = filters if rows else {}
                file.create_dataset(key, data=value, chunks=chunks, **some)
        assert_read(Path(folder) / "log.hdf5", arrays)


@given(
    steps=st.integers(1, 60),
    dtype=st.sampled_from(["f2", "<f4", ">f4", "<f8", "i1", "u2"]),
    flags=st.sampled_from(["?", "f8", "i8"]),
    by_columns=st.booleans(),
    columns=st.booleans(),
    packed=st.booleans(),
    block=st.integers(8, 400),
    seed=st.integers(0, 999),
)
def test_npz_is_read_as_numpy_casts_it(
    steps: int,
    dtype: str,
    flags: str,
    by_columns: bool,
    columns: bool,
    packed: bool,
    block: int,
    seed: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "BLOCK_BYTES", block)
        arrays = stored(steps, dtype, flags, columns, seed)
        if by_columns:
            arrays = {key: np.asfortranarray(value) for key, value in arrays.items()}
        save = np.savez_compressed if packed else np.savez
        save(Path(folder) / "log.npz", **arrays)
        assert_read(Path(folder) / "log.npz", arrays)


def stored(steps: int, dtype: str, flags: str, columns: bool, seed: int) -> dict[str, Any]:
    arrays = dsrl_arrays(steps, seed=seed)
    for key, value in arrays.items():
        kept = value.astype(flags if key in FLAGS else dtype)
        arrays[key] = kept[:, None] if columns and kept.ndim == 1 else kept
        if key == "costs":
            arrays[key] = abs(arrays[key])
    return arrays


def assert_read(path: Path, arrays: dict[str, Any]) -> None:
    for key, value in fields(OfflineDataset.load(path)).items():
        expected = arrays[key].astype(bool if key in FLAGS else np.float32)
        if key not in storage.VECTOR_KEYS:
            expected = expected.reshape(-1)
        np.testing.assert_array_equal(value, expected, key, strict=True)
        assert not value.flags.writeable


@pytest.mark.parametrize("width", [3, 40])
@pytest.mark.parametrize("cores", [1, 2])
def test_threads_read_what_hdf5_reads(
    tmp_path: Path, width: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of all rows or a few columns, at the edge, and such that a writer did not pack."""
    monkeypatch.setattr(storage, "_cores", lambda: cores)
    monkeypatch.setattr(storage, "_LEAST_CHUNK", 1)
    values = np.random.default_rng(0).normal(size=(500, width)).astype(np.float32).round(2)
    with h5py.File(tmp_path / "log.hdf5", "w") as file:
        for chunks in ((50, width), (70, 2), (9, 1)):
            for shuffle in (False, True):
                file.create_dataset(
                    f"{chunks}{shuffle}", data=values, chunks=chunks, compression=9, shuffle=shuffle
                )
        # What a writer skipped at a chunk is a bit for each filter, in their order.
        for name, mask in (("(50, 3)False", 1), ("(50, 3)True", 2), ("(50, 3)True", 3)):
            if name in file:
                file[name].id.write_direct_chunk((50 * mask, 0), bytes(range(200)) * 3, mask)
        for entry in file.values():
            out = np.empty(values.shape, np.float32)
            storage.read_into(out, entry, out.__setitem__)
            np.testing.assert_array_equal(out.view(np.uint32), entry[()].view(np.uint32))


@pytest.mark.parametrize("kind", ["plain", "gzip", "npz"])
def test_loading_takes_the_memory_of_the_arrays(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from float64: no copy in the file's dtype, no second copy of anything."""
    monkeypatch.setattr(storage, "BLOCK_BYTES", 1 << 17)
    arrays = dsrl_arrays(30_000, width=40)
    if kind == "npz":
        np.savez(tmp_path / "log.npz", **arrays)
        path = tmp_path / "log.npz"
    else:
        path = write_hdf5(tmp_path / "log.hdf5", arrays, compression={"gzip": 1}.get(kind))
    del arrays
    OfflineDataset.load(path)  # what is imported and kept at the first load
    tracemalloc.start()
    try:
        log = OfflineDataset.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = sum(value.nbytes for value in vars(log).values() if isinstance(value, np.ndarray))
    assert size > 10e6
    assert peak < 1.1 * size


# Damage


@pytest.mark.parametrize("kind", ["plain", "gzip", "npz"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, kind: str) -> None:
    arrays = dsrl_arrays(400)
    path = tmp_path / ("log.npz" if kind == "npz" else "log.hdf5")
    if kind == "npz":
        np.savez_compressed(path, **arrays)
    else:
        write_hdf5(path, arrays, compression={"gzip": 1}.get(kind))
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 97), *range(len(whole) - 40, len(whole))}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"log\.(hdf5|npz) is damaged or not a log"):
            OfflineDataset.load(path)
    path.write_bytes(whole)
    assert len(OfflineDataset.load(path)) == 400


@pytest.mark.parametrize(
    "options",
    [{"compression": "gzip"}, {"fletcher32": True}, {"compression": "gzip", "fletcher32": True}],
    ids=str,
)
def test_a_flipped_bit_never_changes_a_number_where_there_are_checksums(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Fletcher32 is HDF5's own; gzip ends in an Adler32 of what was packed, some bits unused."""
    arrays = dsrl_arrays(400)
    path = write_hdf5(tmp_path / "log.hdf5", arrays, chunks=None, **options)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    with h5py.File(path) as file:
        places = []
        for key in DSRL_KEYS:
            info = file[key].id.get_chunk_info(0)
            places += [info.byte_offset + int(rng.integers(info.size)) for _ in range(10)]
    errors = []
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            assert_read(path, arrays)
        except ValueError as error:
            errors.append(str(error))
    assert all("log.hdf5 is damaged or not a log" in error for error in errors)
    assert len(errors) >= (len(places) if options.get("fletcher32") else 0.9 * len(places))


def test_a_flipped_bit_without_checksums_shows_in_the_digest(tmp_path: Path) -> None:
    """Nothing in such a file tells: that is what the SHA-256 on the card is for."""
    path = write_hdf5(tmp_path / "log.hdf5", dsrl_arrays(400))
    before, log = card_of(path), OfflineDataset.load(path)
    with h5py.File(path) as file:
        place = file["rewards"].id.get_offset() + 8 * 100
    content = bytearray(path.read_bytes())
    content[place + 6] ^= 1  # of the fraction's upper bits
    path.write_bytes(content)
    changed = OfflineDataset.load(path).rewards != log.rewards
    assert np.flatnonzero(changed).tolist() == [100]
    assert card_of(path).sha256 != before.sha256


@pytest.mark.parametrize("change", [-4, 4, 1 << 24])
def test_a_chunk_of_another_size_is_refused(
    tmp_path: Path, change: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that expands to much more than its place holds is never unpacked whole."""
    monkeypatch.setattr(storage, "_cores", lambda: 2)
    path = write_hdf5(tmp_path / "log.hdf5", dsrl_arrays(1000), compression="gzip")
    with h5py.File(path, "a") as file:
        del file["rewards"]
        entry = file.create_dataset("rewards", (1000,), "<f8", chunks=(1000,), compression="gzip")
        entry.id.write_direct_chunk((0,), zlib.compress(bytes(8000 + change)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"log\.hdf5 is damaged.*a chunk (has|ends)"):
            OfflineDataset.load(path)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def test_what_a_stopped_writer_left_out_is_not_read_as_zeros(tmp_path: Path) -> None:
    arrays = dsrl_arrays(100)
    path = tmp_path / "log.hdf5"
    for chunks, message in (((10,), "6 of 10 parts of 'rewards'"), (None, "1 of 1 parts")):
        with h5py.File(path, "w") as file:
            for key, value in arrays.items():
                if key != "rewards":
                    file[key] = value
            rewards = file.create_dataset("rewards", (100,), "f4", chunks=chunks)
            if chunks:
                rewards[:40] = 1.0
        with pytest.raises(ValueError, match=rf"log\.hdf5 is damaged.*{message}.*never written"):
            OfflineDataset.load(path)


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_keys_of_different_lengths_are_named_before_any_is_read(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = dsrl_arrays(20)
    path = tmp_path / f"log{suffix}"
    monkeypatch.delattr(storage, "_empty")
    for rewards in (arrays["rewards"][:13], np.float64(3.0)):
        changed = arrays | {"rewards": rewards}
        if suffix == ".npz":
            np.savez(path, **changed)
        else:
            write_hdf5(path, changed)
        with pytest.raises(ValueError, match=r"log\.(hdf5|npz): every key .* 'rewards': (13|None)"):
            OfflineDataset.load(path)


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
@pytest.mark.parametrize("flags", [np.full(20, 0.5), np.full(20, 2, np.uint8).view(np.bool_)])
def test_flags_are_0_or_1_byte_for_byte(tmp_path: Path, suffix: str, flags: np.ndarray) -> None:
    arrays = dsrl_arrays(20) | {"timeouts": flags}
    path = tmp_path / f"log{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        write_hdf5(path, arrays)
    with pytest.raises(ValueError, match=r"log\..*'timeouts' must hold booleans"):
        OfflineDataset.load(path)


@pytest.mark.parametrize(("change", "message"), [(-8, "shorter"), (8, "longer")])
def test_members_of_npz_are_as_long_as_they_say(tmp_path: Path, change: int, message: str) -> None:
    """Also where the archive around them, checksums included, is in order."""
    path, other = tmp_path / "log.npz", tmp_path / "other.npz"
    np.savez(path, **dsrl_arrays(20))
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "rewards.npy":
                content = content[:change] if change < 0 else content + bytes(change)
            target.writestr(name, content)
    with pytest.raises(ValueError, match=rf"other\.npz is damaged.*{message} than its header"):
        OfflineDataset.load(other)
