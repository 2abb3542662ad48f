"""A naive Llama in float64, the reference of the protocols: full logits, loops over heads and tokens.

Keys are cached unrotated, and all of them are rotated at the current frequencies for every chunk, as in the official
CLEX code. It shares no code with the package and uses only the names of the weights of transformers.
"""

import math

import torch
from torch import Tensor


def chunk_nll(weights: dict[str, Tensor], config, tokens: list[int], chunks: list[tuple[int, int, Tensor]]) -> Tensor:
    """Return nll float64 [N] (0 for the first token); `chunks` are (start, stop, inv_freq), read in order."""
    weights = {name: value.double() for name, value in weights.items()}
    keys: list[list[Tensor]] = [[] for _ in range(config.num_hidden_layers)]
    values: list[list[Tensor]] = [[] for _ in range(config.num_hidden_layers)]
    logits = []
    for start, stop, inv_freq in chunks:
        x = weights["model.embed_tokens.weight"][torch.tensor(tokens[start:stop])]
        for layer in range(config.num_hidden_layers):
            x = _layer(weights, config, layer, x, start, inv_freq.double(), keys[layer], values[layer])
        logits.append(_norm(x, weights["model.norm.weight"], config) @ weights["lm_head.weight"].T)
    every = torch.cat(logits)
    nll = torch.zeros(len(tokens), dtype=torch.float64)
    for i in range(1, len(tokens)):
        row = every[i - 1]
        nll[i] = torch.log(torch.exp(row - row.max()).sum()) + row.max() - row[tokens[i]]
    return nll


def _layer(weights, config, layer, x, start, inv_freq, keys, values) -> Tensor:
    name = f"model.layers.{layer}."
    head_dim = config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    h = _norm(x, weights[name + "input_layernorm.weight"], config)
    q = (h @ weights[name + "self_attn.q_proj.weight"].T).view(len(x), -1, head_dim)
    keys.append((h @ weights[name + "self_attn.k_proj.weight"].T).view(len(x), -1, head_dim))
    values.append((h @ weights[name + "self_attn.v_proj.weight"].T).view(len(x), -1, head_dim))
    k, v = torch.cat(keys), torch.cat(values)
    out = torch.zeros_like(q)
    for head in range(config.num_attention_heads):
        rotated_q = _rotate(q[:, head], torch.arange(start, start + len(x)), inv_freq)
        rotated_k = _rotate(k[:, head // group], torch.arange(len(k)), inv_freq)
        for row in range(len(x)):
            seen = start + row + 1
            weight = torch.softmax(rotated_k[:seen] @ rotated_q[row] / math.sqrt(head_dim), dim=0)
            out[row, head] = weight @ v[:seen, head // group]
    x = x + out.flatten(1) @ weights[name + "self_attn.o_proj.weight"].T
    h = _norm(x, weights[name + "post_attention_layernorm.weight"], config)
    gate = torch.nn.functional.silu(h @ weights[name + "mlp.gate_proj.weight"].T)
    return x + (gate * (h @ weights[name + "mlp.up_proj.weight"].T)) @ weights[name + "mlp.down_proj.weight"].T


def _norm(x: Tensor, weight: Tensor, config) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * weight


def _rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    angle = positions.double()[:, None] * inv_freq
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)
