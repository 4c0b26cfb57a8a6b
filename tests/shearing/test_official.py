"""Gates and constraint against what LLM-Shearing's and CoFi's own modules computed.

``data/l0.*`` were made by princeton-nlp/LLM-Shearing at b87218b and CoFiPruning at da855a8, in
float32 on a CPU: samples, gradients, what is shut, Lagrangians, and 300 steps of an optimizer.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_prune.model.shape import ModelShape
from megatron_prune.shearing import hard_concrete
from megatron_prune.shearing.constraint import Constraint, Size, Warmup, without_lowest
from megatron_prune.shearing.masks import Masks
from megatron_prune.shearing.method import MaskRates
from megatron_prune.shearing.units import Gated, expected_parameters

DATA = Path(__file__).parent / "data"
FACTS = json.loads((DATA / "l0.json").read_text())["cases"]
FOUND = load_file(DATA / "l0.safetensors")
SHAPE = ModelShape(
    num_layers=4, hidden_size=24, ffn_hidden_size=40, num_attention_heads=6, num_query_groups=6,
    kv_channels=4, vocab_size=64,
)  # fmt: skip
MATRICES = ("QD", "KD", "KD", "DQ", "FD", "FD", "DF")
# official module -> our axis; with one head a group, a head is a query group
LETTERS = {"head": "K", "intermediate": "F", "layer": "L", "hidden": "D"}
KEEP = {"K": 4, "F": 28, "L": 3, "D": 16}
SHAPED = ("targeted", "expected_size", "converged", "start")
SAMPLED = (*SHAPED, "halves", "halves_hidden", "global")
STEPS = (0, 1, 100, 320, 640)


def modules(case: str) -> list[str]:
    """Those of a case; LLM-Shearing's in the order that it makes them."""
    facts = FACTS[case]
    found: list[str] = facts.get("modules") or facts["types"]
    return found


def value(case: str, key: str, module: str) -> Tensor:
    return FOUND[f"{case}.{key}.{module}"]


def by_axis(case: str, key: str) -> dict[str, Tensor]:
    """[rows, size] by axis letter."""
    return {
        LETTERS[m]: value(case, key, m).reshape(-1, SHAPE.size(LETTERS[m])) for m in modules(case)
    }


def constraint(case: str) -> Constraint:
    facts = FACTS[case]
    warmup = Warmup(start=facts["start_sparsity"], steps=facts["warmup_steps"])
    axes = tuple(
        Gated(letter=LETTERS[m], rows=1 if m in ("layer", "hidden") else 4,
              size=SHAPE.size(LETTERS[m]), keep=KEEP[LETTERS[m]])
        for m in modules(case)
    )  # fmt: skip
    if facts["target"] is not None:
        return Constraint(axes=axes, warmup=warmup)
    size = Size(target=facts["target_sparsity"], shape=SHAPE, layer=MATRICES, outer=())
    return Constraint(axes=axes, warmup=warmup, size=size)


def close(found: Tensor, wanted: Tensor, within: float = 1e-6) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= within * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("case", SAMPLED)
def test_samples_and_their_gradients(case: str) -> None:
    for module in modules(case):
        a = value(case, "loga_in", module).clone().requires_grad_()
        with torch.no_grad():
            hard_concrete.HardConcrete().bound(a)
        assert torch.equal(a.detach(), value(case, "loga", module))
        gates = hard_concrete.sampled(a, value(case, "u", module))
        close(gates.detach(), value(case, "z_train", module))
        (gates * value(case, "upstream", module)).sum().backward()
        assert a.grad is not None
        close(a.grad, value(case, "dz", module))


@pytest.mark.parametrize("case", [*SAMPLED, "cofi_hidden", "cofi"])
def test_how_likely_a_gate_is_open(case: str) -> None:
    for module in modules(case):
        close(hard_concrete.presence(value(case, "loga", module)), value(case, "score", module))


@pytest.mark.parametrize("case", [*SAMPLED, "cofi_hidden", "cofi"])
def test_what_is_shut_when_judged(case: str) -> None:
    for module in modules(case):
        wanted = value(case, "z_eval", module)
        a = value(case, "loga", module).view(-1, wanted.shape[-1])
        gone = (wanted.view(a.shape) == 0).sum(1).tolist()
        found = without_lowest(hard_concrete.judged(a), gone).view(wanted.shape)
        if "cofi" in case and module in ("mlp", "head_layer"):
            continue  # CoFi shuts whole halves of layers by a rule of its own
        close(found, wanted)


@pytest.mark.parametrize("case", ["expected_size", "start"])
def test_as_many_are_shut_as_are_expected(case: str) -> None:
    found = Masks.at_rest(
        "hard-concrete", constraint(case).axes,
        {"parameters": torch.cat([value(case, "loga", m).reshape(-1) for m in modules(case)])},
    ).judged_as_expected(0)  # fmt: skip
    for letter, wanted in by_axis(case, "z_eval").items():
        close(found[letter], wanted)


@pytest.mark.parametrize("case", [*SHAPED, "global"])
@pytest.mark.parametrize("step", STEPS)
def test_the_lagrangian_and_its_gradients(case: str, step: int) -> None:
    held, facts = constraint(case), FACTS[case]
    names = [f"_{m}" for m in modules(case)] if held.size is None else [""]
    lambdas = torch.tensor(
        [[facts["lambdas"][f"lambda_{n}{name}"] for name in names] for n in (1, 2)]
    )
    lambdas.requires_grad_()
    a = {letter: x.clone().requires_grad_() for letter, x in by_axis(case, "loga").items()}
    present = {letter: hard_concrete.presence(x) for letter, x in a.items()}
    total = held.lagrangian(present, lambdas, step)
    wanted = facts["steps"][str(step)]
    assert math.isclose(total.item(), wanted["lagrangian"], rel_tol=2e-6, abs_tol=2e-6)
    total.backward()
    for letter, gradient in by_axis(case, f"dlagrangian.{step}").items():
        found = a[letter].grad
        assert found is not None
        close(found, gradient)
    assert lambdas.grad is not None
    for number, row in enumerate(lambdas.grad.tolist(), 1):
        for name, one in zip(names, row):
            assert math.isclose(one, wanted["dlambda"][f"lambda_{number}{name}"], abs_tol=1e-6)
    for module, target in zip(modules(case), held.targets(step)):
        word = f"{module}_sparsity" if held.size is None else "sparsity"
        assert math.isclose(target, wanted["reported"][f"target_{word}"], abs_tol=1e-7)


@pytest.mark.parametrize("case", [*SHAPED, "global"])
def test_expected_parameters(case: str) -> None:
    whole = float(expected_parameters({}, SHAPE, MATRICES, ()))
    assert whole == FACTS[case]["prunable_params"]
    found = expected_parameters(by_axis(case, "score"), SHAPE, MATRICES, ())
    assert math.isclose(float(found), FACTS[case]["expected_params"], rel_tol=1e-6)


def _fraction(x: Tensor) -> Tensor:
    return x - x.floor()


GOLDEN = 0.6180339887498949


def _importance(axes: tuple[Gated, ...], names: list[str]) -> Tensor:
    """Of every gate, in the order of ``axes``: what its loss grows by; the fixture's formula."""
    parts = []
    for number, (axis, name) in enumerate(zip(axes, names), 1):
        units = torch.arange(1, axis.rows * axis.size + 1, dtype=torch.float64)
        found = (0.05 + 0.95 * _fraction(units * number * GOLDEN)).float()
        close(found, FOUND[f"trajectory.importance.{name}"].reshape(-1))
        parts.append(found / (axis.rows * axis.size))  # the loss is a mean
    return torch.cat(parts)


class _Fixed(Masks):
    """Masks whose noise is the fixture's instead of a generator's."""

    def noise(self, step: int) -> Tensor:
        units = torch.arange(1, len(self.parameters) + 1, dtype=torch.float64)
        u = _fraction(0.5 + (step * len(units) + units) * GOLDEN)
        return u.clamp(1e-6, 1 - 1e-6).float()


@pytest.mark.parametrize("case", ["trajectory", "trajectory_clipped"])
def test_fifty_steps_of_the_optimizer(case: str) -> None:
    """Gates, multipliers and Adam of both, over the first 50 steps, as the official code has them.

    Rounding grows after that: the fixtures' README allows 1e-2 of the whole of it.
    """
    facts: dict[str, Any] = FACTS[case]
    names, held = modules("targeted"), constraint("targeted")
    held = Constraint(axes=held.axes, warmup=Warmup(steps=facts["warmup_steps"]))
    masks = _Fixed(
        "hard-concrete", held, MaskRates(mask=1.0, lagrangian=(1.0, 1.0)), 0, facts["steps"]
    )
    weight = _importance(held.axes, names)
    rates = FOUND[f"{case}.lr_factor"]
    compared = 0
    for step in range(50):
        gates = hard_concrete.sampled(masks.parameters, masks.noise(step))
        loss = (weight * (1 - gates).square()).sum()
        (gradient,) = torch.autograd.grad(loss, [masks.parameters])
        norm = masks.constrain(gradient, step)
        assert math.isclose(norm, float(FOUND[f"{case}.grad_norm"][step]), rel_tol=1e-4)
        close(loss.detach(), FOUND[f"{case}.task_loss"][step], within=1e-5)
        clip = facts["clip"]
        scale = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        masks.step(step, float(rates[step]), scale)
        if step + 1 not in facts["loga_after_steps"]:
            continue
        compared += 1
        blocks = masks.by_axis(masks.parameters.detach())
        for name in names:
            wanted = FOUND[f"{case}.loga.{step + 1}.{name}"]
            wanted = wanted.clamp(-hard_concrete.BOUND, hard_concrete.BOUND)
            close(blocks[LETTERS[name]], wanted.view(blocks[LETTERS[name]].shape), within=1e-5)
        for row, number in zip(masks.lambdas.tolist(), (1, 2)):
            for name, one in zip(names, row):
                wanted_lambda = float(FOUND[f"{case}.lambda_{number}.{name}"][step])
                assert math.isclose(one, wanted_lambda, rel_tol=1e-5, abs_tol=1e-5)
    assert compared == 6
