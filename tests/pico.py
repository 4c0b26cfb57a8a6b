"""Pico models made with transformers, the command line in this process, and a slicer of its own.

Everything here is independent of the code under test but for `run`, which calls the command line.
"""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_prune.cli import main
from tests.launch import free_groups

VOCAB = 379  # a prime: every tensor-parallel size pads it
TEXT = "The quick brown fox jumps over the lazy dog while 12 engineers prune a model, by shard. "
IDS = (torch.arange(48) * 7 % 96)[None]  # tokens that every vocabulary here has
BASE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}
# kind -> (transformers' model type, what differs from BASE, dtype). Divisible by TP: see each.
KINDS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "gqa": ("llama", {}, torch.float32),  # TP 3
    "twin": ("llama", {}, torch.float32),  # gqa's shape, other weights
    "tied": ("llama", {"tie_word_embeddings": True}, torch.float32),  # TP 3
    "mha": ("llama", {"num_key_value_heads": 6, "vocab_size": 300}, torch.float32),  # TP 2, 3, 6
    "mqa": ("llama", {"num_key_value_heads": 1, "vocab_size": 96}, torch.float32),  # TP 1
    "four": (  # TP 2, 4; its vocabulary fills the padding exactly at TP=1
        "llama",
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6, "vocab_size": 128},
        torch.float32,
    ),
    "qwen": ("qwen2", {}, torch.float32),  # QKV bias, TP 3
    "qwen_tied": (  # TP 2, 4
        "qwen2",
        {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
        torch.float32,
    ),
    "all_bias": ("llama", {"attention_bias": True, "mlp_bias": True}, torch.float32),  # TP 3
    "attention_bias": ("llama", {"attention_bias": True}, torch.float32),  # not for Megatron
    "mistral": ("mistral", {"sliding_window": 64}, torch.float32),  # TP 3
    "llama3": ("llama", {"rope_parameters": LLAMA3, "vocab_size": 96}, torch.float32),
    "bf16": ("llama", {}, torch.bfloat16),
    "fp16": ("llama", {"tie_word_embeddings": True}, torch.float16),
    "qwen3": ("qwen3", {"head_dim": 16}, torch.float32),  # TP 3
    "qwen3_tied": (  # TP 2, 4
        "qwen3",
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 12,
            "tie_word_embeddings": True,
        },
        torch.float32,
    ),
}


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer of ``vocab_size`` tokens (at least 258)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT * 20, Path(__file__).read_text()], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)


def make_model(folder: Path, kind: str, **overrides: Any) -> Path:
    """A random model whose weights are large enough that every part of it matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, values, dtype = KINDS[kind]
    values = {**BASE, **values, **overrides}
    if model_type == "qwen2":
        del values["head_dim"]  # Qwen2 derives it
    torch.manual_seed(list(KINDS).index(kind))
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(torch.randn(x.shape) * 0.1 + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(folder)
    write_tokenizer(folder, VOCAB)
    return folder


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def run(*args: object) -> Done:
    """``megatron-prune ARGS`` in this process. What is no error of ours escapes, as a failure."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as ended:  # argparse
            code = ended.code if isinstance(ended.code, int) else 2
        finally:
            free_groups()
    return Done(code, out.getvalue(), err.getvalue())


def ok(*args: object) -> Done:
    """`run`, and it has to succeed."""
    done = run(*args)
    assert done.code == 0, f"{' '.join(map(str, args))}\nexit {done.code}\n{done.err}"
    return done


def refused(*args: object, says: str = "", code: int | tuple[int, ...] = 2) -> str:
    """`run`, and it has to end with ``code`` and ``says`` in its one message; returns that."""
    done, codes = run(*args), (code,) if isinstance(code, int) else code
    assert done.code in codes, f"{' '.join(map(str, args))}\nexit {done.code}\n{done.err}"
    message = done.err.strip().splitlines()[-1]
    assert "error: " in message, done.err
    assert says in message, message
    assert done.out == "", done.out
    return message


def edit_config(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face directory, read by safetensors."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    assert found, f"{folder}: no safetensors"
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert set(found) == set(wanted), set(found) ^ set(wanted)
    for name, x in wanted.items():
        y = found[name]
        assert (y.dtype, y.shape) == (x.dtype, x.shape), name
        assert torch.equal(y.view(torch.uint8), x.view(torch.uint8)), f"{name} differs"


def directory_bytes(folder: Path) -> dict[str, str]:
    """Every file below a directory and its SHA-256."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _units(kept: Any, layer: str, count: int) -> list[int]:
    return list(range(count)) if kept is None else list(kept[layer])


def slice_by_plan(source: dict[str, Tensor], plan_file: Path) -> dict[str, Tensor]:
    """What a plan makes of a model, by plain indexing of Hugging Face's tensors.

    Knows only the plan's file and Hugging Face's names.
    """
    plan = json.loads(plan_file.read_text())
    kept, shape = plan["kept"], plan["source"]
    width = shape["kv_channels"]
    hidden = kept["hidden"] or list(range(shape["hidden_size"]))
    layers = kept["layers"] or list(range(shape["num_layers"]))

    def rows(heads: list[int]) -> list[int]:
        return [head * width + i for head in heads for i in range(width)]

    out = {}
    for name, x in source.items():
        if ".layers." not in name:
            out[name] = x[..., hidden]
            continue
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        if int(layer) not in layers:
            continue
        q = rows(_units(kept["heads"], layer, shape["num_attention_heads"]))
        k = rows(_units(kept["query_groups"], layer, shape["num_query_groups"]))
        f = _units(kept["ffn"], layer, shape["ffn_hidden_size"])
        table = {
            "q_proj": (q, hidden), "k_proj": (k, hidden), "v_proj": (k, hidden),
            "o_proj": (hidden, q), "gate_proj": (f, hidden), "up_proj": (f, hidden),
            "down_proj": (hidden, f), "q_norm": (slice(None), None), "k_norm": (slice(None), None),
        }  # fmt: skip
        first, second = table.get(rest.split(".")[-2], (hidden, None))
        x = x[first]
        if x.ndim == 2:
            x = x[:, second]
        out[f"model.layers.{layers.index(int(layer))}.{rest}"] = x
    return out


def stock_copy(source: Path, target: Path) -> Path:
    """A Megatron checkpoint with nothing but what stock Megatron-LM writes."""
    for path in source.rglob("*"):
        name = path.name
        known = name in (".metadata", "metadata.json", "latest_checkpointed_iteration.txt")
        if path.is_file() and (known or path.suffix in (".pt", ".distcp")):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return target
