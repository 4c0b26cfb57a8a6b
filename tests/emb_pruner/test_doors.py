"""The scripts by the predecessor's names, from outside."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from emb_pruner.formats import open_vocabulary
from emb_pruner.vocab_plan import load_vocab_plan
from tests import launch
from tests.data.conftest import write_bpe
from tests.emb_pruner.test_counting import documents
from tests.pico import directory_bytes, make_model, tensors

DOORS = Path(__file__).parents[2] / "emb_pruner"


def run(script: str, *args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    if script == "plan":
        return launch.fork_and_wait(launch.PROGRAM, "vocab", "plan", *args, cwd=cwd)
    return launch.fork_and_wait({"file": str(DOORS / script)}, *args, cwd=cwd)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bpe(tmp_path_factory.mktemp("bpe"), "\n".join(documents(80)), vocab_size=600)


@pytest.mark.parametrize(
    ("family", "option"),
    [("llama_emb_pruner", "--spm"), ("qwen_emb_pruner", "--model_name_or_path")],
)
def test_counts_then_the_ids_that_remain(
    family: str, option: str, tokenizer: Path, tmp_path: Path
) -> None:
    text = "\n".join(documents(20, seed=3))
    (tmp_path / "mmlu.json").write_text(text)
    more = ("--vocab_freq", "freq", "--remain_vocab_size", 401, "--data_type", "txt")
    script = f"{family}/get_vocab_freq.py"
    done = run(script, option, tokenizer, "--data_path", "mmlu.json", *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    vocabulary = open_vocabulary(tokenizer)
    ids = vocabulary.encode([text])[0]
    lines = [line.split() for line in (tmp_path / "freq.txt").read_text().splitlines()]
    counts = {int(token): int(count) for token, count in lines}
    assert counts == {token: ids.count(token) for token in range(vocabulary.size)}
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    kept = torch.load(tmp_path / "remain_vocab_ids.pt", weights_only=True)
    assert len(kept) == 401 and vocabulary.forest.closure(kept) | vocabulary.forest.required == set(
        kept
    )


def test_a_plan_of_ids_is_closed_or_refused(tokenizer: Path, tmp_path: Path) -> None:
    forest = open_vocabulary(tokenizer).forest
    top = max(set(range(forest.size)) - forest.dead, key=lambda t: len(forest.closure([t])))
    torch.save([top], tmp_path / "remain_vocab_ids.pt")
    named = ("--tokenizer", tokenizer, "--keep-ids", "remain_vocab_ids.pt", "--save", "plan.json")
    done = run("plan", *named, "--any-size", cwd=tmp_path)
    assert done.returncode == 2 and "tokens are missing that have to stay" in done.stderr
    assert not (tmp_path / "plan.json").exists()
    done = run("plan", *named, "--close", cwd=tmp_path)
    assert done.returncode == 2 and "not a multiple of 128" in done.stderr
    done = run("plan", *named, "--close", "--vocab-size-remain", 384, cwd=tmp_path)
    assert done.returncode == 2 and "leave out --vocab-size-remain" in done.stderr
    done = run("plan", *named, "--close", "--any-size", "--save-ids", "all.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = load_vocab_plan(tmp_path / "plan.json").kept
    assert set(kept) == forest.closure([top]) | forest.required
    assert torch.load(tmp_path / "all.pt", weights_only=True) == list(kept)


@pytest.mark.parametrize(
    "script",
    ["llama_emb_pruner/prune_spm_and_emb.py", "qwen_emb_pruner/prune_tiktoken_and_emb.py"],
)
def test_a_model_is_pruned_to_the_ids_that_remain(
    script: str, tokenizer: Path, tmp_path: Path
) -> None:
    """Rows and tokenizer, against the source's rows taken one by one."""
    model = make_model(tmp_path / "model", "gqa", vocab_size=600)
    for file in tokenizer.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    before, forest = directory_bytes(model), open_vocabulary(model).forest
    top = max(set(range(forest.size)) - forest.dead, key=lambda t: len(forest.closure([t])))
    torch.save([top], tmp_path / "remain_vocab_ids.pt")
    more = ("--hf_dir", "model", "--save", "pruned", "--remain_ids_with_spt", "kept.pt")
    done = run(script, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = torch.load(tmp_path / "kept.pt", weights_only=True)
    assert set(kept) == forest.closure([top]) | forest.required
    source, pruned = tensors(model), tensors(tmp_path / "pruned")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(pruned[name], torch.stack([source[name][token] for token in kept]))
    assert open_vocabulary(tmp_path / "pruned").size == len(kept)
    assert directory_bytes(model) == before
    assert run(script, *more, cwd=tmp_path).returncode == 2  # there is a model already
