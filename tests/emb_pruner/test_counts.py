from __future__ import annotations

import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emb_pruner.counts import Counts, load_counts, merge_counts, save_counts
from megatron_prune.errors import ConfigError, DamagedError

GIVEN = Counts(
    counts_V=np.array([3, 0, 2**40, 5], dtype=np.int64),
    bytes=2**41,
    characters=2**40,
    documents=7,
    tokenizer_digest="ab" * 32,
)


def same(left: Counts, right: Counts) -> bool:
    return (left.counts_V == right.counts_V).all() and replace(
        left, counts_V=right.counts_V
    ) == right


@pytest.fixture()
def saved(tmp_path: Path) -> Path:
    save_counts(tmp_path / "a.npz", GIVEN)
    return tmp_path / "a.npz"


def test_a_file_is_read_as_it_was_written(saved: Path) -> None:
    found = load_counts(saved, GIVEN.tokenizer_digest)
    assert same(found, GIVEN) and found.tokens == 2**40 + 8
    assert [path.name for path in saved.parent.iterdir()] == ["a.npz"]


def test_files_add_up(saved: Path) -> None:
    other = replace(GIVEN, counts_V=np.array([1, 1, 1, 1]), bytes=4, characters=4, documents=1)
    save_counts(saved.with_name("b.npz"), other)
    found = merge_counts([saved, saved.with_name("b.npz")])
    assert found.counts_V.tolist() == [4, 1, 2**40 + 1, 6]
    assert (found.bytes, found.characters, found.documents) == (2**41 + 4, 2**40 + 4, 8)


def test_other_tokenizers_and_files_named_twice_are_refused(saved: Path) -> None:
    other = saved.with_name("b.npz")
    save_counts(other, replace(GIVEN, tokenizer_digest="cd" * 32))
    for call in (lambda: merge_counts([saved, other]), lambda: load_counts(other, "ab" * 32)):
        with pytest.raises(ConfigError, match=r"b\.npz: counts of another tokenizer .*cdcdcd"):
            call()
    with pytest.raises(ConfigError, match=r"a\.npz: named twice"):
        merge_counts([saved, saved.parent / "." / "a.npz"])
    with pytest.raises(ConfigError, match=r"c\.npz: is not there"):
        load_counts(saved.with_name("c.npz"))


def test_bytes_that_are_no_counts_are_damage_and_run_nothing(saved: Path, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "canary",))

    np.savez(tmp_path / "object.npz", counts=np.array([Harm()], dtype=object))
    np.save(tmp_path / "one.npy", np.arange(3))
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Harm()))
    (tmp_path / "empty.npz").touch()
    (tmp_path / "cut.npz").write_bytes(saved.read_bytes()[:-40])
    for name in ("object.npz", "cut.npz"):
        with pytest.raises(DamagedError, match=f"{name}: not a file of `vocab count`"):
            load_counts(tmp_path / name)
    for name in ("one.npy", "pickle.npz", "empty.npz", "other.npz", "plan.json"):
        with pytest.raises(ConfigError, match=f"{name}: .*; wanted a file of `vocab count`"):
            load_counts(tmp_path / name)
    assert not (tmp_path / "canary").exists()


def test_a_flipped_byte_is_refused_or_changes_nothing(saved: Path) -> None:
    whole, rng, refused = saved.read_bytes(), random.Random(0), 0
    for _ in range(500):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        saved.write_bytes(data)
        try:
            assert same(load_counts(saved), GIVEN)
        except (ConfigError, DamagedError):
            refused += 1
    assert refused > 300


def test_counts_that_contradict_themselves_are_damage(saved: Path) -> None:
    with np.load(saved) as archive:
        values = dict(archive)
    for change, said in (
        ({"tokens": 5}, "add up to"),
        ({"counts": np.array([9, -9])}, "add up to"),
        ({"counts": np.array([1.0])}, r"float64\[1\], wanted int64"),
    ):
        np.savez(saved, **(values | change))
        with pytest.raises(DamagedError, match=said):
            load_counts(saved)
    np.savez(saved, **(values | {"version": 9}))
    with pytest.raises(ConfigError, match="counts of version 9; this reads 1"):
        load_counts(saved)
