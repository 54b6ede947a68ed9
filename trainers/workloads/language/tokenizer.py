"""Tokens of a text: its bytes, or byte pairs by the `tokenizers` library."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# Suffixes: N tokens of a text, V tokens of the vocabulary.

TOKENIZER_FILE, SEPARATOR = "tokenizer.json", "<|end|>"

EncodedText = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]
"""Tokens [N], and the number of text bytes of each."""


def encode_bytes(documents: Sequence[bytes]) -> EncodedText:
    """Each byte is a token; byte 0, which does not occur in text, ends a document."""
    tokens_N = np.frombuffer(b"".join(document + b"\0" for document in documents), np.uint8)
    return tokens_N, np.ones(len(tokens_N), np.int64)


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> bytes:
    """Train a byte-pair tokenizer; returns it as a file of the `tokenizers` library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    content: str = tokenizer.to_str()
    return content.encode()


def encode_byte_pairs(documents: Sequence[bytes], tokenizer: bytes) -> EncodedText:
    """Encode by byte pairs. A token's name has one character for each of its bytes."""
    from tokenizers import Tokenizer

    merged = Tokenizer.from_str(tokenizer.decode())
    merged.encode_special_tokens = True  # the separator's name may occur in a text
    size, end = merged.get_vocab_size(), merged.token_to_id(SEPARATOR)
    length_V = np.array([len(merged.id_to_token(token) or "") for token in range(size)])
    length_V[end] = 1
    encoded = merged.encode_batch([document.decode() for document in documents])
    tokens = [token for each in encoded for token in (*each.ids, end)]
    tokens_N = np.array(tokens, np.int16 if size <= 1 << 15 else np.int32)
    return tokens_N, length_V[tokens_N]
