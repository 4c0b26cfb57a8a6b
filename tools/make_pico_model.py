#!/usr/bin/env python3
"""Write a very small random Llama with a tokenizer of its own: a Hugging Face directory of 200 kB.

    python tools/make_pico_model.py --save DIR [--text FILE]

With what makes real models awkward: grouped queries, an explicit ``head_dim``, a rope base of its
own, and a vocabulary of 379 tokens (a prime, so that every tensor-parallel size has to pad it).
TP=3 divides its heads, groups and FFN. The tokenizer is a byte-level BPE learnt from ``--text``
(default: this repository's README). The same seed gives the same weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

REPO = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 379


def pico_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def pico_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--text", type=Path, default=REPO / "README.md")
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    AutoModelForCausalLM.from_config(pico_config()).save_pretrained(args.save)
    pico_tokenizer(args.text.read_text(encoding="utf-8")).save_pretrained(args.save)
    print(args.save)


if __name__ == "__main__":
    main()
