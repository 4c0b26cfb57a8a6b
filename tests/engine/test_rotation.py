"""``convert --rotate``: the same function in another basis, which is that of the components."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prune.sources.rotated import principal_components
from tests.engine.on_ranks import Job, launch
from tests.pico import IDS, TEXT, ok, run, tensors

SAMPLES, SEQ = 6, 40
CALIBRATION = ("--rotate", "--num-samples", SAMPLES, "--seq-length", SEQ)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    words = [*TEXT.split(), *"abcdefghijklmnopqrstuvwxyz"]
    path.write_text(" ".join(random.Random(0).choices(words, k=2000)))
    return path


def hf(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def moment(model: Any, folder: Path, text: Path) -> Tensor:
    """Second moment of what enters the norms, normalised, by hand."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), add_special_tokens=False)
    windows = torch.tensor(ids["input_ids"][: SAMPLES * SEQ]).view(SAMPLES, SEQ)
    norms = [n for x in model.model.layers for n in (x.input_layernorm, x.post_attention_layernorm)]
    norms.append(model.model.norm)
    found: list[Tensor] = []

    def watch(_: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, 1)
        x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
        found.append(x.T @ x / len(x))

    hooks = [norm.register_forward_pre_hook(watch) for norm in norms]
    model(windows)
    for hook in hooks:
        hook.remove()
    return torch.stack(found).mean(0)


def with_norm_weights(source: Path, to: Path) -> Path:
    """A copy whose norm weights are not all 1, some of them negative."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source)
    draws = torch.Generator().manual_seed(3)
    for name, x in model.named_parameters():
        if "norm" in name:
            x.data = 0.6 + torch.randn(x.shape, generator=draws)
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(source).save_pretrained(to)
    return to


@pytest.mark.parametrize("kind", ["gqa", "tied", "qwen_tied", "all_bias"])
@torch.no_grad()
def test_a_rotated_model_computes_the_same(
    kind: str, models: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source = with_norm_weights(models(kind), tmp_path / "source")
    out = tmp_path / "out"
    told = ok(
        "convert", "--load", source, "--save", out, "--to", "hf", *CALIBRATION, "--data", text
    )
    before, after = hf(source), hf(out)
    wanted, found = before(IDS).logits, after(IDS).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    # ... in the basis of the principal components, most energy first
    turned = moment(after, source, text)
    scale, energy = turned.diagonal().max(), turned.diagonal()
    assert (turned - energy.diag()).abs().max() < 1e-4 * scale
    assert (energy[:-1] >= energy[1:] - 1e-4 * scale).all()
    half = float(energy[:24].sum() / energy.sum())
    assert abs(float(re.search(r" 24 hold (\S+)%", told.out)[1]) - 100 * half) < 0.1
    plain = moment(before, source, text)
    assert (plain - plain.diagonal().diag()).abs().max() > 1e-2 * scale  # it was not so before
    assert not after.config.tie_word_embeddings
    record = json.loads((out / "config.json").read_text())["megatron_prune_rotation"]
    assert record["tokens"] == SAMPLES * SEQ


def test_scores_of_a_rotated_model_keep_the_first_components(
    models: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """The walk on: score, plan, prune, verify need not know that there was a rotation."""
    out, scores, plan = tmp_path / "out", tmp_path / "scores.safetensors", tmp_path / "plan.json"
    ok("convert", "--load", models("tied"), "--save", out, "--to", "hf", *CALIBRATION,
       "--data", text)  # fmt: skip
    ok("score", "--load", out, "--data", text, "--criterion", "residual-energy",
       "--num-samples", SAMPLES, "--seq-length", SEQ, "--save", scores)  # fmt: skip
    ok("plan", "--load", out, "--scores", scores, "--criterion", "residual-energy",
       "--hidden-size-remain", 36, "--save", plan)  # fmt: skip
    assert json.loads(plan.read_text())["kept"]["hidden"] == list(range(36))
    pruned = tmp_path / "pruned"
    ok("prune", "--load", out, "--plan", plan, "--save", pruned, "--to", "hf")
    ok("verify", "--load", pruned, "--source", out, "--plan", plan)


def test_ranks_rotate_as_one_process_does(
    models: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    given = ("convert", "--load", models("tied"), *CALIBRATION, "--data", text)
    ok(*given, "--to", "hf", "--save", tmp_path / "alone")
    targets = {
        "dp2": (2, ("--to", "hf")),
        "tp3": (3, ("--to", "megatron", "--tensor-model-parallel-size", 3)),
    }
    jobs = [
        Job(check="command", world=world,
            given={"words": [str(w) for w in (*given, *to, "--save", tmp_path / name)]})
        for name, (world, to) in targets.items()
    ]  # fmt: skip
    assert launch(jobs, tmp_path / "launch") == [[0] * 2, [0] * 3]
    ok("convert", "--load", tmp_path / "tp3", "--save", tmp_path / "tp3-hf", "--to", "hf")
    wanted = hf(tmp_path / "alone")(IDS).logits
    for name in ("dp2", "tp3-hf"):
        found = hf(tmp_path / name)(IDS).logits
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
        a, b = tensors(tmp_path / "alone"), tensors(tmp_path / name)
        embedding = "model.embed_tokens.weight"
        assert (a[embedding] - b[embedding]).abs().max() < 1e-2 * a[embedding].abs().max()


def test_components_do_not_depend_on_the_solvers_signs() -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=draws, dtype=torch.float64)
    basis = principal_components(x.T @ x)
    torch.testing.assert_close(basis.T @ basis, torch.eye(8, dtype=torch.float64))
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--rotate",), "--rotate without --data"),
        (("--data", "text"), "--data without --rotate"),
        (("--rotate", "--data", "missing"), "is not there"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: tuple[str, ...], said: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    done = run("convert", "--load", models("gqa"), "--save", tmp_path / "out", "--to", "hf", *flags)
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "out").exists()
