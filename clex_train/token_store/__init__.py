"""Token stores on disk: manifest, shards with checksums, document index, writer, vocabulary of the tokenizer."""
