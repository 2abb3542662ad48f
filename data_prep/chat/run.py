"""`chat`: turn conversations into a token store whose mask says which tokens the loss counts.

Shards, resuming and checksums are those of `tokenize`; a document is a conversation, rendered by a chat template.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from clex_train.data.bos import adds_bos
from clex_train.data.conversations import COUNTED
from clex_train.data.conversations import LARGEST as LARGEST_TEMPLATE
from clex_train.token_store.manifest import SPLITS, TOKENIZER, Manifest
from clex_train.utils import log
from clex_train.utils.errors import ConfigError, require
from clex_train.utils.files import BadFile, read_regular
from clex_train.utils.protocols import Tokenizer
from data_prep.chat.config import ChatVerb
from data_prep.chat.encoding import ChatJob
from data_prep.chat.template import ChatTemplate
from data_prep.config import CorpusConfig
from data_prep.corpus.documents import SCORED, TRUNCATED, UNSCORED
from data_prep.corpus.held_out import rule
from data_prep.corpus.sources import Unit, plan
from data_prep.resume import disk_full_explained, is_done, open_partial, publish, require_place_of_store
from data_prep.tokenize.cutting import uncut
from data_prep.tokenize.encoding import load_tokenizer, save_tokenizer
from data_prep.tokenize.engines import TokenizersEngine
from data_prep.tokenize.run import complete, content_settings, report
from data_prep.tokenize.shards import Job

logger = log.get(__name__)


def run(config: ChatVerb) -> None:
    """Write the store of a config, or the missing part of it.

    Raises:
        InputError: the conversations, the tokenizer, its template or the output cannot be used.
    """
    own = CorpusConfig().text_field
    remedy = "a conversation is in `field`: set field=NAME"
    require(config.corpus.text_field == own, "corpus.text_field", config.corpus.text_field, remedy)
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
    # The template writes BOS, or does not. ChatML's first token is the BOS of some tokenizers that otherwise add none.
    bos = adds_bos(tokenizer) and template.begins_with(tokenizer.bos_token_id)
    settings = content_settings(config, units, tokenizer.backend_tokenizer.to_str(), bos, held_out)
    settings |= {"chat": _settings(chat, template.stop_id)}
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
        manifest = complete(job, units, settings, config.workers)
        publish(partial, manifest, output)
    report(manifest, output)
    report_scored(manifest, config)


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
    which = COUNTED[config.scored.name]
    logger.info("template %s; the loss counts %s", config.template or "of the tokenizer", which)
    if template.stop_id is None:
        logger.warning(
            "the template ends the assistant's turns with no control token; the end of a document, %s, is scored "
            "instead, so a model learns to stop at the last turn of a conversation only",
            tokenizer.eos_token,
        )


def report_scored(manifest: Manifest, config: ChatVerb) -> None:
    """Log the share of scored tokens, and what was cut or left out."""
    counts = Counter[str]()
    for source in manifest.sources:
        counts.update(source.counts)
    total = sum(manifest.num_tokens(split) for split in SPLITS)
    share = 100 * counts[SCORED] / max(total, 1)
    logger.info("the loss counts %d of %d tokens (%.1f %%)", counts[SCORED], total, share)
    if counts[TRUNCATED]:
        logger.warning("%d conversations were cut to max_tokens=%s", counts[TRUNCATED], config.max_tokens)
    if counts[UNSCORED]:
        logger.warning("%d conversations were left out: nothing to learn is left of them", counts[UNSCORED])


def _settings(chat: ChatJob, stop_id: int | None) -> dict[str, Any]:
    template = hashlib.sha256(chat.template.encode()).hexdigest()
    return {
        "layout": chat.layout.name,
        "scored": chat.scored.name,
        "max_tokens": chat.max_tokens,
        "template_sha256": template,
        "stop_id": stop_id,
    }
