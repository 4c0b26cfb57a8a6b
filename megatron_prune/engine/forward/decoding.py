"""Rows of tokens through the model without training: how likely they are, and what follows them.

Forward only, at any TP and PP. Rows of different lengths are filled up on the right, which a causal
model does not see. Nothing is kept between two tokens: continuing a row by n tokens costs n passes
over the whole row, so this is for looks and tests, not for serving. A batch is one microbatch, so
of several pipeline stages one works at a time.

Shape suffixes: b rows, s positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prune.engine.forward.loss import token_losses
from megatron_prune.engine.forward.model import LanguageModel
from megatron_prune.engine.forward.sampling import Sampling, choose
from megatron_prune.engine.groups import Groups


def _filled_up(rows: Sequence[Sequence[int]], model: LanguageModel, groups: Groups) -> Tensor:
    """[b, s] int64; s is the longest row, rounded up for sequence parallelism."""
    multiple = groups.grid.tensor_parallel if model.config.sequence_parallel else 1
    length = -(-max(map(len, rows)) // multiple) * multiple
    tokens_bs = torch.zeros(len(rows), length, dtype=torch.int64)
    for at, row in enumerate(rows):
        tokens_bs[at, : len(row)] = torch.tensor(row)
    return tokens_bs.to(groups.device)


@torch.no_grad()
def _run(
    model: LanguageModel,
    tokens_bs: Tensor,
    groups: Groups,
    pick: Callable[[Tensor], Tensor],
    shape: Sequence[int],
) -> Tensor:
    """What the last stage picks of its logits [b, s, V/TP], float32 of ``shape``, on all stages."""

    def forward(_: object, model: LanguageModel) -> tuple[Tensor, object]:
        return model(tokens_bs, None, None), lambda logits_bsV, non_loss_data: pick(logits_bsV)

    model.eval()
    found: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=model,
        num_microbatches=1,
        seq_length=tokens_bs.shape[1],
        micro_batch_size=len(tokens_bs),
        forward_only=True,
        collect_non_loss_data=True,
    )
    picked = found[0] if found else torch.empty(*shape, device=groups.device)
    if groups.grid.pipeline_parallel > 1:
        last = dist.get_process_group_ranks(groups.pp_group)[-1]
        dist.broadcast(picked, last, groups.pp_group)
    return picked


def _joined(part: Tensor, groups: Groups) -> list[Tensor]:
    """A tensor of every tensor-parallel rank."""
    if groups.grid.tensor_parallel == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(groups.grid.tensor_parallel)]
    dist.all_gather(parts, part.contiguous(), group=groups.tp_group)
    return parts


def _is_largest(logits_bsV: Tensor, targets_bs: Tensor, groups: Groups) -> Tensor:
    """[b, s] float32, 1 where the target is the first of the largest logits of all ranks."""
    largest, index = logits_bsV.float().max(-1)
    values = torch.stack(_joined(largest, groups))  # [TP, b, s]
    indices = torch.stack(_joined(index + groups.tp_rank * logits_bsV.shape[-1], groups))
    rank = values.argmax(0, keepdim=True)
    return (indices.gather(0, rank)[0] == targets_bs).float()


def score_rows(
    model: LanguageModel, rows: Sequence[Sequence[int]], groups: Groups
) -> list[tuple[list[float], list[bool]]]:
    """Of each row, for every token but its first: log-probability in nats, and whether it is what
    greedy decoding would have chosen. The same on all ranks of a copy of the model."""
    tokens_bs = _filled_up([row[:-1] for row in rows], model, groups)
    targets_bs = _filled_up([row[1:] for row in rows], model, groups)

    def pick(logits_bsV: Tensor) -> Tensor:
        greedy = _is_largest(logits_bsV, targets_bs, groups)
        nats = token_losses(
            logits_bsV, targets_bs, vocab_size=model.true_vocab_size, group=groups.tp_group
        )
        return torch.stack([-nats, greedy])

    found = _run(model, tokens_bs, groups, pick, (2, *tokens_bs.shape)).cpu()
    return [
        (found[0, at, : len(row) - 1].tolist(), found[1, at, : len(row) - 1].bool().tolist())
        for at, row in enumerate(rows)
    ]


def next_logits(model: LanguageModel, rows: Sequence[Sequence[int]], groups: Groups) -> Tensor:
    """[b, V] float32 logits of what follows each row, whole, on all ranks of a copy."""
    tokens_bs = _filled_up(rows, model, groups)
    last = torch.tensor([len(row) - 1 for row in rows], device=groups.device)
    size = model.true_vocab_size

    def pick(logits_bsV: Tensor) -> Tensor:
        ends_bV = logits_bsV[torch.arange(len(rows), device=groups.device), last].float()
        return torch.cat(_joined(ends_bV, groups), dim=-1)[:, :size].contiguous()

    return _run(model, tokens_bs, groups, pick, (len(rows), size))


def continue_rows(
    model: LanguageModel,
    rows: Sequence[Sequence[int]],
    groups: Groups,
    *,
    max_new_tokens: Sequence[int],
    is_done: Callable[[int, Sequence[int]], bool],
    sampling: Sampling,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[list[int]]:
    """What the model adds to each row, the same on all ranks of a copy of the model.

    Args:
        max_new_tokens: of each row.
        is_done: given a row's number and its new tokens, whether it ends with the last of them.
        progress: told of every step.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    new: list[list[int]] = [[] for _ in rows]
    open_rows = [at for at in range(len(rows)) if max_new_tokens[at] > 0]
    while open_rows:
        logits = next_logits(model, [[*rows[at], *new[at]] for at in open_rows], groups)
        for at, token in zip(open_rows, choose(logits, sampling, generator)):
            new[at].append(token)
        open_rows = [
            at for at in open_rows if len(new[at]) < max_new_tokens[at] and not is_done(at, new[at])
        ]
        progress(1)
    return new
