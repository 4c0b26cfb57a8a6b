"""The distillation loss in plain torch on whole rows, and how far the engine's is from it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

VOCAB, PADDED = 97, 120  # 120 is split over 1, 2 or 3 ranks; the last of three has 17 tokens


def plain_losses(
    logits: Tensor,
    teachers: list[Tensor],
    targets: Tensor,
    *,
    lm_weight: float,
    temperature: float,
    top_k: int | None,
    weights: tuple[float, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, cross entropy and divergence of each row of real columns [..., V]."""
    p = sum(w * (x / temperature).softmax(-1) for w, x in zip(weights, teachers))
    q = (logits / temperature).softmax(-1)
    if top_k is not None and top_k < p.shape[-1]:
        best = p.topk(top_k, -1).indices
        p, q = p.gather(-1, best), q.gather(-1, best)
        p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
        q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    kl = F.kl_div(q.log(), p, reduction="none").sum(-1) * temperature**2
    lm = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    lm = lm.view(targets.shape)
    return lm_weight * lm + (1 - lm_weight) * kl, lm, kl


def _given(seed: int, dtype: torch.dtype, teachers: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Logits of student and teachers [7, 3, PADDED], targets, and the gradient from above."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1 + teachers, 7, 3, PADDED, generator=generator, dtype=torch.float64) * 3
    logits[:, 0, 0, :VOCAB] -= 1e3  # a row where padding would win
    targets = torch.randint(VOCAB, (7, 3), generator=generator)
    above = torch.rand(7, 3, generator=generator, dtype=torch.float64)
    return list(logits.to(dtype)), targets, above


def errors(
    *,
    tp: int,
    dtype: str,
    lm_weight: float = 0.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    weights: tuple[float, ...] = (1.0,),
    block_bytes: int | None = None,
) -> dict[str, float]:
    """Largest differences from float64 plain torch: of the loss, its parts, the gradient."""
    from megatron_prune.engine.groups import model_parallel
    from megatron_prune.engine.objectives import divergence as engine
    from megatron_prune.model.grid import ParallelGrid

    if block_bytes is not None:
        engine._BLOCK_BYTES["cpu"] = block_bytes
    logits, targets, above = _given(4, getattr(torch, dtype), len(weights))
    whole = logits[0].double().clone().requires_grad_()
    wanted = plain_losses(
        whole[..., :VOCAB], [x.double()[..., :VOCAB] for x in logits[1:]], targets,
        lm_weight=lm_weight, temperature=temperature, top_k=top_k, weights=tuple(weights),
    )  # fmt: skip
    (wanted[0] * above).sum().backward()
    how = engine.Softening(
        lm_weight=lm_weight, temperature=temperature, top_k=top_k, teacher_weights=tuple(weights)
    )
    with model_parallel(ParallelGrid(tensor_parallel=tp), timeout_minutes=1) as groups:
        width = PADDED // tp
        part = slice(groups.tp_rank * width, (groups.tp_rank + 1) * width)
        mine = logits[0][..., part].clone().requires_grad_()
        found = engine.distillation_losses(
            mine * 1, [x[..., part].clone() for x in logits[1:]], targets,
            vocab_size=VOCAB, how=how, group=groups.tp_group,
        )  # fmt: skip
        (found[0] * above).sum().backward()
    assert mine.grad is not None and whole.grad is not None
    names = ("loss", "lm", "kl")
    far = {n: float((a - b).abs().max()) for n, a, b in zip(names, found, wanted)}
    far["gradient"] = float((mine.grad - whole.grad[..., part]).abs().max())
    far["size"] = float(whole.grad.abs().max())
    return far
