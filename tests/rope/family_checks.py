"""Checks for every family with rotary embeddings; each runs once, for its test and for the table."""

from functools import cache
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig

from clex_train.attention.log_scaling import install_log_scaling
from clex_train.export.factors import Source, rope_at
from clex_train.export.stock_rope import stock_config
from clex_train.rope.patch import RotaryHandle, install_rotary
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.spectrum import Spectrum
from clex_train.utils.errors import ConfigError
from tests.export.harsh_models import T, harsh_model, log_p
from tests.rope.rotary_families import (
    CONTEXT,
    INTERLEAVED,
    KEPT,
    LATENT,
    ONE_ATTENTION,
    from_config,
    tiny_model,
    tokens,
)
from tests.rope.unrotated_cache import reference_logits

GRID = [1.0, 2.0, 3.0, 4.0, 5.0]
PIECES = [10, 6, 1, 1, 15, 1, 14, 1]  # t moves with the third, the fifth and the last piece.
AT_ONE, CROSSINGS = 1e-5, 1e-4
"""Tolerances of logits, which are of order 1."""
EXPORT = 1e-3
"""Tolerance of log p of an export, against our own model at t."""


@cache
@torch.no_grad()
def error_at_one(family: str) -> float:
    """Return the largest difference from the untouched model's logits within L, with and without a table."""
    model, ids = tiny_model(family), tokens(2, CONTEXT)
    before = model(ids).logits
    handle = install_rotary(model, CONTEXT)
    plain = model(ids).logits
    handle.use(ntk_table(handle.base_inv_freq, GRID))
    return max(float((logits - before).abs().max()) for logits in (plain, model(ids).logits))


@cache
def num_frequencies_without_gradient(family: str) -> int:
    """Count the frequencies, of P, that no gradient of the loss reaches."""
    model, ids = tiny_model(family), tokens(2, CONTEXT)
    handle = install_rotary(model, CONTEXT)
    theta = handle.base_inv_freq.requires_grad_()
    with handle.training(Spectrum(theta, 2.0), 2.0 * torch.arange(CONTEXT).double().expand(2, -1)):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return len(theta) if theta.grad is None else int((theta.grad == 0).sum())


@cache
@torch.no_grad()
def error_over_crossings(family: str) -> float:
    """Return the largest difference from the logits of a cache of unrotated keys, in pieces over three moves of t."""
    model, ids = tiny_model(family), tokens(2, sum(PIECES))
    handle = install_rotary(model, CONTEXT)
    table = ntk_table(handle.base_inv_freq, GRID)
    handle.use(table)
    past, found, start = None, [], 0
    for length in PIECES:
        output = model(ids[:, start : start + length], past_key_values=past, use_cache=True)
        past, start = output.past_key_values, start + length
        found.append(output.logits)
    handle.undo()
    facts = {"interleaved": family in INTERLEAVED, "kept": KEPT.get(family, ()), "latent": family in LATENT}
    expected = reference_logits(model, ids, PIECES, table, CONTEXT, **facts)
    return float((torch.cat(found, dim=1) - expected).abs().max())


@cache
@torch.no_grad()
def generation_agrees(family: str) -> bool:
    """Return True if greedy generation from 8 to 40 tokens is equal with and without a cache (exact for one layer)."""
    model = tiny_model(family, num_layers=1, **ONE_ATTENTION.get(family, {}))
    handle = install_rotary(model, CONTEXT)
    handle.use(ntk_table(handle.base_inv_freq, GRID))
    answers = [
        model.generate(tokens(2, 8), max_new_tokens=32, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    return answers[0].shape == (2, 40) and torch.equal(*answers)


@cache
@torch.no_grad()
def is_undone(family: str) -> bool:
    """Return True if `undo` restores logits and modules bitwise after a table has changed them."""
    model, ids = tiny_model(family), tokens(2, 2 * CONTEXT)
    before, modules = model(ids).logits, dict(model.named_modules())
    handle = install_rotary(model, CONTEXT)
    handle.use(ntk_table(handle.base_inv_freq, GRID))
    changed = not torch.equal(model(ids).logits, before)
    handle.undo()
    return changed and torch.equal(model(ids).logits, before) and dict(model.named_modules()) == modules


@cache
@torch.no_grad()
def responds_to_log_scaling(family: str) -> bool:
    """Return True if log-scaling changes the logits beyond L and not within it."""
    model, ids = tiny_model(family), tokens(2, 2 * CONTEXT)
    handle = install_rotary(model, CONTEXT)
    within, beyond = model(ids[:, :CONTEXT]).logits, model(ids).logits
    try:
        install_log_scaling(model, "always", CONTEXT, handle.on_length)
    except ValueError:
        return False
    same = torch.equal(model(ids[:, :CONTEXT]).logits, within)
    return same and not torch.allclose(model(ids).logits, beyond, atol=1e-4)


@cache
@torch.no_grad()
def token_scaling_errors(family: str) -> tuple[float, float]:
    """Return how far log-scaling by token is from one forward when read in pieces, and how far it moves the logits."""
    model, ids = tiny_model(family), tokens(2, sum(PIECES))
    handle = install_rotary(model, CONTEXT)
    plain = model(ids).logits
    install_log_scaling(model, "token_eval", CONTEXT, handle.on_length, handle.on_call)
    whole = model(ids).logits
    past, found = None, []
    for piece in ids.split(PIECES, dim=1):
        output = model(piece, past_key_values=past, use_cache=True)
        past = output.past_key_values
        found.append(output.logits)
    return float((torch.cat(found, dim=1) - whole).abs().max()), float((whole - plain).abs().max())


@cache
def handle_of(family: str) -> RotaryHandle:
    """Install a handle on a model of the family."""
    return install_rotary(tiny_model(family), CONTEXT)


@cache
@torch.no_grad()
def export_error(family: str) -> float:
    """Return the largest difference in log p of an export at t = 4 in plain transformers, on both sides of L."""
    if export_refusal(family) is not None:
        return float("inf")
    loaded = harsh_model(family)
    loaded.handle.use(loaded.table)
    with TemporaryDirectory() as folder:
        stock_config(loaded.model.config, rope_at(_source(family), T)).save_pretrained(folder)
        stock = from_config(AutoConfig.from_pretrained(folder)).eval()
    stock.load_state_dict(loaded.model.state_dict())
    errors = []
    for length in (CONTEXT // 2, CONTEXT, CONTEXT + 1, int(T) * CONTEXT):
        ids = tokens(2, length)
        with loaded.handle.pinned(T):
            errors.append(float((log_p(stock, ids) - log_p(loaded.model, ids)).abs().max()))
    return max(errors)


@cache
def export_refusal(family: str) -> str | None:
    """Return the reason why no config.json expresses a family at one t; None for one that is exported."""
    source = _source(family)
    try:
        stock_config(source.arch, rope_at(source, T))
    except ConfigError as refusal:
        return str(refusal)
    return None


def _source(family: str) -> Source:
    """Return the records of a model with a harsh field."""
    loaded = harsh_model(family)
    loaded.handle.use(loaded.table)
    return Source(loaded.model.config, loaded.handle, CONTEXT, loaded.clex, loaded.table)
