"""``train --teacher`` in one process: the loss is plain torch's, the teacher stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prune.planning.plan import Kept, PrunePlan
from megatron_prune.store import open_source
from tests.engine.divergences import plain_losses
from tests.engine.runs import batches, losses, rows, told, weights, words
from tests.engine.test_train_command import checkpoint_bytes
from tests.pico import directory_bytes, make_model, ok, refused

Train = Callable[..., Path]
LARGER = {"hidden_size": 60, "intermediate_size": 120, "num_hidden_layers": 6}
HIDDEN = ("--distill-hidden-weight", 0.5, "--distill-hidden-layers", "0:1,3:5")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deeper and wider than the student, of its vocabulary."""
    return make_model(tmp_path_factory.mktemp("teacher") / "twin", "twin", **LARGER)


@pytest.fixture
def train(tmp_path: Path, reference: Path, corpus: Path) -> Train:
    """``train(save, *flags)`` of the student runs and succeeds; returns the directory."""

    def once(save: str, *flags: object) -> Path:
        ok(*words(reference / "gqa", tmp_path / save, corpus, *flags))
        return tmp_path / save

    return once


def _hugging_face(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def _told_losses(save: Path, name: str) -> list[float]:
    return [row[name] for row in rows(save) if name in row]


SETTINGS: dict[str, tuple[tuple[object, ...], dict[str, Any], tuple[str, ...]]] = {
    "alone": ((), {}, ("teacher",)),
    "soft": (
        ("--distill-temperature", 2, "--distill-lm-weight", 0.3),
        {"temperature": 2.0, "lm_weight": 0.3},
        ("teacher",),
    ),
    "top-k": (("--distill-top-k", 9), {"top_k": 9}, ("teacher",)),
    "two": (("--teacher-weights", 7, 3), {"weights": (0.7, 0.3)}, ("teacher", "twin")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_those_of_a_plain_torch_loop(
    train: Train, reference: Path, teacher: Path, corpus: Path, name: str
) -> None:
    """Transformers' models, torch's AdamW and clipping, on the same samples: losses and norms."""
    flags, given, names = SETTINGS[name]
    paths = [{"teacher": teacher, "twin": reference / "gqa"}[which] for which in names]
    save = train("run", "--teacher", *paths, *flags, "--lr", "1e-2", "--micro-batch-size", 2)
    student, teachers = _hugging_face(reference / "gqa"), [_hugging_face(path) for path in paths]
    how = {"lm_weight": 0.0, "temperature": 1.0, "top_k": None, "weights": (1.0,), **given}
    matrices = [p for p in student.parameters() if p.ndim == 2]
    vectors = [p for p in student.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    for row, batch in zip([r for r in rows(save) if "lm loss" in r], batches(save, corpus)):
        for group in adam.param_groups:
            group["lr"] = row["learning-rate"]
        tokens, targets = batch[:, :-1], batch[:, 1:].contiguous()
        with torch.no_grad():
            logits = [one(tokens).logits for one in teachers]
        loss, lm, kl = plain_losses(student(tokens).logits, logits, targets, **how)
        loss.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        assert row["lm loss"] == pytest.approx(float(lm.mean()), abs=1e-4)
        assert row["kl loss"] == pytest.approx(float(kl.mean()), abs=1e-4)
        assert row["grad-norm"] == pytest.approx(float(norm), rel=1e-3)
    found = _told_losses(save, "kl loss")
    assert found[-1] < found[0] * 0.9, "nothing was learned from the teacher"


def test_a_run_without_a_weight_on_the_teacher_is_the_run_without_a_teacher(
    train: Train, teacher: Path
) -> None:
    """The same samples in the same order, and the same step."""
    plain, taught = train("plain"), train("taught", "--teacher", teacher, "--distill-lm-weight", 1)
    assert losses(taught) == pytest.approx(losses(plain), abs=1e-5)
    assert all("kl loss" not in row for row in rows(plain))
    validations = [_told_losses(save, "validation loss") for save in (plain, taught)]
    assert validations[0] == pytest.approx(validations[1], abs=1e-5)
    ours, theirs = weights(plain), weights(taught)
    assert all((ours[key] - theirs[key]).abs().max() < 1e-4 for key in ours)


def test_a_student_of_itself_has_nothing_to_learn(train: Train, reference: Path) -> None:
    save = train("run", "--teacher", reference / "gqa", "--weight-decay", 0, "--lr", "1e-6",
                 "--min-lr", 0)  # fmt: skip
    assert max(map(abs, _told_losses(save, "kl loss"))) < 1e-5


def test_the_teacher_is_left_as_it_is(
    tmp_path: Path, reference: Path, teacher: Path, corpus: Path
) -> None:
    from megatron_prune.engine.groups import model_parallel
    from megatron_prune.engine.objectives.distillation import Distillation
    from megatron_prune.engine.train.inputs import open_inputs
    from megatron_prune.engine.train.loop import Training
    from megatron_prune.engine.train.options import TrainOptions
    from megatron_prune.engine.train.signals import StopSignals
    from megatron_prune.model.grid import ParallelGrid

    options = TrainOptions(
        load=reference / "gqa", save=tmp_path / "run", data_path=(str(corpus),), lr=1e-3,
        micro_batch_size=1, global_batch_size=2, seq_length=32, train_iters=2, eval_iters=0,
        teacher=(teacher,),
    )  # fmt: skip
    before = directory_bytes(teacher)
    with model_parallel(ParallelGrid()) as groups, StopSignals() as signals:
        run = Training(options, groups, open_inputs(options, groups))
        assert isinstance(run.objective, Distillation)
        (model,) = run.objective.teachers
        kept = {name: x.clone() for name, x in model.state_dict().items() if x is not None}
        student = {name: x.clone() for name, x in run.model.named_parameters()}
        run.step(signals)
        run.step(signals)
        assert not model.training and run.model.training
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())
        assert all(torch.equal(kept[name], model.state_dict()[name]) for name in kept)
        moved = [not torch.equal(student[name], p) for name, p in run.model.named_parameters()]
        assert all(moved)
    assert directory_bytes(teacher) == before


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--log-interval", 4, "--distill-top-k", 9),
        ("--bf16", "--distill-lm-weight", 0.5),
        HIDDEN,
        ("--recompute-granularity", "selective", *HIDDEN, "--use-distributed-optimizer"),
    ],
    ids=lambda flags: " ".join(map(str, flags)) or "plain",
)
def test_resume_is_bitwise(train: Train, teacher: Path, flags: tuple[object, ...]) -> None:
    flags = ("--teacher", teacher, *flags)
    whole = train("whole", *flags)
    for _ in range(2):
        broken = train("broken", *flags, "--exit-interval", 2, "--save-interval", 1)
    broken = train("broken", *flags)
    assert told(broken) == told(whole)
    assert checkpoint_bytes(broken, 6) == checkpoint_bytes(whole, 6)


@pytest.mark.parametrize("method", ["uniform", "block"])
def test_recomputing_changes_nothing(train: Train, teacher: Path, method: str) -> None:
    plain = train("plain", "--teacher", teacher)
    flags = ("--recompute-granularity", "full", "--recompute-method", method,
             "--recompute-num-layers", 1)  # fmt: skip
    again = train("again", "--teacher", teacher, *flags)
    assert _told_losses(again, "kl loss") == pytest.approx(_told_losses(plain, "kl loss"), abs=1e-6)


# ---- hidden states -------------------------------------------------------------------------------


def _keep_in(states: list[Tensor]) -> Callable[..., None]:
    """A forward hook that keeps what a layer gives."""

    def keep(_: object, __: object, found: Any) -> None:
        states.append(found[0] if isinstance(found, tuple) else found)

    return keep


def test_hidden_states_are_compared_as_plain_torch_does(
    train: Train, reference: Path, corpus: Path, tmp_path: Path
) -> None:
    """Of equal widths, at the first step: nothing has been learned, nothing is projected."""
    twin = make_model(tmp_path / "twin", "twin", num_hidden_layers=6)
    save = train("run", "--teacher", twin, *HIDDEN, "--micro-batch-size", 2)
    batch, states = batches(save, corpus)[0], []
    with torch.no_grad():
        for path, layers in ((reference / "gqa", (0, 3)), (twin, (1, 5))):
            model = _hugging_face(path)
            kept: list[Tensor] = []
            for layer in layers:
                model.model.layers[layer].register_forward_hook(_keep_in(kept))
            model(batch[:, :-1])
            states.append(kept)
    pairs = [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(*states)]
    wanted = float(torch.stack(pairs).mean())
    assert _told_losses(save, "hidden loss")[0] == pytest.approx(wanted, abs=1e-5)
    assert _told_losses(save, "hidden loss")[-1] < wanted


def test_a_projection_is_learned_saved_and_not_exported(
    train: Train, teacher: Path, tmp_path: Path, corpus: Path
) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    save = train("run", "--teacher", teacher, *HIDDEN, "--lr", "1e-2")
    found = _told_losses(save, "hidden loss")
    assert found[-1] < found[0] - 0.01
    stored = FileSystemReader(save / "iter_0000006").read_metadata().state_dict_metadata
    assert [key for key in stored if key.startswith("distill_projections")]
    ok("convert", "--load", save, "--save", tmp_path / "hf", "--to", "hf")
    refused(*words(save, tmp_path / "other", corpus), says="the projections of --distill-hidden")
    ok(*words(save, tmp_path / "other", corpus, "--finetune"))
    assert _hugging_face(tmp_path / "hf").config.hidden_size == 48


# ---- vocabularies --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def restricted(
    tmp_path_factory: pytest.TempPathFactory, reference: Path
) -> tuple[Path, Path, list[int]]:
    """A student pruned in vocabulary and FFN, a corpus of its tokens, the kept ids."""
    folder = tmp_path_factory.mktemp("restricted")
    values = json.loads((reference / "gqa" / "tokenizer.json").read_text())["model"]
    parts = {part for pair in values["merges"] for part in pair}
    leaves = [n for t, n in values["vocab"].items() if n >= 258 and t not in parts]
    kept = [n for n in range(379) if n not in leaves[:40]]
    assert len(kept) == 339
    source = open_source(reference / "gqa")
    plan = PrunePlan(
        source=source.config.shape, criterion="random", seed=0, prune_type="unbalance",
        balance_for=1, source_digest=source.digest,
        kept=Kept(vocab=tuple(kept), ffn={n: tuple(range(60)) for n in range(4)}),
    )  # fmt: skip
    (folder / "plan.json").write_text(plan.to_json())
    student = folder / "student"
    ok("prune", "--load", reference / "gqa", "--plan", folder / "plan.json", "--save", student,
       "--to", "hf")  # fmt: skip
    (folder / "words.jsonl").write_text(
        (reference.parent / "engine-corpus/words.jsonl").read_text()
    )
    ok("preprocess", "--input", folder / "words.jsonl", "--json-key", "text", "--tokenizer-model",
       student, "--output-prefix", folder / "words", "--append-eod")  # fmt: skip
    return student, folder / "words_text_document", kept


def test_a_teacher_of_the_whole_vocabulary_is_restricted_and_renormalised(
    tmp_path: Path, corpus: Path, restricted: tuple[Path, Path, list[int]], teacher: Path
) -> None:
    student, words_of_it, kept = restricted
    ok(*words(student, tmp_path / "run", words_of_it, "--teacher", teacher))
    batch = batches(tmp_path / "run", words_of_it)[0]
    index = torch.tensor(kept)
    with torch.no_grad():
        theirs = _hugging_face(teacher)(index[batch[:, :-1]]).logits[..., index]
        ours = _hugging_face(student)(batch[:, :-1]).logits
    _, lm, kl = plain_losses(
        ours, [theirs], batch[:, 1:].contiguous(), lm_weight=0, temperature=1, top_k=None,
        weights=(1.0,),
    )  # fmt: skip
    first = rows(tmp_path / "run")[0]
    assert first["kl loss"] == pytest.approx(float(kl.mean()), abs=1e-5)
    assert first["lm loss"] == pytest.approx(float(lm.mean()), abs=1e-5)


def test_a_vocabulary_that_was_cut_before_the_rest_still_has_its_teacher(
    tmp_path: Path, restricted: tuple[Path, Path, list[int]], teacher: Path, reference: Path
) -> None:
    """The student's plan.json is that of the second cut, and does not tell of tokens any more."""
    student, words_of_it, _ = restricted
    vocab_plan = student / "vocab_plan.json"
    first, second = tmp_path / "first", tmp_path / "second"
    ok("vocab", "prune", "--load", reference / "gqa", "--plan", vocab_plan, "--save", first,
       "--to", "hf")  # fmt: skip
    ok("prune", "--load", first, "--save", second, "--to", "megatron",
       "--ffn-hidden-size-remain", 60, "--seed", 3)  # fmt: skip
    assert json.loads((second / "iter_0000001/plan.json").read_text())["kept"]["vocab"] is None
    ok(*words(second, tmp_path / "run", words_of_it, "--teacher", teacher))
    found = _told_losses(tmp_path / "run", "kl loss")
    assert len(found) == 6 and found[-1] < found[0]
    for name in ("hf/vocab_plan.json", "manifest.json"):
        (second / "iter_0000001" / name).unlink()
    flags = (*words(second, tmp_path / "other", words_of_it), "--teacher", teacher)
    refused(*flags, says="vocabulary of 379 tokens, the student one of 339")


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--distill-temperature", 2), "--distill-temperature needs --teacher"),
        (("--teacher", "{teacher}", "--distill-temperature", 0), "wanted more than 0"),
        (("--teacher", "{teacher}", "--distill-lm-weight", 1.5), "is 1.5; wanted 0 to 1"),
        (("--teacher", "{teacher}", "--teacher-weights", 1, 2), "2 for 1 teachers"),
        (
            ("--teacher", "{teacher}", "{teacher}", "--teacher-weights", 1, 0),
            "every weight must be more than 0",
        ),
        (("--teacher", "/nowhere"), "/nowhere: does not exist"),
        (("--teacher", "{small}"), "vocabulary of 300 tokens, the student one of 379"),
        (("--teacher", "{other}"), "tokenizer is not the student's"),
        (("--teacher", "{short}"), "max_position_embeddings 16"),
        (("--teacher", "{teacher}", "--distill-hidden-weight", 1), "give both or none"),
        (
            (
                "--teacher",
                "{teacher}",
                "--distill-hidden-weight",
                1,
                "--distill-hidden-layers",
                "0:6",
            ),
            "the teacher's 0 to 5",
        ),
        (
            (
                "--teacher",
                "{teacher}",
                "--distill-hidden-weight",
                1,
                "--distill-hidden-layers",
                "0-6",
            ),
            "STUDENT:TEACHER,...",
        ),
        (
            (
                "--teacher",
                "{teacher}",
                *HIDDEN,
                "--recompute-granularity",
                "full",
                "--recompute-method",
                "uniform",
                "--recompute-num-layers",
                1,
            ),
            "use selective",
        ),
    ],
    ids=lambda value: "",
)
def test_refused_before_anything_is_written(
    tmp_path: Path,
    reference: Path,
    teacher: Path,
    corpus: Path,
    flags: tuple[object, ...],
    says: str,
) -> None:
    from tests.pico import write_tokenizer

    paths = {"teacher": teacher, "small": reference / "mha"}
    if "{other}" in flags:
        paths["other"] = make_model(tmp_path / "other", "twin")
        write_tokenizer(tmp_path / "other", 300)
    if "{short}" in flags:
        paths["short"] = make_model(tmp_path / "short", "twin", max_position_embeddings=16)
    filled = [str(flag).format(**paths) for flag in flags]
    for more in ((), ("--dry-run",)):
        refused(*words(reference / "gqa", tmp_path / "run", corpus, *filled, *more), says=says)
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_the_kept_tokens_elsewhere_is_refused(
    tmp_path: Path, restricted: tuple[Path, Path, list[int]], teacher: Path
) -> None:
    from tests.pico import write_tokenizer

    student, words_of_it, _ = restricted
    other = make_model(tmp_path / "other", "twin")
    write_tokenizer(other, 300)
    flags = ("--teacher", other)
    says = "the student's token"
    refused(*words(student, tmp_path / "run", words_of_it, *flags), says=says)


def test_a_dry_run_tells_what_the_teacher_takes(
    tmp_path: Path, reference: Path, teacher: Path, corpus: Path
) -> None:
    flags = ("--dry-run", "--teacher", teacher, "--pipeline-model-parallel-size", 2)
    done = ok(*words(reference / "gqa", tmp_path / "run", corpus, *flags))
    assert f"{teacher}, 227,700 parameters" in done.out
    assert not (tmp_path / "run").exists()
