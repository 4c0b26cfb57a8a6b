from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from emb_pruner.formats import Vocabulary, open_vocabulary
from emb_pruner.remain_ids import closed_ids, read_ids, write_ids
from megatron_prune.errors import ConfigError, DamagedError
from tests.data.conftest import WORDS, write_bpe


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return open_vocabulary(write_bpe(tmp_path_factory.mktemp("bpe"), " ".join(WORDS * 9), 330))


def test_ids_are_read_as_they_are_written(tmp_path: Path) -> None:
    write_ids(tmp_path / "a.pt", [1, 5, 7])
    assert torch.load(tmp_path / "a.pt", weights_only=True) == [1, 5, 7]
    assert read_ids(tmp_path / "a.pt", 8) == [1, 5, 7]
    torch.save(torch.tensor([7, 1, 5]), tmp_path / "b.pt")  # the predecessor's, by frequency
    assert read_ids(tmp_path / "b.pt", 8) == [1, 5, 7]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1, 8], "8: no ids of this tokenizer, which has 8"),
        ([-1], "-1: no ids"),
        ([1, 1], "1 ids stand more than once"),
        ([1.0], "holds a list, wanted a list of integers"),
        ([True], "wanted a list of integers"),
        ({"a": 1}, "holds a dict"),
        (torch.ones(2), "holds a Tensor"),
        (torch.ones(2, 2, dtype=torch.long), "holds a Tensor"),
        (torch.tensor([True]), "wanted a list of integers"),
    ],
    ids=str,
)
def test_other_values_are_refused(tmp_path: Path, value: Any, said: str) -> None:
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=rf"a\.pt: .*{said}"):
        read_ids(tmp_path / "a.pt", 8)


def test_files_that_hold_code_run_nothing(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "canary",))

    torch.save([Harm()], tmp_path / "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps([Harm()]))
    (tmp_path / "text.pt").write_text("1\n2\n")
    (tmp_path / "empty.pt").touch()
    for name in ("zip.pt", "pickle.pt", "text.pt", "empty.pt"):
        with pytest.raises(DamagedError, match=f"{name}: (names .*; not loaded|cannot be read)"):
            read_ids(tmp_path / name, 8)
    assert not (tmp_path / "canary").exists()
    with pytest.raises(ConfigError, match="no such file"):
        read_ids(tmp_path / "nowhere.pt", 8)


def test_what_is_missing_is_named_or_added(vocabulary: Vocabulary) -> None:
    forest = vocabulary.forest
    top = max(range(forest.size), key=lambda token: len(forest.closure([token])))
    wanted = forest.required | forest.closure([top])
    assert len(wanted - forest.required) > 2
    with pytest.raises(ConfigError, match=r"ids: \d+ tokens are missing .* '<s>'.*; --close adds"):
        closed_ids(vocabulary, [top], close=False, where="ids")
    assert closed_ids(vocabulary, [top], close=True, where="ids") == tuple(sorted(wanted))
    assert closed_ids(vocabulary, sorted(wanted), close=False, where="ids") == tuple(sorted(wanted))
