"""`chat`: turn conversations into a token store whose mask says which tokens the loss counts.

Shards, resuming and checksums are those of `tokenize`; a document is a conversation, rendered by a chat template.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from clex_train.token_store.manifest import TOKENIZER, read_manifest
from clex_train.token_store.store import TokenStore
from clex_train.utils import log
from clex_train.utils.errors import ConfigError, require
from clex_train.utils.files import BadFile, read_regular
from clex_train.utils.protocols import Tokenizer
from data_prep.chat.config import ChatVerb
from data_prep.chat.encoding import ChatJob
from data_prep.chat.template import ChatTemplate
from data_prep.corpus.documents import TRUNCATED, UNSCORED
from data_prep.corpus.held_out import rule
from data_prep.corpus.sources import Unit, plan
from data_prep.resume import disk_full_explained, is_done, open_partial, publish, require_place_of_store
from data_prep.tokenize.cutting import uncut
from data_prep.tokenize.encoding import load_tokenizer, save_tokenizer
from data_prep.tokenize.engines import TokenizersEngine
from data_prep.tokenize.run import complete, content_settings, report
from data_prep.tokenize.shards import Job

logger = log.get(__name__)

LARGEST_TEMPLATE = 2**20
"""Bytes of a template at most."""


def run(config: ChatVerb) -> None:
    """Write the store of a config, or the missing part of it.

    Raises:
        InputError: the conversations, the tokenizer, its template or the output cannot be used.
    """
    output, corpus = Path(config.output), replace(config.corpus, text_field=config.field_name)
    config = replace(config, corpus=corpus)
    require_place_of_store(output)
    remedy = "name the model's directory, whose tokenizer has a chat template: tokenizer=/models/chat"
    require(config.tokenizer.path is not None, "tokenizer", config.tokenizer.path, remedy)
    units = plan(corpus, config.shard_mb * 1_000_000)
    tokenizer = load_tokenizer(str(config.tokenizer.path), config.tokenizer.trust_remote_code)
    template = ChatTemplate(tokenizer, read_template(config.template), config.scored)
    chat = ChatJob(config.layout, str(template.text), config.scored, config.max_tokens)
    held_out = rule(corpus, units, chat.keep, chat.content)
    # The template writes BOS, or does not.
    bos = tokenizer.bos_token_id is not None and template.begins_with(tokenizer.bos_token_id)
    settings = content_settings(config, units, tokenizer.backend_tokenizer.to_str(), bos, held_out)
    settings |= {"chat": _settings(chat)}
    if is_done(output, settings, config.overwrite):
        logger.info("%s already is this store", output)
        return
    log_plan(config, units, tokenizer, template)
    with disk_full_explained(output), open_partial(output, settings, config.overwrite) as partial:
        # Saved with the tokenizer, so that final/ of a run has the template that it was trained on.
        tokenizer.chat_template = chat.template
        facts = save_tokenizer(tokenizer, partial / TOKENIZER)
        job = Job(
            partial,
            corpus,
            facts,
            uncut,
            TokenizersEngine.name,
            falls_back=False,
            bos=bos,
            below=held_out.below,
            chat=chat,
        )
        publish(partial, complete(job, units, settings, config.workers), output)
    report(read_manifest(output), output)
    report_scored(TokenStore(output), config)


def read_template(path: str | None) -> str | None:
    """Return the text of a template file; None without one.

    Raises:
        ConfigError: the file is missing, too large or not UTF-8.
    """
    if path is None:
        return None
    file = Path(path)
    try:
        return read_regular(file, file.resolve().parent, most=LARGEST_TEMPLATE).decode()
    except (FileNotFoundError, BadFile, UnicodeDecodeError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ConfigError("template", path, f"{why}; name a file with a Jinja chat template") from error


def log_plan(config: ChatVerb, units: list[Unit], tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Log input, template and output before the work begins."""
    paths = {piece.path for unit in units for piece in unit.pieces}
    logger.info(
        "chat %s (files: %d, field %s) with the tokenizer of %s (%d tokens) into %s",
        config.corpus.name,
        len(paths),
        config.field_name,
        config.tokenizer.path,
        len(tokenizer),
        config.output,
    )
    which = {"assistant": "all turns of the assistant", "last": "the last turn of the assistant", "all": "all tokens"}
    logger.info("template %s; the loss counts %s", config.template or "of the tokenizer", which[config.scored.name])
    if not template.stops:
        logger.warning(
            "the template ends the assistant's turns with no control token; the end of a document, %s, is scored "
            "instead, so a model learns to stop at the last turn of a conversation only",
            tokenizer.eos_token,
        )


def report_scored(store: TokenStore, config: ChatVerb) -> None:
    """Log the share of scored tokens, and what was cut or left out."""
    total, counts = 0, Counter[str]()
    for first in range(0, store.num_tokens, 1 << 20):
        scored = store.scored(first, min(first + (1 << 20), store.num_tokens))
        assert scored is not None
        total += int(scored.sum())
    for source in store.manifest.sources:
        counts.update(source.counts)
    share = 100 * total / max(store.num_tokens, 1)
    logger.info("train: the loss counts %d of %d tokens (%.1f %%)", total, store.num_tokens, share)
    if counts[TRUNCATED]:
        logger.warning("%d conversations were cut to max_tokens=%s", counts[TRUNCATED], config.max_tokens)
    if counts[UNSCORED]:
        logger.warning("%d conversations were left out: nothing to learn is left of them", counts[UNSCORED])


def _settings(chat: ChatJob) -> dict[str, Any]:
    template = hashlib.sha256(chat.template.encode()).hexdigest()
    return {
        "layout": chat.layout.name,
        "scored": chat.scored.name,
        "max_tokens": chat.max_tokens,
        "template_sha256": template,
    }
