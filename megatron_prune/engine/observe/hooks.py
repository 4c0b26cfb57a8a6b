"""Statistics of the running model: hooks on the shards, reduced over all ranks once.

Hooks only add up vectors along the model's axes; with TP each rank holds its part of Q and F, with
PP its layers, with DP its samples. Memory of a rank: float64 vectors of its layers, 8 bytes x
(L / PP) x (6 D + 3 Q d / TP + 3 F / TP), and once the whole of it while it is reduced: 70B
(L 80, D 8192, Q d 8192, F 28672) 41 MB a rank at TP=8, 102 MB whole.

The TE trap: Transformer Engine fuses each norm with the linear behind it, so a hook on that module
sees the norm's *input*. All hooks here take the input of the norm, fused or not, and apply the norm
themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_prune.criteria.observed import Observed
from megatron_prune.engine.forward.model import LanguageModel
from megatron_prune.engine.forward.windows import window_losses
from megatron_prune.engine.groups import Groups
from megatron_prune.errors import DamagedError
from megatron_prune.model.axes import layer_name, norm_names
from megatron_prune.model.blocks import FINAL_NORM
from megatron_prune.model.family import Half
from megatron_prune.model.fusion import stored_reader
from megatron_prune.model.grid import part_range
from megatron_prune.model.shape import ModelConfig

Hook = Callable[[Tensor], None]


class _Observer:
    """Adds up one model's statistics while it runs.

    Args:
        samples: windows in all; `window_losses` fills the last step up with copies of the first,
            which do not count.
    """

    def __init__(
        self, model: LanguageModel, config: ModelConfig, groups: Groups, samples: int, per_call: int
    ) -> None:
        self.sums = Observed.nothing(config)
        self._model, self._config, self._groups = model, config, groups
        self._shape = config.shape
        self._norms = {name: number for number, name in enumerate(norm_names(config))}
        self._samples, self._per_call = samples, per_call
        self._calls = -1
        self._sequence_parallel = bool(model.config.sequence_parallel)
        self._eps = model.config.layernorm_epsilon

    def _count(self, *_: Any) -> None:
        self._calls += 1

    def _live(self, x_sb: Tensor) -> Tensor:
        """The samples of this call that count: [s, b, *] -> [s, fewer, *], float32."""
        groups = self._groups
        first = (self._calls * groups.data_parallel + groups.dp_rank) * self._per_call
        return x_sb[:, : max(0, self._samples - first)].float()

    def _mean_squares(self, x_sbn: Tensor, split: bool = False) -> Tensor:
        """sum_b (mean_s |x|)^2 -> [n] float64; joins the parts of a sequence that is split."""
        parts = self._groups.grid.tensor_parallel if split else 1
        sums_bn = torch.linalg.vector_norm(x_sbn, 1, dim=0)
        if split:
            dist.all_reduce(sums_bn, group=self._groups.tp_group)
        mean_bn = sums_bn.double() / (x_sbn.shape[0] * parts)
        return mean_bn.square().sum(0) / parts  # of which every rank adds its share

    def _norm(self, name: str, weight_D: Tensor) -> Hook:
        number, weight = self._norms[name], weight_D.detach().double().cpu()

        def hook(x_sbD: Tensor) -> None:
            x = self._live(x_sbD)
            unit = F.rms_norm(x, x.shape[-1:], None, self._eps)
            energy = _squares(unit).cpu()
            self.sums.norm_energy[number] += energy
            self.sums.norm_squares[number] += energy * weight.square()
            means = self._mean_squares(unit, self._sequence_parallel).cpu()
            self.sums.norm_abs[number] += means * weight.square()

        return hook

    def _linear(self, prefix: str, layer: int, axis: str) -> Hook:
        part = slice(
            *part_range(
                self._shape.size(axis), self._groups.tp_rank, self._groups.grid.tensor_parallel
            )
        )
        sums = self.sums.tensors()

        def hook(x_sbn: Tensor) -> None:
            x = self._live(x_sbn)
            for name, value in (
                ("abs", self._mean_squares(x)),
                ("squares", _squares(x)),
                ("sums", x.sum(0).double().sum(0)),
            ):
                into = sums[f"{prefix}_{name}"][layer, part]
                into += value.cpu().view(into.shape)

        return hook

    def _layer(self, layer: int) -> tuple[Hook, Hook]:
        held: list[Tensor] = []

        def before(x_sbD: Tensor) -> None:
            held.append(self._live(x_sbD))

        def after(x_sbD: Tensor) -> None:
            cosine = F.cosine_similarity(held.pop(), self._live(x_sbD), dim=-1)
            self.sums.layer_cosine[layer] += float(cosine.double().sum())

        return before, after

    def _first(self, x_sbD: Tensor) -> None:
        x = self._live(x_sbD)
        self.sums.tokens.add_(x.shape[0] * x.shape[1])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks in place; nothing of them is left behind."""
        model, groups = self._model, self._groups
        first = groups.grid.stage_layers(self._shape.num_layers, groups.pp_rank).start
        with ExitStack() as stack:

            def on(module: torch.nn.Module, hook: Hook) -> None:
                handle = module.register_forward_pre_hook(
                    lambda _, args, kwargs: hook(args[0] if args else kwargs["hidden_states"]),
                    with_kwargs=True,
                )
                stack.callback(handle.remove)

            stack.callback(model.register_forward_pre_hook(self._count).remove)
            for local, layer in enumerate(model.decoder.layers):
                number = first + local
                if number == 0:
                    on(layer, self._first)
                before, after = self._layer(number)
                on(layer, before)
                stack.callback(
                    layer.register_forward_hook(
                        lambda _, __, out, after=after: after(
                            out[0] if isinstance(out, tuple) else out
                        )
                    ).remove
                )
                for half in self._config.family.halves:
                    norm, behind = norm_site(layer, half)
                    fused = hasattr(behind, "layer_norm_weight")
                    weight = behind.layer_norm_weight if fused else norm.weight
                    name = layer_name(number, f"{half.norm}.weight")
                    on(behind if fused else norm, self._norm(name, weight))
                    prefix = half.projection.removeprefix("linear_")
                    on(layer.get_submodule(half.output), self._linear(prefix, number, half.axis))
            if groups.is_last_stage:
                norm = model.decoder.final_layernorm
                on(norm, self._norm(FINAL_NORM.name, norm.weight))
            yield

    def reduced(self) -> Observed:
        """The sums over all ranks, on every rank; what ranks hold alike is taken from one."""
        groups = self._groups
        self.sums.samples.fill_(self._samples)
        for name, x in self.sums.tensors().items():
            split = name.startswith(("proj", "fc2"))
            if name == "samples":
                continue
            if not split and not self._sequence_parallel and groups.tp_rank:
                x.zero_()
            moved = x.to(groups.device)
            dist.all_reduce(moved)
            x.copy_(moved)
            bad = (~torch.isfinite(x)).nonzero()
            if len(bad):
                raise DamagedError(
                    f"statistics {name} are not finite, first at {tuple(bad[0].tolist())} (layer "
                    "or norm, then unit): a weight of the model is not, or --fp16 is too narrow "
                    "for it"
                )
        return self.sums


def _squares(x_sbn: Tensor) -> Tensor:
    """Sum of squares over tokens -> [n] float64; one pass, no temporary."""
    return torch.linalg.vector_norm(x_sbn, dim=0).double().square().sum(0)


def norm_site(layer: torch.nn.Module, half: Half) -> tuple[Any, Any]:
    """A half's norm, and the linear behind it, which holds the weight where it is fused."""
    return layer.get_submodule(half.norm), layer.get_submodule(stored_reader(half))


def observe(
    model: LanguageModel,
    config: ModelConfig,
    windows_WS: Tensor,
    groups: Groups,
    *,
    micro_batch_size: int = 1,
    progress: Callable[[int], object] = lambda windows: None,
) -> tuple[Observed, Tensor]:
    """Run the model over the windows and add up its statistics.

    Args:
        windows_WS: [W, S] int64 token ids, the same on all ranks.

    Returns:
        The statistics and [W] float64 losses in nats, both the same on every rank.

    Raises:
        DamagedError: a statistic is not finite; names it.
    """
    observer = _Observer(model, config, groups, len(windows_WS), micro_batch_size)
    with observer.watching():
        losses = window_losses(
            model, windows_WS, groups, micro_batch_size=micro_batch_size, progress=progress
        )
    return observer.reduced(), losses
