"""Repair of pruned pico models against a plain loop over transformers' modules in float64.

The reference knows Hugging Face's names, the plan's file and least squares by torch's solver.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.on_ranks import Job, launch
from tests.launch import made_once
from tests.pico import TEXT, ok, slice_by_plan, tensors

SAMPLES, SEQ, DAMPING, READERS_DAMPING = 12, 40, 0.02, 0.03
REPAIR = (
    *("--repair", "--norm-rescale", "--num-samples", SAMPLES, "--seq-length", SEQ),
    *("--repair-target", "own", "--no-repair-readers"),
    *("--repair-damping", DAMPING, "--repair-readers-damping", READERS_DAMPING),
)
PLANS: dict[str, tuple[object, ...]] = {
    "all": (
        *("--hidden-size-remain", 36, "--num-attention-heads-remain", 3, "--drop-layers", "1"),
        *("--ffn-hidden-size-remain", 60, "--balance-for", 3),
    ),
    "heads": ("--num-attention-heads-remain", 3, "--prune-type", "unbalance"),
    "ffn": ("--ffn-hidden-size-remain", 60),
    "hidden": ("--hidden-size-remain", 36),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    words = [*TEXT.split(), *"abcdefghijklmnopqrstuvwxyz"]
    path.write_text(" ".join(random.Random(0).choices(words, k=2000)))
    return path


@pytest.fixture(scope="module")
def repaired(
    models: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """``repaired(kind, plan, *flags)`` -> the plan file and the repaired directory."""
    root, made = tmp_path_factory.mktemp("repaired"), set()

    def prune(kind: str, plan: str, *flags: object) -> tuple[Path, Path]:
        name = "-".join(str(part).strip("-") for part in (kind, plan, *flags))
        file, out = root / f"{kind}-{plan}.json", root / name
        if not file.exists():
            ok("plan", "--load", models(kind), "--save", file, *PLANS[plan], "--seed", 2)
        if name not in made:
            given = ("--load", models(kind), "--plan", file, "--save", out, "--to", "hf")
            ok("prune", *given, *REPAIR, "--data", text, *flags)
            made.add(name)
        return file, out

    return prune


def hf_windows(model: Path, text: Path) -> Tensor:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), add_special_tokens=False)
    return torch.tensor(ids["input_ids"][: SAMPLES * SEQ]).view(SAMPLES, SEQ)


def hf_model(source: Path, weights: dict[str, Tensor], **sizes: int) -> Any:
    """A float64 model of transformers with these weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    for name, size in sizes.items():
        setattr(config, name, size)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    given = {name: x.double() for name, x in weights.items()}
    if config.tie_word_embeddings:
        given["lm_head.weight"] = given["model.embed_tokens.weight"]
    model.load_state_dict(given)
    return model.eval()


@torch.no_grad()
def seen(model: Any, modules: dict[str, Any], ids: Tensor) -> dict[str, Tensor]:
    """The first input of some modules over all tokens, [T, n]."""
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, n=name: found[n].append(args[0]))
        for name, module in modules.items()
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).flatten(0, -2) for name, parts in found.items()}


def hf_energy(model: Any, ids: Tensor) -> Tensor:
    """[2 L + 1, D], by hand."""
    norms = [n for x in model.model.layers for n in (x.input_layernorm, x.post_attention_layernorm)]
    inputs = seen(model, dict(enumerate([*norms, model.model.norm])), ids)
    return torch.stack(
        [(x.square() / (x.square().mean(1, keepdim=True) + 1e-6)).mean(0) for x in inputs.values()]
    )


def unit(x: Tensor) -> Tensor:
    return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()


def solve(x: Tensor, y: Tensor, linear: Any, kept: list[int]) -> tuple[Tensor, Tensor | None]:
    """Ridge regression towards the kept columns, one stacked least squares."""
    xk, old, bias = x[:, kept], linear.weight[:, kept], linear.bias
    x_mean = xk.mean(0) if bias is not None else 0 * xk[0]
    y_mean = y.mean(0) if bias is not None else 0 * y[0]
    xc, yc = xk - x_mean, y - y_mean
    root = (DAMPING * xc.square().sum(0).mean()).sqrt()
    rows = torch.cat([xc, root * torch.eye(len(kept), dtype=x.dtype)])
    weight = torch.linalg.lstsq(rows, torch.cat([yc, root * old.T])).solution.T
    return weight, None if bias is None else y_mean - weight @ x_mean


@torch.no_grad()
def reference(
    source: Path,
    plan_file: Path,
    text: Path,
    target: str = "own",
    statistics: str = "sequential",
    readers: bool = False,
) -> dict[str, Tensor]:
    """The repaired weights under Hugging Face's names, whole in heads and FFN (zeros)."""
    plan, whole = json.loads(plan_file.read_text()), tensors(source)
    kept, width = plan["kept"], plan["source"]["kv_channels"]
    layers = kept["layers"] or list(range(plan["source"]["num_layers"]))
    hidden = kept["hidden"] or list(range(plan["source"]["hidden_size"]))
    ids, dense = hf_windows(source, text), hf_model(source, whole)
    energy = hf_energy(dense, ids)

    cut = plan_file.with_suffix(".cut")
    none = {"heads": None, "query_groups": None, "ffn": None, "vocab": None}
    cut.write_text(json.dumps({**plan, "kept": {**kept, **none}}))
    model = hf_model(
        source, slice_by_plan(whole, cut), hidden_size=len(hidden), num_hidden_layers=len(layers)
    )
    ratio = (energy[:, hidden].mean(1) + (1 - energy.mean(1))).sqrt()
    for block, old in zip(model.model.layers, layers):
        block.input_layernorm.weight.mul_(ratio[2 * old])
        block.post_attention_layernorm.weight.mul_(ratio[2 * old + 1])
    model.model.norm.weight.mul_(ratio[-1])

    above = [*layers[1:], len(dense.model.layers)]
    for block, old, after in zip(model.model.layers, layers, above):
        was = dense.model.layers[old]
        next_norm = [*(x.input_layernorm for x in dense.model.layers), dense.model.norm][after]
        for linear, before, axis, here, there, reached in (
            (
                block.self_attn.o_proj, was.self_attn.o_proj, "heads",
                block.input_layernorm, was.input_layernorm, was.post_attention_layernorm,
            ),
            (
                block.mlp.down_proj, was.mlp.down_proj, "ffn",
                block.post_attention_layernorm, was.post_attention_layernorm, next_norm,
            ),
        ):  # fmt: skip
            if readers:
                parts = ("q_proj", "k_proj", "v_proj") if axis == "heads" else (
                    "gate_proj", "up_proj")  # fmt: skip
                half = (block.self_attn, was.self_attn) if axis == "heads" else (
                    block.mlp, was.mlp)  # fmt: skip
                x = unit(seen(model, {"x": here}, ids)["x"])
                y = unit(seen(dense, {"x": there}, ids)["x"])
                chosen = torch.eye(len(y[0]), dtype=y.dtype)[:, hidden]
                number = 2 * old + (axis == "ffn")
                root = (READERS_DAMPING * x.square().sum(0).mean()).sqrt()
                rows = torch.cat([x, root * torch.eye(len(hidden), dtype=x.dtype)])
                wanted = torch.cat([y, root * ratio[number] * chosen.T])
                mix = torch.linalg.lstsq(rows, wanted).solution.T
                taken = there.weight[:, None] * mix
                lengths = taken.square().sum(0).sqrt()
                for part in parts:
                    weight = getattr(half[1], part).weight
                    getattr(half[0], part).weight.copy_(weight @ (taken / lengths))
                here.weight.copy_(lengths)
            units = (kept[axis] or {}).get(str(old))
            if units is None and target == "own":
                continue
            size = 1 if axis == "ffn" else width
            units = range(linear.weight.shape[1] // size) if units is None else units
            columns = [u * size + i for u in units for i in range(size)]
            x = seen(model, {"x": linear}, ids)["x"]
            x_dense = seen(dense, {"x": before}, ids)["x"]
            if statistics == "dense":
                x, y = x_dense, before(x_dense)[:, hidden]
            elif target == "own":
                y = linear(x)
            else:
                y = before(x_dense)[:, hidden]
            if target == "stream":
                y = seen(dense, {"x": reached}, ids)["x"][:, hidden]
                y = y - seen(model, {"x": here}, ids)["x"]
            weight, bias = solve(x, y, linear, columns)
            linear.weight.zero_()
            linear.weight[:, columns] = weight
            if bias is not None:
                linear.bias.copy_(bias)
    return {name: x for name, x in model.state_dict().items() if name in whole}


def far(found: Path, wanted: dict[str, Tensor], plan_file: Path) -> float:
    """The largest difference, as a share of its tensor's largest value."""
    plan = json.loads(plan_file.read_text())
    shape = {**plan["source"], "hidden_size": plan["target"]["hidden_size"]}
    shape["num_layers"] = plan["target"]["num_layers"]
    layers = plan["kept"]["layers"] or list(range(plan["source"]["num_layers"]))
    kept = {
        axis: values and {str(layers.index(int(old))): x for old, x in values.items()}
        for axis, values in plan["kept"].items()
        if axis in ("heads", "query_groups", "ffn")
    }
    rest = plan_file.with_suffix(".rest")
    whole = {"layers": None, "hidden": None, "vocab": None}
    rest.write_text(json.dumps({**plan, "source": shape, "kept": {**kept, **whole}}))
    sliced, have = slice_by_plan(wanted, rest), tensors(found)
    assert set(sliced) == set(have)
    return max(
        float((have[name].double() - x).abs().max() / x.abs().max()) for name, x in sliced.items()
    )


@pytest.mark.parametrize(
    ("kind", "plan", "flags"),
    [
        ("gqa", "all", {}),
        ("all_bias", "all", {}),
        ("tied", "heads", {}),
        ("qwen", "ffn", {}),
        ("qwen3", "all", {"readers": True}),
        ("gqa", "hidden", {}),
        ("gqa", "all", {"target": "dense"}),
        ("all_bias", "all", {"target": "stream"}),
        ("gqa", "all", {"statistics": "dense"}),
        ("gqa", "all", {"readers": True}),
        ("gqa", "all", {"readers": True, "target": "stream"}),
        ("all_bias", "heads", {"readers": True, "target": "dense"}),
    ],
)
def test_repair_equals_a_plain_loop_in_float64(
    kind: str, plan: str, flags: dict[str, Any], models: Any, repaired: Any, text: Path
) -> None:
    words = [word for key, value in flags.items() for word in (f"--repair-{key}", value)]
    words = [word for word in words if word is not True]
    file, out = repaired(kind, plan, *words)
    wanted = reference(models(kind), file, text, **flags)
    assert far(out, wanted, file) < 1e-4


def test_the_reference_can_tell_the_variants_apart(models: Any, repaired: Any, text: Path) -> None:
    """The control of the test above: each setting changes the result."""
    file, out = repaired("gqa", "all")
    others = ({"target": "dense"}, {"target": "stream"}, {"statistics": "dense"})
    for other in (*others, {"readers": True}):
        assert far(out, reference(models("gqa"), file, text, **other), file) > 1e-2


def test_what_is_not_given_depends_on_what_the_plan_drops(
    models: Any, text: Path, tmp_path: Path
) -> None:
    calibration = ("--repair", "--data", text, "--num-samples", SAMPLES, "--seq-length", SEQ)
    for flags, target, readers, damping in (
        (("--ffn-hidden-size-remain", 60), "own", False, 0.01),
        (("--hidden-size-remain", 36), "stream", True, 0.1),
        (("--drop-layers", 1), "stream", True, 0.1),
        (("--drop-layers", 1, "--repair-target", "dense"), "dense", False, 0.01),
        (("--ffn-hidden-size-remain", 60, "--repair-readers"), "own", True, 0.01),
    ):
        out = tmp_path / "-".join(map(str, flags))
        ok("prune", "--load", models("gqa"), "--save", out, "--to", "hf", *flags, *calibration)
        settings = json.loads((out / "repair.json").read_text())["settings"]
        found = (settings["target"], settings["readers"], settings["damping"])
        assert found == (target, readers, damping), flags


def test_the_errors_told_are_smaller_than_before(repaired: Any) -> None:
    record = json.loads((repaired("gqa", "all")[1] / "repair.json").read_text())
    fitted = [t for t in record["tensors"].values() if t["how"] == "least-squares"]
    assert len(fitted) == 2 * 3
    for tensor in fitted:
        assert 0.05 < tensor["error_after"] < 0.95 * tensor["error_before"]


def test_the_repaired_models_output_is_nearer_to_the_dense_models(
    models: Any, repaired: Any, text: Path, tmp_path: Path
) -> None:
    """End to end, heads alone: logits on the calibration text against the dense model's."""
    file, out = repaired("tied", "heads")
    plain = tmp_path / "plain"
    ok("prune", "--load", models("tied"), "--plan", file, "--save", plain, "--to", "hf")
    ids = hf_windows(models("tied"), text)

    def logits(folder: Path) -> Tensor:
        from transformers import AutoModelForCausalLM

        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(folder)(ids).logits

    dense = logits(models("tied"))
    before, after = ((dense - logits(x)).norm() / dense.norm() for x in (plain, out))
    assert after < 0.9 * before


def test_the_energies_are_transformers(models: Any, text: Path) -> None:
    from megatron_prune.engine.forward.model import ModelOptions
    from megatron_prune.engine.groups import model_parallel
    from megatron_prune.engine.observe.layerwise import norm_energy
    from megatron_prune.model.grid import ParallelGrid
    from megatron_prune.store import open_source

    ids = hf_windows(models("llama3"), text) % 96
    with model_parallel(ParallelGrid()) as groups:
        source = open_source(models("llama3"))
        found = norm_energy(source, ids, groups, ModelOptions(seq_length=SEQ))
    wanted = hf_energy(hf_model(models("llama3"), tensors(models("llama3"))), ids)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mean(1), torch.ones(9), rtol=1e-3, atol=0)
    assert (found - 1).abs().max() > 0.05


# kind, world, windows, target and layout
ON_RANKS = {
    "tp3": ("all_bias", 3, SAMPLES, ("--to", "megatron", "--tensor-model-parallel-size", 3)),
    "dp2": ("all_bias", 2, SAMPLES, ("--to", "hf")),
    "dp2-uneven": ("all_bias", 2, 11, ("--to", "hf")),
    "dp4-idle": ("all_bias", 4, 3, ("--to", "hf")),  # the last rank has no window
    "tp2-dp2": ("qwen_tied", 4, SAMPLES, ("--to", "hf", "--repair-tensor-parallel-size", 2)),
}


@pytest.fixture(scope="module")
def on_ranks(
    models: Any, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[Any], Path, Path]]:
    """Name -> exit codes, what one process made, what the ranks made; unbalanced, target stream."""
    with made_once(tmp_path_factory, "repaired-on-ranks") as (root, fresh):
        if fresh:
            _repair_on_ranks(root, models, text)
    codes = torch.load(root / "codes.pt")
    found = {}
    for name, (kind, _, samples, to) in ON_RANKS.items():
        out = root / (f"{name}-hf" if "megatron" in to else name)
        found[name] = (codes[name], root / f"{kind}-{samples}", out)
    return found


def _repair_on_ranks(root: Path, models: Any, text: Path) -> None:
    for kind in ("all_bias", "qwen_tied"):
        heads = 3 if kind == "all_bias" else 4
        flags = ("--num-attention-heads-remain", heads, "--ffn-hidden-size-remain", 59)
        more = ("--hidden-size-remain", 36, "--prune-type", "unbalance", "--seed", 5)
        ok("plan", "--load", models(kind), "--save", root / f"{kind}.json", *flags, *more)
        if kind == "all_bias":  # TP 3 has to divide the target
            file = root / f"{kind}.json"
            ok("plan", "--load", models(kind), "--save", file, *flags[:3], 60, *more, "--overwrite")
    jobs = []
    for name, (kind, world, samples, to) in ON_RANKS.items():
        given = ("prune", "--load", models(kind), "--plan", root / f"{kind}.json", *REPAIR)
        given = (*given, "--data", text, "--repair-target", "stream", "--repair-readers")
        given = (*given, "--num-samples", samples)
        if not (root / f"{kind}-{samples}").exists():
            ok(*given, "--to", "hf", "--save", root / f"{kind}-{samples}")
        words = [str(word) for word in (*given, *to, "--save", root / name)]
        jobs.append(Job(check="command", world=world, given={"words": words}))
    torch.save(dict(zip(ON_RANKS, launch(jobs, root / "launch"))), root / "codes.pt")
    ok("convert", "--load", root / "tp3", "--save", root / "tp3-hf", "--to", "hf")


@pytest.mark.parametrize("name", ON_RANKS)
def test_ranks_repair_as_one_process_does(name: str, on_ranks: Any) -> None:
    codes, alone, together = on_ranks[name]
    assert codes == [0] * ON_RANKS[name][1]
    wanted, found = tensors(alone), tensors(together)
    assert set(found) == set(wanted)
    for tensor, x in wanted.items():
        assert (found[tensor] - x).abs().max() <= 1e-4 * x.abs().max(), tensor
    one, many = (json.loads((x / "repair.json").read_text()) for x in (alone, together))
    assert one["settings"] == many["settings"]
    assert one["settings"]["samples"] == ON_RANKS[name][2]
    assert set(one["tensors"]) == set(many["tensors"])
