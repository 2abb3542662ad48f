"""Sequence parallelism: the ranks of a group share each row (DeepSpeed-Ulysses, arXiv 2309.14509; ALST, 2506.13996).

Each rank has n of a row's S tokens. Around the attention an all-to-all gives it all S tokens of H / N heads, and takes
the result back; key heads fewer than ranks are repeated. The exchange is DeepSpeed's `UlyssesSPAttentionHF`. Its own
registration is not used: that replaces `sdpa` in transformers' global table, through which evaluation goes too.

To ZeRO every rank is one of its own, with n tokens as its rows: gradients are the mean over all ranks of losses that
are weighed by scored tokens, which is the gradient of the mean over the tokens of the step. So the engine needs no
`mpu`, and checkpoints are those of any other run.
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
    """This rank's part in its group: tokens [index * n, (index + 1) * n) of each row that the group reads."""

    def __init__(self, model: nn.Module, size: int, rows: int, timeout: timedelta) -> None:
        """Collective. `rows` are those of a micro-batch."""
        self.size, self.index = size, distributed.rank() % size
        config: Any = model.config
        self._shape, self._rows, self._group = config.get_text_config(), rows, _own_group(size, timeout)
        self._attention = UlyssesAttention(model, self._exchange)

    def attention(self, position_ids: torch.Tensor | None) -> AbstractContextManager[None]:
        """Within it the model's attention is over whole rows; collective, as is every forward and backward pass there.

        `position_ids` int64 [B, S] of the rows on the CPU, counted from 0 in each document; None for rows of one.
        """
        return self._attention.active(position_ids)

    def _exchange(self, attention: Attention) -> Attention:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        shape = self._shape
        exchange: Attention = UlyssesSPAttentionHF(
            attn=attention,
            batch_size=self._rows,
            attn_head_count=shape.num_attention_heads,
            attn_head_size=getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads,
            kv_head_count=getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads,
            num_hidden_layers=shape.num_hidden_layers,
            process_group=self._group,
            seq_length_is_variable=True,
        )
        return exchange


def of_run(model: nn.Module, config: Config, rows: int) -> SequenceParallel | None:
    """What `engine.sequence_parallel` asks for; None where rows are not shared. Collective."""
    engine = config.engine
    if engine.sequence_parallel == 1:
        return None
    return SequenceParallel(model, engine.sequence_parallel, rows, timedelta(minutes=engine.timeout))


def _own_group(size: int, timeout: timedelta) -> dist.ProcessGroup:
    """Consecutive ranks, which are the closest to each other; every rank takes part in making every group."""
    first = range(0, distributed.world_size(), size)
    groups: list[dist.ProcessGroup] = [
        dist.new_group(list(range(start, start + size)), timeout=timeout) for start in first
    ]
    return groups[distributed.rank() // size]
