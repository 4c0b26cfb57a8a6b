"""What may be asked for, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_prune.errors import ConfigError
from megatron_prune.sparsity.method import METHODS, How, Pattern, method_for


@pytest.mark.parametrize("text", ["3:2", "0:4", "4:4", "a:b", "2", "2:4:8", "-1:4", "2.0:4", "٢:٤"])
def test_patterns_that_are_none_are_refused(text) -> None:
    with pytest.raises(ConfigError, match=f"--pattern {text}: wanted N:M, N kept"):
        Pattern.parse(text)
    assert str(Pattern.parse("8:16")) == "8:16"


@pytest.mark.parametrize("name", METHODS)
def test_what_methods_need(name) -> None:
    method = method_for(name, How())
    assert method.name == name
    assert method.needs == {"magnitude": "weights", "wanda": "squares"}.get(name, "gram")
    assert method.updates == (name not in ("magnitude", "wanda"))


@pytest.mark.parametrize("how", [How(refit=True), How(weight_update="seq")])
@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_updates_need_moments(name, how) -> None:
    method = method_for(name, how)
    assert (method.name, method.needs, method.updates) == (name, "gram", True)


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("obs", How(), "--method obs: there is no such method; choose magnitude, wanda"),
        ("sparsegpt", How(variant=True), "--variant with --method sparsegpt: it is a variant of w"),
        ("alps", How(weight_update="iter"), "--weight-update iter with --method alps, which finds"),
        ("wanda", How(weight_update="all"), "--weight-update all: choose none, seq, iter"),
        ("wanda", How(weight_update="seq", variant=True), "--variant with --weight-update seq"),
        ("alps", How(refit=True), "--refit with --method alps, which ends with that refit"),
        ("sparsegpt", How(block_size=0), "--block-size 0: wanted a number of inputs"),
        ("sparsegpt", How(damping=-0.1), "--damping -0.1: wanted a number, 0 or more"),
        ("sparsegpt", How(damping=float("nan")), "--damping nan: wanted a number, 0 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, how, message) -> None:
    with pytest.raises(ConfigError, match=message):
        method_for(name, how)


def test_flags_are_checked_before_torch_is_imported() -> None:
    script = """
import sys
from megatron_prune.errors import ConfigError
from megatron_prune.sparsity import allocation
from megatron_prune.sparsity.method import METHODS, How, Pattern, method_for
allocation.arithmetic(0.5, 0.01, 4)
Pattern.parse("2:4")
try:
    method_for("alps", How(refit=True))
except ConfigError:
    print({"torch", "numpy"} & set(sys.modules) or "neither")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "neither", done.stderr
