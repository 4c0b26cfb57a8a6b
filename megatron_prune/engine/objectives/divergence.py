"""Distillation loss over a vocabulary that is split over tensor-parallel ranks and padded.

    loss = w * CE(student, target) + (1 - w) * T^2 * KL(teacher || student), softmaxes at T

after Hinton et al. 2015, arXiv:1503.02531: T^2 keeps the gradient's size whatever T. Several
teachers are one, the mixture of their probabilities: sum_i a_i KL(p_i || q) differs from
KL(sum_i a_i p_i || q) by what does not depend on q, so that both have the same gradient, and the
mixture's divergence is zero for a student that has learned all there is.

Top-k: the teacher's k most likely tokens of the whole vocabulary and **one bucket for the rest**,
so the divergence of two distributions over k + 1 outcomes. It bounds the whole divergence from
below and holds the student to the mass that the teacher leaves to the rest. Renormalising over the
k tokens and ignoring the rest would let a student give it any mass, or teach it to give none.
Tokens as likely as the k-th are all kept: which of them came first would depend on the layout.

Exact under tensor parallelism: one all-reduced maximum for all softmaxes, one sum for the teachers'
and one for what is left; top-k gathers k numbers a row and rank.

Memory: in place. The student's logits become the gradient, which backward only scales, the first
teacher's become the mixture; both in float32, so in bf16 there is a float32 copy of each teacher's
and the student's logits, [s * b, V / TP], while the loss is computed, and of the student's until
backward. Beside that, a few blocks of rows.

Shape suffixes: N rows (positions of all sequences), V this rank's padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_prune.engine.forward.loss import real_columns

_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}  # of float32 logits: a level-2 cache; few kernels


@dataclass(frozen=True, kw_only=True)
class Softening:
    """How teachers and labels make one loss.

    Attributes:
        lm_weight: share of the cross entropy, 0 to 1.
        temperature: divides all logits of the divergence, more than 0.
        top_k: None for the whole vocabulary.
        teacher_weights: one a teacher, sum 1.
    """

    lm_weight: float = 0.0
    temperature: float = 1.0
    top_k: int | None = None
    teacher_weights: tuple[float, ...] = (1.0,)


def _blocks(flat_NV: Tensor) -> list[slice]:
    rows, columns = flat_NV.shape
    step = max(1, _BLOCK_BYTES.get(flat_NV.device.type, 1 << 28) // (4 * max(columns, 1)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _wide(logits: Tensor) -> Tensor:
    """In float32 (float64 stays), the same tensor where it is already."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def _flat(logits: Tensor) -> Tensor:
    return logits.view(-1, logits.shape[-1])


def _sum(parts: Sequence[Tensor], group: ProcessGroup) -> Tensor:
    """Each of the parts, summed over the tensor-parallel ranks; one exchange."""
    stacked = torch.stack(list(parts))
    if group.size() > 1:
        dist.all_reduce(stacked, group=group)
    return stacked


def _maxima(all_NV: Sequence[Tensor], columns: int, group: ProcessGroup) -> Tensor:
    """[tensors, N]: the largest real logit of each row, over all ranks."""
    largest = all_NV[0].new_full((len(all_NV), len(all_NV[0])), -torch.inf)
    for number, flat in enumerate(all_NV if columns else ()):
        for rows in _blocks(flat):
            torch.amax(flat[rows, :columns], dim=1, out=largest[number, rows])
    if group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def _mix(
    teachers_NV: Sequence[Tensor], largest: Tensor, how: Softening, group: ProcessGroup
) -> Tensor:
    """Turn the teachers' real columns into their mixture's probabilities, in the first's place."""
    totals = []
    for flat, most in zip(teachers_NV, largest):
        total = torch.zeros_like(most)
        for rows in _blocks(flat):
            block = flat[rows].sub_(most[rows, None]).div_(how.temperature).exp_()
            torch.sum(block, dim=1, out=total[rows])
        totals.append(total)
    shares = torch.tensor(how.teacher_weights, dtype=totals[0].dtype, device=totals[0].device)
    scales = shares[:, None] / _sum(totals, group)
    mixture = teachers_NV[0]
    for rows in _blocks(mixture):
        mixture[rows].mul_(scales[0, rows, None])
        for other, scale in zip(teachers_NV[1:], scales[1:]):
            mixture[rows].addcmul_(other[rows], scale[rows, None])
    return mixture


def _threshold(mixture_NV: Tensor, count: int, group: ProcessGroup) -> Tensor:
    """[N]: the ``count``-th largest probability of each row, over all ranks."""
    found = mixture_NV.new_zeros(len(mixture_NV), count)
    mine = min(count, mixture_NV.shape[1])
    for rows in _blocks(mixture_NV) if mine else ():
        found[rows, :mine] = torch.topk(mixture_NV[rows], mine, dim=1).values
    if group.size() > 1:
        gathered = [torch.empty_like(found) for _ in range(group.size())]
        dist.all_gather(gathered, found, group=group)
        found = torch.topk(torch.cat(gathered, dim=1), count, dim=1).values
    return found[:, -1]


_REST = -1.0  # marks in the mixture what lies in the bucket


class _DistillationLoss(torch.autograd.Function):
    """The loss; turns the student's logits into the gradient of each row's loss."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        teachers: Sequence[Tensor],
        targets: Tensor,
        vocab_size: int,
        how: Softening,
        group: ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        columns = real_columns(vocab_size, logits.shape[-1], group.rank())
        scores = _wide(logits)
        whole = _flat(scores)
        flat = whole[:, :columns]
        softened = [_flat(_wide(one))[:, :columns] for one in teachers]
        largest = _maxima([flat, *softened], columns, group)
        mixture = _mix(softened, largest[1:], how, group)
        if how.top_k is not None and how.top_k < vocab_size:
            threshold = _threshold(mixture, how.top_k, group)
        else:
            threshold = largest.new_full((len(flat),), -torch.inf)
        local = targets.reshape(-1) - group.rank() * whole.shape[1]
        mine = (local >= 0) & (local < columns)
        local = torch.where(mine, local, 0)
        flat.sub_(largest[0, :, None])
        target = torch.where(mine, whole.gather(1, local[:, None]).squeeze(1), 0)
        own = _measure(flat, mixture, threshold, how.temperature)
        sums = _sum([target, *own], group)
        target, plain, total, crossed, rest, rest_student = sums
        lm = plain.log() - target
        tiny = torch.finfo(flat.dtype).tiny
        outside = torch.xlogy(rest, rest.clamp(min=tiny) / (rest_student / total).clamp(min=tiny))
        kl = (crossed + (1 - rest) * total.log() + outside) * how.temperature**2
        if ctx.needs_input_grad[0]:
            pull = rest / rest_student.clamp(min=tiny)
            _differentiate(flat, mixture, plain, total, pull, how)
            whole[:, columns:] = 0
            aim = mine.to(whole.dtype) * -how.lm_weight
            whole.scatter_add_(1, local[:, None], aim[:, None])
            ctx.save_for_backward(scores)
            ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(lm, kl)
        loss = how.lm_weight * lm + (1 - how.lm_weight) * kl
        return loss.view(targets.shape), lm.view(targets.shape), kl.view(targets.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        _flat(gradient).mul_(grads[0].reshape(-1, 1))
        return gradient.to(ctx.dtype), None, None, None, None, None


def _measure(
    flat_NV: Tensor, mixture_NV: Tensor, threshold_N: Tensor, temperature: float
) -> tuple[Tensor, ...]:
    """This rank's share of each row's sums; leaves exp(shifted logit / T) and marks the bucket.

    Returns:
        Each [N]: sum exp(s); sum exp(s / T); sum p (log p - s / T) over kept tokens; the mixture's
        mass in the bucket; the student's, not yet divided by its sum.
    """
    plain, total, crossed, rest, rest_student = flat_NV.new_zeros(5, len(flat_NV))
    tiny = torch.finfo(flat_NV.dtype).tiny
    for rows in _blocks(flat_NV):
        scores, p = flat_NV[rows], mixture_NV[rows]
        plain[rows] = scores.exp().sum(dim=1) if temperature != 1 else 0
        scores.div_(temperature)
        is_rest = p < threshold_N[rows, None]
        rest[rows] = p.where(is_rest, 0).sum(dim=1)
        kept = p.masked_fill(is_rest, 0)
        crossed[rows] = kept.clamp(min=tiny).log_().sub_(scores).mul_(kept).sum(dim=1)
        p.masked_fill_(is_rest, _REST)
        scores.exp_()
        total[rows] = scores.sum(dim=1)
        rest_student[rows] = scores.where(is_rest, 0).sum(dim=1)
    return plain if temperature != 1 else total.clone(), total, crossed, rest, rest_student


def _differentiate(
    flat_NV: Tensor,
    mixture_NV: Tensor,
    plain_N: Tensor,
    total_N: Tensor,
    pull_N: Tensor,
    how: Softening,
) -> None:
    """exp(s / T) -> w softmax(s) + (1 - w) T (q - p), the target's -w apart, in place.

    In the bucket p is the mixture's mass there, spread as the student spreads its own:
    ``pull * exp(s / T)``.
    """
    kl_weight = (1 - how.lm_weight) * how.temperature
    for rows in _blocks(flat_NV):
        scores, p = flat_NV[rows], mixture_NV[rows]
        if how.top_k is not None:
            torch.where(p < 0, scores * pull_N[rows, None], p, out=p)
        p.mul_(kl_weight)
        if how.lm_weight:
            plain = scores if how.temperature == 1 else scores.pow(how.temperature)
            p.sub_(plain * (how.lm_weight / plain_N[rows, None]))
        scores.mul_(kl_weight / total_N[rows, None]).sub_(p)


def distillation_losses(
    logits_sbV: Tensor,
    teachers_sbV: Sequence[Tensor],
    targets_sb: Tensor,
    *,
    vocab_size: int,
    how: Softening,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each position and its two parts, equal on all tensor-parallel ranks.

    Args:
        logits_sbV: [s, b, padded vocabulary / TP], this rank's part; overwritten.
        teachers_sbV: of each teacher, likewise; overwritten, without gradients.
        targets_sb: [s, b] token ids below ``vocab_size``.
        vocab_size: tokens of the whole vocabulary, without padding.
        group: the tensor-parallel ranks.

    Returns:
        Each [s, b] float32: the loss, with a gradient; the cross entropy; T^2 times the divergence.
    """
    found: tuple[Tensor, Tensor, Tensor] = _DistillationLoss.apply(
        logits_sbV, teachers_sbV, targets_sb, vocab_size, how, group
    )
    return found
