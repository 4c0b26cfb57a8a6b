"""``generate`` continues a text as transformers does, at every layout and from every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_prune.engine.forward.sampling import Sampling, choose, filtered_logits
from tests.launch import launch
from tests.pico import make_model, ok, refused

PROMPT = "The quick brown fox"
NEW = 12
FLAGS = ("--prompt", PROMPT, "--max-new-tokens", NEW)
TP3 = ("--tensor-model-parallel-size", 3)


def by_transformers(folder: Path, prompt: str = PROMPT) -> str:
    """The greedy text, as anyone would get it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    text = tokenizer.decode(out[0], clean_up_tokenization_spaces=False)
    return str(text).removesuffix("</s>")


@pytest.mark.parametrize("kind", ["gqa", "tied", "qwen", "qwen3"])
def test_one_process_says_what_transformers_says(models, kind: str) -> None:
    wanted = by_transformers(models(kind))
    assert wanted.startswith(PROMPT) and len(wanted) > len(PROMPT)
    assert ok("generate", "--load", models(kind), *FLAGS).out == wanted + "\n"


def test_three_tensor_parallel_ranks_say_the_same_and_only_one_prints(models, shards) -> None:
    wanted = by_transformers(models("gqa")) + "\n"
    hf = ("generate", "--load", models("gqa"), *FLAGS, *TP3)
    ckpt = ("generate", "--load", shards("gqa", "torch", 3), *FLAGS, *TP3)
    done = launch(3, hf, ckpt, (*ckpt, "--sequence-parallel"))
    assert [one.codes for one in done] == [[0, 0, 0]] * 3, done[0].err
    assert done[0].out.startswith(wanted * 3)
    assert [one.out.startswith("codes") for one in done[1:]] == [True, True]


def test_two_pipeline_stages_draw_what_one_process_draws(models) -> None:
    drawn = (*FLAGS, "--temperature", 1.5, "--top-k", 40, "--top-p", 0.9, "--seed", 5)
    wanted = ok("generate", "--load", models("gqa"), *drawn).out
    other = ok("generate", "--load", models("gqa"), *drawn[:-1], 6).out
    assert wanted != other, "another seed draws other tokens"
    stage = ("generate", "--load", models("gqa"), *drawn, "--pipeline-model-parallel-size", 2)
    done = launch(2, stage)
    assert done[0].codes == [0], done[0].err
    assert done[0].out.startswith(wanted)


def test_a_prompt_file_is_the_prompt(models, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(PROMPT)
    flags = ("--prompt-file", tmp_path / "p.txt", "--max-new-tokens", NEW)
    wanted = ok("generate", "--load", models("gqa"), *FLAGS).out
    assert ok("generate", "--load", models("gqa"), *flags).out == wanted


def test_an_end_token_of_the_generation_config_ends_the_text(models, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", "gqa")
    words = ("generate", "--load", folder, *FLAGS)
    assert f"{NEW} tokens" in ok(*words).err
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")
    third = int(model.generate(**ids, max_new_tokens=3, do_sample=False)[0, -1])
    config = json.loads((folder / "generation_config.json").read_text())
    config["eos_token_id"] = [1, third]
    (folder / "generation_config.json").write_text(json.dumps(config))
    done = ok(*words)
    assert "the model ended it" in done.err
    assert f"{NEW} tokens" not in done.err


def test_chat_asks_with_the_models_template(models, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", "gqa")
    refused("generate", "--load", folder, *FLAGS, "--chat", says="has no chat template")
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}model:"
    (folder / "chat_template.jinja").write_text(template)
    asked = f"<s>user: {PROMPT}\nmodel:"
    wanted = by_transformers(folder, asked).removeprefix(asked)
    found = ok("generate", "--load", folder, *FLAGS, "--chat").out
    assert found == wanted.lstrip() + "\n"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--max-new-tokens", 400), "more than the 128 positions of the model; give"),
        (
            ("--prompt", "word " * 200),
            "tokens, the model 128 positions, its answer included; give a prompt of 127 or less",
        ),
        (("--temperature", -1), "--temperature -1.0; wanted 0 (greedy) or more"),
        (("--top-p", 0, "--temperature", 1), "--top-p 0.0; wanted above 0"),
        (("--top-k", 5), "at --temperature 0 none is drawn"),
        (("--load", "/nowhere"), "/nowhere: does not exist"),
        (TP3, "1 processes do not make whole models"),
    ],
)
def test_refused(models, flags: tuple[object, ...], says: str) -> None:
    refused("generate", "--load", models("gqa"), *FLAGS, *flags, says=says)


def test_a_missing_or_empty_prompt_is_refused(models, tmp_path: Path) -> None:
    load = ("generate", "--load", models("gqa"))
    refused(*load, "--prompt-file", tmp_path / "no.txt", says="no.txt")
    refused(*load, "--prompt", "", says="it is empty")


@pytest.mark.parametrize("top_k", [0, 3, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.5, 0.01])
def test_filtering_is_that_of_transformers(top_k: int, top_p: float) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)) * 3
    wanted = TemperatureLogitsWarper(0.7)(None, logits)
    wanted = TopKLogitsWarper(top_k)(None, wanted) if top_k else wanted
    wanted = TopPLogitsWarper(top_p)(None, wanted) if top_p < 1 else wanted
    found = filtered_logits(logits, Sampling(temperature=0.7, top_k=top_k, top_p=top_p))
    assert torch.equal(found.isinf(), wanted.isinf())
    torch.testing.assert_close(found, wanted)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    shares = torch.tensor([0.5, 0.3, 0.2])
    logits = (shares.log() * 2).expand(20_000, 3)  # at temperature 2 they are these shares
    drawn = choose(logits, Sampling(temperature=2.0), torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.tensor(drawn), minlength=3) / len(drawn)
    torch.testing.assert_close(counts, shares, atol=0.015, rtol=0)
