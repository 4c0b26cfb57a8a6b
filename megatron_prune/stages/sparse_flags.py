"""How sparse each matrix becomes, by which method: the flags of `sparsify`, and what they say."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prune.engine.running import CALIBRATION
from megatron_prune.errors import ConfigError
from megatron_prune.files.parsing import read_yaml
from megatron_prune.flags import Group, flag, given, given_flags, positive
from megatron_prune.model.axes import layer_name, split_layer, tensor_shape
from megatron_prune.model.fusion import stored_name
from megatron_prune.model.shape import ModelConfig
from megatron_prune.planning.choose import parse_layers
from megatron_prune.sparsity.allocation import OUTLIER_MULTIPLE, OUTLIER_SPREAD, arithmetic, uniform
from megatron_prune.sparsity.method import (
    METHODS,
    WEIGHT_UPDATES,
    Asked,
    How,
    Pattern,
    check_method,
    method_for,
)
from megatron_prune.stages.calibration import LayerwiseCalibration

if TYPE_CHECKING:
    from megatron_prune.sparsity.method import Method

SPARSITY = Group("how sparse")
METHOD = Group("method")
_ABLATIONS = {  # the official command line's names
    f"ablate_{short}_{order}": (name, order)
    for short, name in (("mag", "magnitude"), ("wanda", "wanda"))
    for order in WEIGHT_UPDATES[1:]
}
BY_LAYER = ("uniform", "owl", "arithmetic")


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise ArgumentTypeError(f"{text!r}: wanted a share of zeros above 0 and below 1")
    return share


@dataclass(frozen=True, kw_only=True)
class SparsityFlags(LayerwiseCalibration):
    """Of a stage that sets weights to zero."""

    sparsity: float | None = flag(
        "share of zeros, 0 < S < 1",
        default=None,
        parse=_share,
        metavar="S",
        group=SPARSITY,
        also=("--sparsity-ratio",),
    )
    pattern: str | None = flag(
        "N kept of every M consecutive inputs, such as 2:4",
        default=None,
        metavar="N:M",
        group=SPARSITY,
        also=("--sparsity-type",),
    )
    pattern_layers: str | None = flag(
        "with both: layers that get the pattern, such as 0-11,14 (from 0); all others get S",
        default=None,
        metavar="LAYERS",
        group=SPARSITY,
    )
    sparsity_by_layer: str = flag(
        f"{', '.join(BY_LAYER)}, or a file, a YAML list of each layer's share: owl leaves more "
        "where outliers are, arithmetic more in the first layers",
        default=BY_LAYER[0],
        metavar="HOW",
        group=SPARSITY,
    )
    sparsity_slope: float | None = flag(
        "of arithmetic: by how much a layer's share is above that of the one before",
        default=None,
        metavar="X",
        group=SPARSITY,
    )
    owl_multiple: float = flag(
        "of owl: a score above this times its layer's mean is an outlier",
        default=OUTLIER_MULTIPLE,
        metavar="M",
        group=SPARSITY,
    )
    owl_lambda: float = flag(
        "of owl: shares differ by at most twice this",
        default=OUTLIER_SPREAD,
        metavar="X",
        group=SPARSITY,
    )
    targets: tuple[str, ...] = flag(
        "which linears, by Megatron's names and wildcards: linear_qkv, linear_gate, mlp, "
        "decoder.layers.3.* (default: all of the layers)",
        default=(),
        metavar="NAME",
        group=SPARSITY,
    )
    ignore: tuple[str, ...] = flag(
        "linears that stay dense, by the same names", default=(), metavar="NAME", group=SPARSITY
    )
    method: str = flag(
        ", ".join(METHODS) + "; or ablate_mag_seq and the like",
        default="alps",
        choices=(*METHODS, *_ABLATIONS),
        metavar="METHOD",
        group=METHOD,
        also=("--prune-method",),
    )
    variant: bool = flag(
        "of wanda: rows of different counts, as in its appendix",
        default=False,
        group=METHOD,
        also=("--use-variant",),
    )
    weight_update: str | None = flag(
        "of magnitude and wanda: kept weights make good for those that go, the whole mask first "
        "or 128 columns at a time (default: none)",
        default=None,
        choices=WEIGHT_UPDATES,
        group=METHOD,
    )
    refit: bool = flag(
        "fit the kept weights to the mask of any method, by ten conjugate-gradient steps",
        default=False,
        group=METHOD,
    )
    true_sequential: bool = flag(
        "prune q, k, v before what enters linear_proj is gathered, gate and up before linear_fc2",
        default=False,
        group=METHOD,
    )
    block_size: int = flag(
        "columns that share a threshold in sparsegpt and in weight updates",
        default=128,
        parse=positive,
        metavar="N",
        group=METHOD,
    )
    damping: float = flag(
        "of the second moments, as a share of their mean diagonal",
        default=0.01,
        metavar="X",
        group=METHOD,
    )
    upstream_statistics: bool = flag(
        "of wanda with a weight update: the k-th window counts 1/k, as in the official code",
        default=False,
        group=METHOD,
    )

    @property
    def how(self) -> tuple[str, How]:
        """The method's name, and its options."""
        name, order = _ABLATIONS.get(self.method, (self.method, self.weight_update or "none"))
        return name, How(
            variant=self.variant,
            weight_update=order,
            block_size=self.block_size,
            damping=self.damping,
            refit=self.refit,
        )

    @property
    def n_of_m(self) -> Pattern | None:
        """The pattern; the official command line's ``unstructured`` is none.

        Raises:
            ConfigError: not N:M.
        """
        if self.pattern in (None, "unstructured"):
            return None
        assert self.pattern is not None
        return Pattern.parse(self.pattern)

    def check_sparsity(self) -> None:
        """Refuse what does not go together, before anything is opened.

        Raises:
            ConfigError: see the messages.
        """
        pattern, is_file = self.n_of_m, self.sparsity_by_layer not in BY_LAYER
        if pattern is None and self.sparsity is None and not is_file:
            raise ConfigError("neither --sparsity nor --pattern: nothing says how sparse")
        if is_file and self.sparsity is not None:
            raise ConfigError(
                f"--sparsity and --sparsity-by-layer {self.sparsity_by_layer}: the file says each "
                "layer's share; give one of the two"
            )
        self._check_pattern(pattern)
        name, how = self.how
        if self.method in _ABLATIONS and self.weight_update is not None:
            raise ConfigError(f"--method {self.method} says the --weight-update already")
        check_method(name, how)
        if self.upstream_statistics and (name != "wanda" or how.weight_update == "none"):
            raise ConfigError(
                "--upstream-statistics: only wanda with a --weight-update weighs windows so there"
            )
        in_blocks = name == "sparsegpt" or how.weight_update != "none"
        if pattern is not None and in_blocks and self.block_size % pattern.group:
            raise ConfigError(
                f"--block-size {self.block_size}: is no multiple of {pattern.group}, the group of "
                f"--pattern {pattern}; blocks must not cut a group"
            )
        self._check_by_layer()
        if self.needs_text and self.data is None:
            raise ConfigError(
                f"--method {self.method} without --data: it needs text to calibrate on"
            )
        self._check_used(name, how, in_blocks=in_blocks)

    def _check_used(self, name: str, how: How, *, in_blocks: bool) -> None:
        """Refuse what would change nothing."""
        unused = []
        if not self.needs_text:
            reached = ("--distributed-timeout-minutes",)  # ranks wait for each other all the same
            unused += [flag_ for flag_ in given_flags(self, CALIBRATION) if flag_ not in reached]
            unused += ["--true-sequential"] if self.true_sequential else []
        asked = given(self)
        if "damping" in asked and not (in_blocks or how.refit or name == "alps"):
            unused.append("--damping")
        if "block_size" in asked and not in_blocks:
            unused.append("--block-size")
        for flag_ in unused:
            raise ConfigError(
                f"{flag_} with --method {self.method}: nothing would use it; leave it out"
            )

    def _check_pattern(self, pattern: Pattern | None) -> None:
        share = None if pattern is None else 1 - pattern.keep / pattern.group
        if self.variant and pattern is not None:
            raise ConfigError(
                f"--variant with --pattern {pattern}: it lets rows keep different numbers of "
                "weights, a pattern does not; leave one of them out"
            )
        if self.pattern_layers is None:
            if share is not None and self.sparsity not in (None, share):
                raise ConfigError(
                    f"--sparsity {self.sparsity} and --pattern {pattern}, which is {share:g}: "
                    "leave --sparsity out, or say with --pattern-layers which layers get the "
                    "pattern"
                )
            return
        if share is None or self.sparsity is None:
            raise ConfigError(
                "--pattern-layers needs both --pattern, for them, and --sparsity, for the others"
            )

    def _check_by_layer(self) -> None:
        by = self.sparsity_by_layer
        if by != "uniform" and self.n_of_m is not None:
            raise ConfigError(
                f"--sparsity-by-layer {by} with --pattern {self.pattern}: a pattern is the same "
                "share in every layer; give --sparsity"
            )
        if (by == "arithmetic") != (self.sparsity_slope is not None):
            raise ConfigError("--sparsity-by-layer arithmetic and --sparsity-slope go together")
        if by != "owl" and (names := [n for n in given(self) if n.startswith("owl_")]):
            raise ConfigError(f"--{names[0].replace('_', '-')}: needs --sparsity-by-layer owl")
        if not self.owl_multiple > 0 or not 0 <= self.owl_lambda < 1:
            raise ConfigError(
                f"--owl-multiple {self.owl_multiple} and --owl-lambda {self.owl_lambda}: wanted "
                "above 0, and 0 to 1"
            )

    @property
    def needs_text(self) -> bool:
        """Whether the method or the allocation reads text."""
        name, how = self.how
        alone = name == "magnitude" and how.weight_update == "none" and not how.refit
        return not alone or self.sparsity_by_layer == "owl"


@dataclass(frozen=True, kw_only=True)
class Decided:
    """What is done to which matrices of a model.

    Attributes:
        targets: canonical names.
        asked: of each layer; None where OWL decides once it has seen the text.
    """

    method: Method
    how: How
    targets: tuple[str, ...]
    asked: tuple[Asked, ...] | None

    def table(self) -> str:
        """A line for each layer: how many matrices, and what is asked of them."""
        if self.asked is None:
            return f"{len(self.targets)} matrices; the text will say how sparse each layer gets"
        rows = [f"{'layer':>5}{'matrices':>10}{'zeros':>9}"]
        for layer, asked in enumerate(self.asked):
            count = sum(split_layer(name)[0] == layer for name in self.targets)
            said = asked.pattern or f"{asked.share:.4f}"
            rows.append(f"{layer:>5}{count:>10}{said!s:>9}")
        return "\n".join(rows)


def decide(options: SparsityFlags, config: ModelConfig) -> Decided:
    """What the flags say of a model, before any weight of it is read.

    Raises:
        ConfigError: names that match nothing, layers that are not there, a pattern that does not
            divide a matrix's inputs, shares of another number of layers.
    """
    name, how = options.how
    targets = _targets(options, config)
    asked = _asked(options, config.shape.num_layers)
    for target in targets:
        layer, width = split_layer(target)[0], tensor_shape(target, config.shape)[1]
        assert layer is not None
        pattern = None if asked is None else asked[layer].pattern
        if pattern is not None and width % pattern.group:
            raise ConfigError(
                f"--pattern {pattern}: {target} has {width} inputs, not a multiple of "
                f"{pattern.group}; leave it out with --ignore, or take another pattern"
            )
    return Decided(method=method_for(name, how), how=how, targets=targets, asked=asked)


def _asked(options: SparsityFlags, layers: int) -> tuple[Asked, ...] | None:
    pattern, by = options.n_of_m, options.sparsity_by_layer
    if by == "owl":
        return None
    if by == "arithmetic":
        assert options.sparsity is not None and options.sparsity_slope is not None
        shares = arithmetic(options.sparsity, options.sparsity_slope, layers)
        return tuple(Asked(share=share) for share in shares)
    if by != "uniform":
        return tuple(Asked(share=share) for share in _shares_of(Path(by), layers))
    if pattern is None:
        assert options.sparsity is not None
        return tuple(Asked(share=share) for share in uniform(options.sparsity, layers))
    patterned = Asked(share=1 - pattern.keep / pattern.group, pattern=pattern)
    if options.pattern_layers is None:
        return (patterned,) * layers
    chosen = parse_layers(options.pattern_layers, "--pattern-layers")
    if outside := [layer for layer in chosen if layer >= layers]:
        raise ConfigError(
            f"--pattern-layers {options.pattern_layers}: no layer {outside[0]}; the model has "
            f"{layers}, from 0"
        )
    assert options.sparsity is not None
    other = Asked(share=options.sparsity)
    return tuple(patterned if layer in chosen else other for layer in range(layers))


def _shares_of(path: Path, layers: int) -> Sequence[float]:
    """The shares in a YAML list."""
    if not path.is_file():
        raise ConfigError(
            f"--sparsity-by-layer {path}: no such file, and none of {', '.join(BY_LAYER)}"
        )
    values = read_yaml(path, ConfigError, "a list of each layer's share of zeros")
    if not isinstance(values, list) or len(values) != layers:
        found = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
        raise ConfigError(f"{path}: {found}; wanted a list of {layers} shares, one for each layer")
    for layer, share in enumerate(values):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise ConfigError(
                f"{path}: layer {layer}: {share!r:.40}; wanted a share above 0 and below 1"
            )
    return values


def _targets(options: SparsityFlags, config: ModelConfig) -> tuple[str, ...]:
    """Canonical names of the matrices that ``--targets`` and ``--ignore`` leave."""
    halves = config.family.halves
    linears = [linear for half in halves for linear in (*half.inputs, half.output)]
    everything = {
        layer_name(layer, f"{linear}.weight"): _words(layer, linear)
        for layer in range(config.shape.num_layers)
        for linear in linears
    }
    for flag_, words in (("--targets", options.targets), ("--ignore", options.ignore)):
        for word in words:
            if not any(_matches(word, said) for said in everything.values()):
                raise ConfigError(
                    f"{flag_} {word}: is no linear of this model's layers; they are "
                    f"{', '.join(sorted({s for said in everything.values() for s in said[:2]}))}"
                )
    left = tuple(
        name
        for name, said in everything.items()
        if (not options.targets or any(_matches(word, said) for word in options.targets))
        and not any(_matches(word, said) for word in options.ignore)
    )
    if not left:
        raise ConfigError("--targets and --ignore leave no linear to prune")
    return left


def _words(layer: int, linear: str) -> tuple[str, ...]:
    """What a linear may be called: its own name, Megatron's fused one, both whole, its module."""
    fused = stored_name(f"{linear}.weight").removesuffix(".weight")
    module, _, own = linear.rpartition(".")
    whole = [layer_name(layer, one) for one in (linear, fused)]
    return (own, fused.rpartition(".")[2], module, linear, fused, *whole)


def _matches(word: str, said: tuple[str, ...]) -> bool:
    return any(fnmatchcase(one, word.removesuffix(".weight")) for one in said)
