"""`train_tokenizer`: train a byte-level BPE on the training documents of a corpus, in Hugging Face layout.

Byte-level (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2): every text is
encoded and decoded without loss, and there is no unknown token.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clex_train.utils import log
from clex_train.utils.errors import ConfigError
from clex_train.utils.files import atomic_directory
from data_prep.config import CorpusConfig, TrainTokenizerVerb
from data_prep.corpus.documents import documents
from data_prep.corpus.held_out import rule
from data_prep.corpus.sources import Unit, plan
from data_prep.resume import disk_full_explained, require_free, require_writable

logger = log.get(__name__)


def run(config: TrainTokenizerVerb) -> None:
    """Train the tokenizer and write its directory.

    Raises:
        InputError: the corpus cannot be read or has too little text, or the output exists or is not writable.
    """
    output = Path(config.output)
    require_free(output, "directory", config.overwrite)
    units = plan(config.corpus, 1 << 62)
    logger.info("train a tokenizer of %d tokens on corpus %s into %s", config.vocab_size, config.corpus.name, output)
    with disk_full_explained(output):
        require_writable(output)
        _write(output, units, config)


def _write(output: Path, units: list[Unit], config: TrainTokenizerVerb) -> None:
    with atomic_directory(output) as unfinished:
        tokenizer = train(_texts(units, config.corpus, config.max_mb * 1_000_000), config)
        if len(tokenizer) < config.vocab_size:
            logger.warning("vocab_size=%d: the corpus yields only %d tokens", config.vocab_size, len(tokenizer))
        tokenizer.save_pretrained(unfinished)
    logger.info("%s is complete: %d tokens", output, len(tokenizer))


def train(texts: Iterator[str], config: TrainTokenizerVerb) -> Any:
    """Train a `PreTrainedTokenizerFast` with special tokens at ids 0, 1 and 2 and at most `vocab_size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # No prefix space: decoding an encoded text must return the same text.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.pad_token, config.bos_token, config.eos_token],
        # All 256 bytes, even those that the corpus lacks, so that any text can be encoded.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    length = {} if config.model_max_length is None else {"model_max_length": config.model_max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=config.pad_token,
        bos_token=config.bos_token,
        eos_token=config.eos_token,
        # On by default in transformers 4, it drops spaces before punctuation when decoding.
        clean_up_tokenization_spaces=False,
        **length,
    )


def _texts(units: list[Unit], corpus: CorpusConfig, max_bytes: int) -> Iterator[str]:
    """Yield training documents in order, up to `max_bytes` of text."""
    read = 0
    # Held-out documents must not shape the tokenizer that is evaluated on them.
    below = rule(corpus, units).below
    for unit in units:
        for piece in unit.pieces:
            for document in documents(piece, corpus, Counter(), below=below):
                if document.split == "train":
                    yield document.text
                    read += document.text_bytes
                    if read >= max_bytes:
                        logger.info("max_mb=%d reached; the rest of the corpus is skipped", max_bytes // 1_000_000)
                        return
    if not read:
        raise ConfigError("corpus.name", corpus.name, "the corpus is empty, it has no training documents")
