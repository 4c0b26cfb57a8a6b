#!/usr/bin/env python3
"""Load a Hugging Face directory as anyone would, and let it continue a text.

    python tools/generate.py DIR [--prompt TEXT] [--max-new-tokens N]

Stops when transformers finds a weight missing, unexpected or of another shape, which it would
otherwise fill with random numbers and a warning.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir")
    parser.add_argument("--prompt", default="The function returns a list of")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    args = parser.parse_args()

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.dir)
    model, loading = AutoModelForCausalLM.from_pretrained(args.dir, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            raise SystemExit(f"generate: error: {args.dir}: {kind}: {sorted(loading[kind])[:5]}")
    inputs = tokenizer(args.prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(tokenizer.decode(out[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
