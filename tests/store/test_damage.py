"""Random damage to every kind of file (F5): refused with an error of ours, or harmless.

`verify` has to refuse any change of a file that the manifest covers. Reading without it may go well
where no file is shorter and the manifest's hashes are not consulted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_prune.store import open_source
from tests import pico
from tests.pico import assert_same, ok, run, tensors

Models = Callable[[str], Path]
FREE = ("manifest.json", "latest_checkpointed_iteration.txt", "README.md")  # not in the manifest
FORMATS = {
    "hf": ("--to", "hf"),
    "hf-sharded": ("--to", "hf", "--max-shard-size", "2KB"),
    "torch_dist": ("--to", "megatron", "--tensor-model-parallel-size", 2),
    "torch": (
        *("--to", "megatron", "--ckpt-format", "torch"),
        *("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2),
    ),
}
TINY = {
    "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model so small that reading it all takes milliseconds; its tokenizer too."""
    folder = pico.make_model(tmp_path_factory.mktemp("tiny") / "hf", "gqa", **TINY)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "added_tokens": []}')
    return folder


@pytest.fixture(params=sorted(FORMATS))
def checkpoint(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Path:
    """The tiny model pruned by a plan of everything, so that `verify` compares all of it."""
    ok("plan", "--load", tiny, "--save", tmp_path / "plan.json")
    out = ("--save", tmp_path / "c", *FORMATS[request.param])
    ok("prune", "--load", tiny, "--plan", tmp_path / "plan.json", *out)
    return tmp_path / "c"


@contextmanager
def damaged(file: Path, content: bytes) -> Iterator[None]:
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def fuzz(checkpoint: Path, tiny: Path, rounds: int) -> None:
    rng, plan = random.Random(0), checkpoint.parent / "plan.json"
    verify = ("verify", "--load", checkpoint, "--source", tiny, "--plan", plan)
    assert run(*verify).code == 0
    wanted, out = tensors(tiny), checkpoint.parent / "out"
    files, harmless = files_of(checkpoint), 0
    for number in range(rounds):
        file = rng.choice(files)
        content = bytearray(file.read_bytes())
        kind = rng.choice(("flip", "flip", "flip", "cut", "empty", "overwrite"))
        at = rng.randrange(len(content))
        if kind == "flip":
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            content = content[:at]
        elif kind == "empty":
            content = bytearray()
        else:
            content[at : at + 8] = rng.randbytes(len(content[at : at + 8]))
        if content == file.read_bytes():
            continue
        with damaged(file, bytes(content)):
            found = run(*verify)  # an error that is not ours escapes here
            what = f"{number}: {kind} at {at} of {file.name}: {found}"
            assert found.code in (0, 2, 3), what
            if found.code == 0:
                # only what the manifest does not cover
                assert file.name in FREE, what
                harmless += 1
            read = run("convert", "--load", checkpoint, "--save", out, "--to", "hf", "--overwrite")
            assert read.code in (0, 2, 3), f"{what}: {read}"
            if found.code == 0 and read.code == 0:
                assert_same(tensors(out), wanted)
            assert file.suffix not in (".safetensors", ".distcp", ".pt") or (
                kind not in ("cut", "empty") or read.code != 0
            ), f"{what}: a file cut short was read: {read}"
    assert harmless < rounds / 3
    assert run(*verify).code == 0


def test_no_random_damage_is_accepted_or_crashes(checkpoint: Path, tiny: Path) -> None:
    fuzz(checkpoint, tiny, 50)


@pytest.mark.slow
def test_no_random_damage_is_accepted_or_crashes_in_2000_tries(
    checkpoint: Path, tiny: Path
) -> None:
    fuzz(checkpoint, tiny, 2000)


def test_every_kind_of_file_cut_short_is_refused_and_named(checkpoint: Path, tiny: Path) -> None:
    """Before a tensor is read: opening is enough, by the sizes in the manifest."""
    for file in files_of(checkpoint):
        content = file.read_bytes()
        for length in (0, len(content) // 2, len(content) - 1):
            if file.name in FREE:
                continue
            with damaged(file, content[:length]):
                found = run("inspect", checkpoint)
                assert found.code in (2, 3), f"{file.name} cut to {length}: {found}"
                assert file.name in found.err, f"{file.name} cut to {length}: {found}"


def test_every_file_that_is_missing_is_refused_and_named(checkpoint: Path, tiny: Path) -> None:
    for file in files_of(checkpoint):
        if file.name in FREE:
            continue
        content = file.read_bytes()
        file.unlink()
        found = run("inspect", checkpoint)
        file.write_bytes(content)
        assert found.code in (2, 3), f"{file.name}: {found}"
        assert file.name in found.err or file.parent.name in found.err, f"{file.name}: {found}"
    open_source(checkpoint).close()


def test_weights_cut_short_are_refused_without_a_manifest_too(checkpoint: Path, tiny: Path) -> None:
    next(checkpoint.rglob("manifest.json")).unlink()
    for file in files_of(checkpoint):
        if file.suffix not in (".safetensors", ".distcp", ".pt") and file.name != ".metadata":
            continue
        content = file.read_bytes()
        for length in (0, 10, len(content) // 2, len(content) - 1):
            with damaged(file, content[:length]):
                found = run("inspect", checkpoint)
                assert found.code in (2, 3), f"{file.name} cut to {length}: {found}"
