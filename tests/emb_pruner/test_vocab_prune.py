"""`vocab prune`: rows, tokenizer and ids of one model stay one model, from and to any format."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from emb_pruner.prune import vocabulary_axis
from emb_pruner.vocab_plan import VocabPlan
from megatron_prune.model.blocks import EMBEDDING, OUTPUT
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.source import DerivedSource, Source
from megatron_prune.store import open_source
from tests import launch
from tests.emb_pruner.models import (
    END,
    ROWS,
    TALK,
    TOKENS,
    TURN,
    as_bin,
    make_chat_model,
    write_vocab_plan,
)
from tests.pico import (
    TEXT,
    VOCAB,
    assert_same,
    directory_bytes,
    make_model,
    ok,
    refused,
    slice_by_plan,
    tensors,
    write_tokenizer,
)

TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
KEPT = 380
Chat = Callable[[str], Path]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    """Kind -> its chat model, or ``kind.bin``, ``kind.torch`` and so on."""
    root = tmp_path_factory.mktemp("chat")

    def model(name: str) -> Path:
        kind, _, form = name.partition(".")
        if (root / name).exists():
            return root / name
        if not form:
            return make_chat_model(root / kind, kind)
        if form == "bin":
            return as_bin(model(kind), root / name)
        to = ("--to", "megatron", "--ckpt-format", form, TP, 3, PP, 2)
        ok("convert", "--load", model(kind), "--save", root / name, *to)
        return root / name

    return model


@pytest.fixture(scope="module")
def planned(chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VocabPlan]:
    """All kinds have the same tokenizer, and so the same plan."""
    file = tmp_path_factory.mktemp("plan") / "vocab_plan.json"
    return file, write_vocab_plan(chat("gqa"), KEPT, file)


@pytest.fixture(scope="module")
def pruned(
    chat: Chat, planned: tuple[Path, VocabPlan], tmp_path_factory: pytest.TempPathFactory
) -> Chat:
    """Name -> the model `chat` has by it, pruned to a Hugging Face directory."""
    root = tmp_path_factory.mktemp("pruned")

    def model(name: str) -> Path:
        if not (root / name).exists():
            load = ("--load", chat(name), "--plan", planned[0])
            ok("vocab", "prune", *load, "--save", root / name, "--to", "hf")
        return root / name

    return model


def rows_taken(source: dict[str, Tensor], kept: tuple[int, ...]) -> dict[str, Tensor]:
    """The model with those rows, by torch's own index_select."""
    index = torch.tensor(kept)
    vocabulary = ("model.embed_tokens.weight", "lm_head.weight")
    return {n: x.index_select(0, index) if n in vocabulary else x for n, x in source.items()}


@pytest.mark.parametrize("form", ["", ".bin", ".torch_dist", ".torch"])
@pytest.mark.parametrize("kind", ["gqa", "tied"])
def test_rows_are_those_of_the_kept_tokens_bit_by_bit(
    kind: str, form: str, chat: Chat, pruned: Chat, planned: tuple[Path, VocabPlan]
) -> None:
    """Kept rows lie on all of three ranks, which hold 256 each; rows from two of them go."""
    kept = planned[1].kept
    assert {old // 256 for old in kept} == {0, 1, 2}
    assert {old // 256 for old in set(range(TOKENS)) - set(kept)} == {1, 2}
    assert_same(tensors(pruned(kind + form)), rows_taken(tensors(chat(kind)), kept))
    assert directory_bytes(pruned(kind + form)) == directory_bytes(pruned(kind))


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
@pytest.mark.parametrize("kind", ["gqa", "tied"])
def test_a_sharded_target_holds_the_same_rows(
    kind: str,
    ckpt_format: str,
    chat: Chat,
    pruned: Chat,
    planned: tuple[Path, VocabPlan],
    tmp_path: Path,
) -> None:
    load = ("--load", chat(f"{kind}.torch"), "--plan", planned[0])
    to = ("--to", "megatron", "--ckpt-format", ckpt_format, TP, 3, PP, 2)
    done = ok("vocab", "prune", *load, "--save", tmp_path / "m", *to)
    assert f"{KEPT} tokens are padded to 384 rows at TP=3; a multiple of 384 needs" in done.err
    ok("convert", "--load", tmp_path / "m", "--save", tmp_path / "hf", "--to", "hf")
    assert directory_bytes(tmp_path / "hf") == directory_bytes(pruned(kind))


def test_a_vocabulary_of_whole_blocks_is_not_padded(chat: Chat, tmp_path: Path) -> None:
    write_vocab_plan(chat("gqa"), 384, tmp_path / "p.json")
    args = ("--load", chat("gqa"), "--plan", tmp_path / "p.json", "--to", "megatron", "--dry-run")
    done = ok("vocab", "prune", *args, "--save", tmp_path / "m", TP, 3)
    assert "would write" in done.out and "padded" not in done.err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", ["gqa", "tied"])
def test_transformers_loads_it_and_its_logits_are_the_sources_columns(
    kind: str, chat: Chat, pruned: Chat, planned: tuple[Path, VocabPlan]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan = planned[1]
    before, after = (AutoTokenizer.from_pretrained(where(kind)) for where in (chat, pruned))
    assert len(after) == KEPT
    texts = [TALK, TALK.upper(), "naïve café 你好 🙂", "<|turn|>a<|end|></s>"]
    shared = []
    for text in texts:
        old, new = before(text)["input_ids"], after(text)["input_ids"]
        assert after.decode(new) == before.decode(old) == text
        if set(old) <= set(plan.kept):
            assert new == [plan.new_ids[token] for token in old]
            shared.append(old)
    assert 1 < len(shared) < len(texts)
    models = [
        AutoModelForCausalLM.from_pretrained(where(kind)).float().eval() for where in (chat, pruned)
    ]
    ids = torch.tensor(plan.kept)[torch.randperm(KEPT, generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        wanted = models[0](ids[None, :100]).logits[..., torch.tensor(plan.kept)]
        found = models[1](torch.searchsorted(torch.tensor(plan.kept), ids[None, :100])).logits
    assert torch.equal(found, wanted)


def test_ids_in_configurations_and_the_rendered_chat_are_mapped(
    chat: Chat, pruned: Chat, planned: tuple[Path, VocabPlan]
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    new_ids = planned[1].new_ids
    config = json.loads((pruned("gqa") / "config.json").read_text())
    assert config["vocab_size"] == KEPT
    assert (config["bos_token_id"], config["pad_token_id"]) == (new_ids[0], new_ids[END])
    assert config["eos_token_id"] == [new_ids[1], new_ids[END]]
    generation = GenerationConfig.from_pretrained(pruned("gqa"))
    assert generation.eos_token_id == [new_ids[1], new_ids[END]]
    assert generation.suppress_tokens == [new_ids[TURN]]
    before, after = (AutoTokenizer.from_pretrained(where("gqa")) for where in (chat, pruned))
    assert after.get_vocab()["<|end|>"] == new_ids[END] != END
    messages = [{"role": "user", "content": "the"}, {"role": "a", "content": "fox 你"}]
    old, new = (
        tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        for tokenizer in (before, after)
    )
    assert set(old) <= set(planned[1].kept) and TURN in old
    assert new == [new_ids[token] for token in old]


def test_one_manifest_describes_weights_and_tokenizer(
    chat: Chat, pruned: Chat, planned: tuple[Path, VocabPlan], tmp_path: Path
) -> None:
    out = pruned("gqa")
    described = json.loads((out / "manifest.json").read_text())["files"]
    written = {"tokenizer.json", "tokenizer_config.json", "vocab_plan.json", "plan.json"}
    assert written | {"model.safetensors", "generation_config.json"} <= set(described)
    assert (out / "vocab_plan.json").read_text() == planned[0].read_text()
    given = ("--source", chat("gqa"), "--plan", out / "plan.json")
    assert "files as in the manifest" in ok("verify", "--load", out, *given).out
    assert f"vocab_size                   {KEPT}" in ok("inspect", out).out
    assert f"has {KEPT} of the source's tokens" in (out / "README.md").read_text()
    shutil.copytree(out, tmp_path / "p")
    shutil.copy(chat("gqa") / "tokenizer.json", tmp_path / "p")
    refused("verify", "--load", tmp_path / "p", *given, says="tokenizer.json", code=3)


def test_two_ranks_write_the_same_bytes(
    chat: Chat, planned: tuple[Path, VocabPlan], tmp_path: Path
) -> None:
    to = ("--to", "megatron", "--ckpt-format", "torch", TP, 3)
    args = ("vocab", "prune", "--load", chat("tied.torch"), "--plan", planned[0], *to)
    ok(*args, "--save", tmp_path / "one")
    done = launch.launch(2, (*args, "--save", tmp_path / "two"))
    assert [rank.codes for rank in done] == [[0], [0]], done
    assert directory_bytes(tmp_path / "two") == directory_bytes(tmp_path / "one")


class Watched(DerivedSource):
    """A source that remembers how many rows each read asked for."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.rows = list[int]()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        self.rows.append((ROWS if stop is None else stop) - start)
        return super().read(name, start, stop)


@pytest.mark.parametrize("name", [EMBEDDING.name, OUTPUT.name])
def test_no_read_spans_more_rows_than_it_is_to_give(name: str, chat: Chat) -> None:
    """Few tokens kept of many would else copy most of a sharded embedding at once."""
    stored = open_source(chat("gqa.torch_dist"))
    source = Watched(stored)
    kept = tuple(sorted(random.Random(3).sample(range(ROWS), 60)))
    plan = VocabPlan(kept=kept, source_size=ROWS, tokenizer_digest="", method="random")
    pruned = PrunedSource(source, vocabulary_axis(plan, source))
    whole = stored.read(name)
    for start, stop in ((0, 20), (20, 60), (7, 8), (0, None)):
        source.rows.clear()
        found = pruned.read(name, start, stop)
        assert torch.equal(found, whole.index_select(0, torch.tensor(kept[start:stop])))
        assert max(source.rows) <= len(found) and sum(source.rows) < ROWS
        assert kept[-1] - kept[0] > 9 * 60  # so that one read would not do


def write_sentencepiece(model: Path) -> Path:
    """Give a model a bare SentencePiece BPE tokenizer of 600 tokens in the place of its own."""
    import sentencepiece

    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20 + Path(__file__).read_text().splitlines()),
        model_prefix=str(model / "tokenizer"), model_type="bpe", vocab_size=600,
        byte_fallback=True, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    (model / "tokenizer.vocab").unlink()
    return model


def test_a_sentencepiece_model_goes_with_its_rows(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    ids = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": ROWS}
    model = write_sentencepiece(make_model(tmp_path / "m", "gqa", **ids))
    plan = write_vocab_plan(model, 500, tmp_path / "p.json")
    args = ("--load", model, "--plan", tmp_path / "p.json", "--save", tmp_path / "x")
    ok("vocab", "prune", *args, "--to", "megatron", TP, 3)
    ok("convert", "--load", tmp_path / "x", "--save", tmp_path / "hf", "--to", "hf")
    assert_same(tensors(tmp_path / "hf"), rows_taken(tensors(model), plan.kept))
    before, after = (
        SentencePieceProcessor(str(where / "tokenizer.model")) for where in (model, tmp_path / "hf")
    )
    old = before.encode(TEXT)
    assert set(old) <= set(plan.kept)
    assert after.encode(TEXT) == [plan.new_ids[token] for token in old]
    assert not (tmp_path / "hf/tokenizer.json").exists()


def test_what_judges_a_model_takes_the_pruned_tokenizer(
    pruned: Chat, chat: Chat, planned: tuple[Path, VocabPlan], tmp_path: Path
) -> None:
    """From both formats; the text's tokens are all kept."""
    (tmp_path / "text").write_text(TEXT * 20)
    load = ("--load", chat("tied.torch"), "--plan", planned[0], "--to", "megatron")
    ok("vocab", "prune", *load, "--save", tmp_path / "m")
    found = []
    for model in (pruned("tied"), tmp_path / "m", chat("tied")):
        out = tmp_path / f"{len(found)}.json"
        ok("evaluate", "--load", model, "--data", tmp_path / "text", "--seq-length", 48,
           "--json", out)  # fmt: skip
        found.append(json.loads(out.read_text()))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], abs=1e-6)
    assert found[0]["tokens"] == found[2]["tokens"]
    assert found[0]["loss"] < found[2]["loss"]  # fewer tokens share the probability


# ---- with the other axes -------------------------------------------------------------------------

NARROWER = (
    *("--hidden-size-remain", 36, "--num-attention-heads-remain", 3, "--drop-layers", 1),
    *("--ffn-hidden-size-remain", 60),
)


def test_all_axes_are_cut_in_one_pass(
    chat: Chat, planned: tuple[Path, VocabPlan], tmp_path: Path
) -> None:
    load = ("--load", chat("gqa.torch_dist"))
    ok("plan", *load, "--save", tmp_path / "p.json", *NARROWER)
    plans = ("--plan", tmp_path / "p.json", "--vocab-plan", planned[0])
    ok("prune", *load, *plans, "--save", tmp_path / "a", "--to", "hf")
    wanted = slice_by_plan(tensors(chat("gqa")), tmp_path / "p.json")
    assert_same(tensors(tmp_path / "a"), rows_taken(wanted, planned[1].kept))
    both = ("--plan", tmp_path / "a/plan.json")
    assert json.loads(both[1].read_text())["kept"]["vocab"] == list(planned[1].kept)
    ok("verify", "--load", tmp_path / "a", "--source", chat("gqa"), *both)
    # the plan beside the result does it all again; the flags of `plan` go with a vocabulary too
    ok("prune", *load, *both, "--save", tmp_path / "b", "--to", "hf")
    ok(
        "prune",
        *load,
        *NARROWER,
        "--vocab-plan",
        planned[0],
        "--save",
        tmp_path / "c",
        "--to",
        "hf",
    )
    assert_same(tensors(tmp_path / "b"), tensors(tmp_path / "a"))
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert directory_bytes(tmp_path / "c") == directory_bytes(tmp_path / "a")
    refused(
        *(
            "prune",
            *load,
            *both,
            "--vocab-plan",
            planned[0],
            "--save",
            tmp_path / "d",
            "--to",
            "hf",
        ),
        says="keeps a vocabulary of its own (kept.vocab)",
    )


def test_the_vocabulary_alone_goes_by_either_command(
    chat: Chat, pruned: Chat, planned: tuple[Path, VocabPlan], tmp_path: Path
) -> None:
    args = ("--load", chat("tied"), "--vocab-plan", planned[0], "--to", "hf")
    ok("prune", *args, "--save", tmp_path / "a")
    assert directory_bytes(tmp_path / "a") == directory_bytes(pruned("tied"))


def test_a_repair_is_the_same_with_and_without_a_vocabulary(
    chat: Chat, planned: tuple[Path, VocabPlan], tmp_path: Path
) -> None:
    """The text is run in the source's tokens, by the source's own rows."""
    (tmp_path / "text.txt").write_text(TEXT * 200)
    flags = (
        *("--load", chat("gqa"), *NARROWER, "--to", "hf", "--repair", "--norm-rescale"),
        *("--data", tmp_path / "text.txt", "--seq-length", 32, "--num-samples", 8),
    )
    ok("prune", *flags, "--save", tmp_path / "a")
    ok("prune", *flags, "--save", tmp_path / "b", "--vocab-plan", planned[0])
    assert_same(tensors(tmp_path / "b"), rows_taken(tensors(tmp_path / "a"), planned[1].kept))
    against = ("--source", chat("gqa"), "--plan", tmp_path / "b/plan.json")
    assert "repaired as recorded" in ok("verify", "--load", tmp_path / "b", *against).out


# ---- refusals ------------------------------------------------------------------------------------


def refuse(tmp_path: Path, model: Path, plan: Path, *more: object, says: str) -> None:
    args = ("--load", model, "--plan", plan, "--save", tmp_path / "x", "--to", "hf", *more)
    refused("vocab", "prune", *args, says=says)
    assert not (tmp_path / "x").exists()


def test_a_plan_for_another_tokenizer_is_refused(
    chat: Chat, planned: tuple[Path, VocabPlan], tmp_path: Path
) -> None:
    shutil.copytree(chat("gqa"), tmp_path / "m")
    write_tokenizer(tmp_path / "m", 300)
    refuse(tmp_path, tmp_path / "m", planned[0], says="the plan was made for")
    says = "leave the flag out"
    refuse(tmp_path, tmp_path / "m", planned[0], "--tokenizer", chat("gqa"), says=says)


def test_a_model_with_fewer_rows_than_tokens_is_refused(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    write_vocab_plan(models("four"), 300, tmp_path / "p.json")
    says = "has rows for 128 tokens, the tokenizer of"
    refuse(tmp_path, models("four"), tmp_path / "p.json", says=says)
    tokenizer = ("--tokenizer", models("four"), "--save", tmp_path / "out")
    refused("vocab", "plan", *tokenizer, "--vocab-size-remain", 120, "--any-size", says=says)


def test_a_special_token_that_is_dropped_is_refused(
    chat: Chat, planned: tuple[Path, VocabPlan], tmp_path: Path
) -> None:
    """No special token of the tokenizer, but one that its configuration makes one."""
    dropped = min(set(range(TOKENS)) - set(planned[1].kept))
    for name in ("config.json", "generation_config.json"):
        shutil.copytree(chat("gqa"), tmp_path / name)
        file = tmp_path / name / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [1, dropped]}))
        says = f"{name}: eos_token_id is {dropped}, which the plan drops"
        refuse(tmp_path, tmp_path / name, planned[0], says=says)


def test_a_plan_that_is_not_closed_is_refused(chat: Chat, tmp_path: Path) -> None:
    from emb_pruner.formats import open_vocabulary

    plan = write_vocab_plan(chat("gqa"), 320, tmp_path / "p.json")
    forest = open_vocabulary(chat("gqa")).forest
    part = next(
        token for child in plan.kept for token in forest.parts[child] or () if forest.parts[token]
    )
    values = json.loads((tmp_path / "p.json").read_text())
    values |= {"kept": [token for token in plan.kept if token != part], "size": 319}
    (tmp_path / "p.json").write_text(json.dumps(values))
    refuse(tmp_path, chat("gqa"), tmp_path / "p.json", says="without what they are merged")


def test_a_checkpoint_without_its_tokenizer_takes_one_by_name(
    chat: Chat, pruned: Chat, planned: tuple[Path, VocabPlan], tmp_path: Path
) -> None:
    shutil.copytree(chat("tied.torch"), tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "m/iter_0000001/hf" / name).unlink()
    (tmp_path / "m/iter_0000001/manifest.json").unlink()  # it describes them
    refuse(tmp_path, tmp_path / "m", planned[0], says="carries no tokenizer to cut")
    args = ("--load", tmp_path / "m", "--plan", planned[0], "--tokenizer", chat("gqa"))
    ok("vocab", "prune", *args, "--save", tmp_path / "x", "--to", "hf")
    assert_same(tensors(tmp_path / "x"), tensors(pruned("tied")))
    found = (tmp_path / "x/tokenizer.json").read_bytes()
    assert found == (pruned("tied") / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("form", ["SentencePiece BPE", "tokenizers Unigram"])
def test_a_tokenizer_by_any_name_is_written_by_its_own(form: str, tmp_path: Path) -> None:
    """Where transformers looks for it."""
    from transformers import AutoTokenizer

    from emb_pruner.formats import open_vocabulary
    from tests.emb_pruner.formats.conftest import FORMATS

    file = FORMATS[form](tmp_path)
    mine = file.rename(tmp_path / f"my.{file.name}")
    model = make_model(tmp_path / "m", "gqa", vocab_size=open_vocabulary(mine).size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    size = ("--vocab-size-remain", 640, "--save", tmp_path / "p.json")
    ok("vocab", "plan", "--tokenizer", mine, *size)
    args = ("--load", model, "--plan", tmp_path / "p.json", "--tokenizer", mine)
    ok("vocab", "prune", *args, "--save", tmp_path / "x", "--to", "hf")
    assert open_vocabulary(tmp_path / "x").size == 640
    assert len(AutoTokenizer.from_pretrained(tmp_path / "x")) == 640


def test_files_that_are_no_plan_are_refused(
    chat: Chat, models: Callable[[str], Path], plans: Callable[[str], Path], tmp_path: Path
) -> None:
    refuse(tmp_path, chat("gqa"), tmp_path / "none.json", says="No such file")
    refuse(tmp_path, chat("gqa"), plans("gqa"), says="not a vocabulary plan")


def test_a_tokenizer_that_nothing_would_use_is_refused(chat: Chat, tmp_path: Path) -> None:
    args = ("--load", chat("gqa"), "--save", tmp_path / "x", "--to", "hf", *NARROWER)
    refused("prune", *args, "--vocab-tokenizer", chat("gqa"), says="no plan drops tokens")


def test_an_added_token_without_a_row_stays_one(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "gqa")
    add_tokens(model, "[PAD]", "[MORE]")
    (tmp_path / "t.txt").write_text(TEXT * 20)
    source = ("--tokenizer", model)
    says = f"has rows for {VOCAB} tokens and none for '[PAD]' ({VOCAB}), '[MORE]' ({VOCAB + 1})"
    counted = ok("vocab", "count", *source, "--input", tmp_path / "t.txt", "--save", tmp_path / "c")
    size = ("--counts", tmp_path / "c", "--vocab-size-remain", 300, "--any-size")
    planned = ok("vocab", "plan", *source, *size, "--save", tmp_path / "v.json")
    assert says in counted.err and says in planned.err
    load = ("--load", model, "--to", "hf")
    ok("vocab", "prune", *load, "--plan", tmp_path / "v.json", "--save", tmp_path / "o")
    tokenizer = Tokenizer.from_file(str(tmp_path / "o/tokenizer.json"))
    assert [tokenizer.token_to_id(t) for t in ("[PAD]", "[MORE]")] == [300, 301]
    assert tensors(tmp_path / "o")["lm_head.weight"].shape[0] == 300
    verified = ("verify", "--load", tmp_path / "o", "--source", model)
    ok(*verified, "--plan", tmp_path / "o/plan.json")
    ok("prune", *load, "--plan", tmp_path / "o/plan.json", "--save", tmp_path / "p")
    assert_same(tensors(tmp_path / "p"), tensors(tmp_path / "o"))
    assert (tmp_path / "p/tokenizer.json").read_bytes() == (
        tmp_path / "o/tokenizer.json"
    ).read_bytes()


def add_tokens(folder: Path, *names: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(names))
    tokenizer.save(str(folder / "tokenizer.json"))
