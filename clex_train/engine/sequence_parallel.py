"""Sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509; ALST, arXiv 2506.13996).

Each of the N ranks of a group has n = S / N tokens of every sequence. Around attention, an all-to-all trades tokens for
heads: a rank then has all S tokens of H / N heads, and a second all-to-all restores the split. Key heads are repeated
when there are fewer of them than ranks. The all-to-all is DeepSpeed's `UlyssesSPAttentionHF`.

ZeRO sees data-parallel ranks with n tokens per row. Averaging their losses, weighted by scored tokens, gives the
gradient of the mean over all tokens of the step. So the engine needs no `mpu`, and checkpoints are ordinary ones.
"""

from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from clex_train.attention.ulysses import Attention, UlyssesAttention
from clex_train.config.root import Config
from clex_train.utils import distributed


class SequenceParallel:
    """This rank's place in its group: it has tokens [index * n, (index + 1) * n) of each row."""

    def __init__(self, model: nn.Module, size: int, rows: int, timeout: timedelta) -> None:
        """Create the groups; `rows` is the micro batch size. Collective."""
        self.size, self.index = size, distributed.rank() % size
        config: Any = model.config
        self._shape, self._rows, self._group = config.get_text_config(), rows, _own_group(size, timeout)
        self._attention = UlyssesAttention(model, self._all_to_all)

    def attention(self, position_ids: torch.Tensor | None) -> AbstractContextManager[None]:
        """Make the model attend over whole sequences inside the block. Collective, as is each pass inside.

        `position_ids` int64 [B, S] on the CPU, counted from 0 in each document; None for rows of one document.
        """
        return self._attention.active(position_ids)

    def _all_to_all(self, attention: Attention) -> Attention:
        # Used directly: DeepSpeed's `register_with_transformers` replaces `sdpa` in transformers' global table, which
        # evaluation uses too.
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        shape = self._shape
        all_to_all: Attention = UlyssesSPAttentionHF(
            attn=attention,
            batch_size=self._rows,
            attn_head_count=shape.num_attention_heads,
            # Some families (Qwen3, Gemma) have heads wider than hidden_size / num_heads.
            attn_head_size=getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads,
            kv_head_count=getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads,
            num_hidden_layers=shape.num_hidden_layers,
            process_group=self._group,
            seq_length_is_variable=True,
        )
        return all_to_all


def build(model: nn.Module, config: Config, rows: int) -> SequenceParallel | None:
    """Set up sequence parallelism as configured, or return None when its size is 1. Collective."""
    engine = config.engine
    if engine.sequence_parallel == 1:
        return None
    return SequenceParallel(model, engine.sequence_parallel, rows, timedelta(minutes=engine.timeout))


def _own_group(size: int, timeout: timedelta) -> dist.ProcessGroup:
    """Create the sequence-parallel groups and return this rank's."""
    # Consecutive ranks share a node, where the all-to-all is fastest. `new_group` must be called by all ranks for
    # every group.
    first = range(0, distributed.world_size(), size)
    groups: list[dist.ProcessGroup] = [
        dist.new_group(list(range(start, start + size)), timeout=timeout) for start in first
    ]
    return groups[distributed.rank() // size]
