"""lm-evaluation-harness by itself, on a Hugging Face directory: nothing of ours takes part.

python by_the_harness.py MODEL TASK_FILES OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

SHOTS = {"pico_choice": 2, "pico_rolling": None, "pico_until": None}
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "limited": {"limit": 5},
    "chat": {"apply_chat_template": True, "fewshot_as_multiturn": True},
}


def main(model: str, task_files: str, out: str) -> None:
    manager, told = TaskManager(include_path=task_files), {}
    for way, given in WAYS.items():
        told[way] = found = {"results": {}, "n-shot": {}, "n-samples": {}}
        for task, shots in SHOTS.items():
            result = simple_evaluate(
                model="hf",
                model_args={"pretrained": model, "dtype": "float32"},
                tasks=[task],
                num_fewshot=shots,
                device="cpu",
                batch_size=2,
                task_manager=manager,
                log_samples=False,
                **given,
            )
            for name, values in found.items():
                values.update(result[name])
    Path(out).write_text(json.dumps(told, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
