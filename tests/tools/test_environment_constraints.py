from __future__ import annotations

from environment_constraints import constraints

TESTED = "# list\nPyYAML==6.0\ntorch==2.13.0  # CPU\n\npre_commit==4.7\nmegatron-core==0.16.1\n"


def test_empty_environment_gets_the_tested_versions() -> None:
    assert constraints(TESTED, {}, (3, 11)) == [
        "PyYAML==6.0",
        "torch==2.13.0",
        "pre_commit==4.7",
        "megatron-core==0.16.1",
    ]


def test_installed_torch_and_its_kin_are_pinned_as_they_are() -> None:
    installed = {"torch": "2.10.0a0+nv25.11", "numpy": "1.26.4", "pyyaml": "5.4", "rich": "15.0"}
    lines = constraints(TESTED, installed, (3, 12))
    assert "torch==2.10.0a0+nv25.11" in lines
    assert "numpy==1.26.4" in lines
    assert "torch==2.13.0" not in lines
    # Neither held back nor moved: pip decides by our lower bounds.
    assert not [line for line in lines if line.lower().startswith(("pyyaml", "rich"))]


def test_names_are_compared_as_pip_does() -> None:
    assert "pre_commit==4.7" not in constraints(TESTED, {"pre-commit": "4.0"}, (3, 11))


def test_python_3_10_takes_only_what_has_wheels_for_it() -> None:
    assert constraints(TESTED, {}, (3, 10)) == ["torch==2.13.0", "megatron-core==0.16.1"]
