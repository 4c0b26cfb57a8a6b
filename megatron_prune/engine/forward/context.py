"""Context parallelism: which part of a sequence a rank holds, and the whole from the parts.

A sequence of S tokens is cut into 2 x CP chunks, and rank r holds chunk r and the r-th from the
end: one early, one late, so that under a causal mask all ranks have as much to attend to. Keys and
values are gathered for attention, as in Llama 3 (Grattafiori et al. 2024, arXiv:2407.21783, section
3.3.2); Transformer Engine's attention, where it is used, passes them round instead.

Shape suffixes: s this rank's part of the sequence, S the whole, b batch, h heads, d kv_channels.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor
from torch.distributed import ProcessGroup


def own_part(group: ProcessGroup, *whole_bS: Tensor) -> tuple[Tensor, ...]:
    """[b, S] -> [b, S / CP], this rank's two chunks of each sequence."""
    parts: dict[int, Tensor] = get_batch_on_this_cp_rank(dict(enumerate(whole_bS)), group)
    return tuple(parts.values())


def in_order(part_sbhd: Tensor, group: ProcessGroup) -> Tensor:
    """Whole sequences [S, b, h, d] from every rank's part; gradients are summed over the ranks."""
    chunks = gather_from_sequence_parallel_region(part_sbhd, group=group).chunk(2 * group.size())
    return torch.cat([*chunks[::2], *reversed(chunks[1::2])])
