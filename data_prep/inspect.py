"""`inspect`: show the content of a token store: counts, lengths, domains, decoded documents and rows, checksums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from clex_train.console.program import echo
from clex_train.data.bos import describe_bos
from clex_train.data.overlap import overlap
from clex_train.token_store.manifest import SPLITS
from clex_train.token_store.store import TokenStore
from clex_train.utils.errors import ConfigError, renamed_key, require
from clex_train.utils.files import BadFile, require_writable_folder, sha256
from clex_train.utils.protocols import Tokenizer
from clex_train.utils.seeding import generator
from data_prep import length_plot, row_samples
from data_prep.config import InspectVerb
from data_prep.statistics import Domain, Statistics, collect, domains

_BAR = 40
_WHOLE = "only of whole files: verify=true compares them"
MAX_DOMAINS = 30


def run(config: InspectVerb) -> None:
    """Print the report, each part as soon as it is ready.

    Raises:
        InputError: `store` is not a complete store, or one of its files is damaged.
        ValueError: a document table contradicts the manifest.
    """
    require(config.store is not None, "store", config.store, "name the directory of a token store: store=corpora/books")
    store = _open(str(config.store))
    if config.plot:
        # Before minutes of reading.
        require_writable_folder("plot", Path(config.plot), Path(config.plot).parent)
    if config.verify:
        echo(f"{verify(store)} files verified, all checksums match the manifest")
    echo("\n".join(_summary(store)))
    views = {split: view for split in SPLITS if (view := TokenStore(store.path, split)).num_documents}
    found = {split: collect(view) for split, view in views.items()}
    for split, statistics in found.items():
        echo("\n".join(["", f"{split}: document lengths in tokens", *length_histogram(statistics)]))
        echo("\n".join(_domain_lines(split, domains(store.manifest.sources, statistics))))
    if config.plot:
        length_plot.plot(found, str(store.path), Path(config.plot))
        echo(f"\nwrote the plot of lengths to {config.plot}")
    # A store of evaluation sets has a single split, with nothing to compare.
    if len(views) == len(SPLITS):
        echo(f"\n{overlap_line(*views.values())}")
    _show_texts(views, config)


def verify(store: TokenStore) -> int:
    """Read every file of a store, compare its sha256 with the manifest, and return the number of files.

    Raises:
        InputError: a file differs; names the first one.
    """
    expected = {store.tokenizer_path / name: digest for name, digest in store.manifest.tokenizer.files.items()}
    for split in SPLITS:
        for shard in store.manifest.splits[split]:
            expected[store.path / split / f"{shard.name}.tokens"] = shard.tokens_sha256
            expected[store.path / split / f"{shard.name}.documents"] = shard.documents_sha256
            optional = {
                "blocks": shard.blocks_sha256,
                "mask": shard.mask_sha256,
                "mask_blocks": shard.mask_blocks_sha256,
            }
            for suffix, digest in optional.items():
                if digest:
                    expected[store.path / split / f"{shard.name}.{suffix}"] = digest
    for file, digest in expected.items():
        if _sha256(file, store.path) != digest:
            raise ConfigError(
                file, None, "damaged, its checksum is not that of the manifest; copy it again or tokenize again"
            )
    return len(expected)


def length_histogram(statistics: Statistics) -> list[str]:
    """Format a histogram of document lengths with a bin per doubling, and the tokens in each bin."""
    # Scale bars to the largest bin, so that the histogram fits the terminal for any store.
    most = statistics.documents.max()
    lines = []
    for power in statistics.classes():
        documents, tokens = int(statistics.documents[power]), int(statistics.tokens[power])
        bar = "#" * round(_BAR * documents / most)
        lines.append(f"  {1 << power:>10,}  {documents:>9,} documents {tokens:>15,} tokens  {bar}".rstrip())
    return [*lines, f"  longest: {statistics.longest:,} tokens"]


def overlap_line(train: TokenStore, held_out: TokenStore) -> str:
    """Report the held-out documents that are also training documents, compared by the hash of their text."""
    found = overlap(train, held_out)
    if not found:
        return "no text is in both splits"
    places = f"{held_out.place(found.held_out_doc)}, in training {train.place(found.train_doc)}"
    return (
        f"{found.num_held_out:,} of {held_out.num_documents:,} validation documents are also training documents, "
        f"such as {places}; training refuses to evaluate on them"
    )


def _open(path: str) -> TokenStore:
    with renamed_key("data.path", "store"):
        return TokenStore(path)


def _summary(store: TokenStore) -> list[str]:
    manifest, tokenizer = store.manifest, store.manifest.tokenizer
    counts = Counter[str]()
    for source in manifest.sources:
        counts.update(source.counts)
    lines = [
        f"{store.path}: token store, format version {manifest.version}, {store.dtype.name}",
        f"  fingerprint  {store.fingerprint}",
        f"  tokenizer    {tokenizer.vocab_size} tokens, EOS {tokenizer.eos_token!r} = {tokenizer.eos_id}",
        f"  documents    {describe_bos(store)}",
        f"  checksums    {'of each block, checked on every read' if store.has_block_sums else _WHOLE}",
        f"  sources      {len(manifest.sources)} ({', '.join(f'{v} {k}' for k, v in sorted(counts.items()))})",
        f"  split        {manifest.split_rule.get('validation_share')} held out by {manifest.split_rule.get('value')}"
        + (", raised to allow error bars" if "held_out" in manifest.split_rule else ""),
    ]
    for split in SPLITS:
        size = f"{manifest.num_documents(split):,} documents, {manifest.num_tokens(split):,} tokens"
        lines.append(f"  {split:<12} {size}, {len(manifest.splits[split])} shards")
    if chosen := manifest.settings.get("evaluation_set"):
        lines.append(f"  chosen from  {', '.join(f'{key} {value}' for key, value in chosen.items())}")
    return lines


def _domain_lines(split: str, found: list[Domain]) -> list[str]:
    """Format a line per domain, the largest first; combine those beyond `MAX_DOMAINS` in one line."""
    if not found:
        return []
    shown, rest = found[:MAX_DOMAINS], found[MAX_DOMAINS:]
    if rest:
        documents, tokens = sum(d.num_documents for d in rest), sum(d.num_tokens for d in rest)
        shown = [*shown, Domain(f"{len(rest)} more", documents, tokens)]
    total = sum(domain.num_tokens for domain in found)
    width = max(len(domain.name) for domain in shown)
    return [f"{split}: domains, by the folder of their files"] + [
        f"  {domain.name:<{width}}  {domain.num_documents:>9,} documents {domain.num_tokens:>15,} tokens "
        f"{100 * domain.num_tokens / total:>6.2f} %"
        for domain in shown
    ]


def _show_texts(views: dict[str, TokenStore], config: InspectVerb) -> None:
    """Print decoded beginnings of documents, and decoded rows."""
    if not views or not (config.samples or config.rows):
        return
    # Imported late: it takes seconds, and counts need no tokenizer.
    from transformers import PreTrainedTokenizerFast

    # Not AutoTokenizer, which prompts for consent if the tokenizer comes with Python code.
    file = next(iter(views.values())).tokenizer_path / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
    for split, view in views.items():
        if config.samples:
            echo("\n".join(["", f"{split}: beginnings of documents", *_samples(view, tokenizer, config)]))
    if config.rows and "train" in views:
        echo("\ntrain: rows as training reads them")
        for line in row_samples.lines(views["train"], tokenizer, config):
            echo(line)


def _samples(store: TokenStore, tokenizer: Tokenizer, config: InspectVerb) -> Iterator[str]:
    # A fixed random sample: the first documents of a store often come from a single source.
    chosen = generator(0, "inspect").permutation(store.num_documents)[: config.samples]
    for doc_id in sorted(map(int, chosen)):
        start, stop = store.span(doc_id)
        text = tokenizer.decode(store.tokens(start, min(start + config.sample_tokens, stop)).tolist())
        yield f"  document {doc_id} ({stop - start:,} tokens, {store.place(doc_id)})\n    {text!r}"


def _sha256(file: Path, store: Path) -> str:
    """Hash a file; return an empty string if it is missing or leads out of the store."""
    try:
        return sha256(file, within=store)
    except (BadFile, FileNotFoundError):
        return ""
