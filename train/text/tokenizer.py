"""Tokens: bytes, or a `tokenizers` file that is trained on the data or given.

A tokenizer here turns the bytes of a document into token ids and back, and has one id more than it
needs for that: `bos`, which stands before each document and never comes out of `encode`. Text that
spells a special token (`<|endoftext|>`) is encoded as the text that it is.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from kru_triton.train.run.settings import UserError

KNOWN_BOS = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "[BOS]")
ANY_TEXT = "a model that is trained with --tokenizer bytes takes any text"
TRAINING_BYTES = 10_000_000  # of the first documents, for `bpe:N`


class ByteTokenizer:
    """One token per byte, and BOS."""

    bos = 256
    vocab_size = 257
    sha256 = ""

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8)

    def encode_batch(self, texts: list[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def decode(self, tokens: list[int]) -> bytes:
        return bytes(token for token in tokens if token < 256)

    def decode_each(self, tokens: Iterable[int]) -> Iterator[bytes]:
        """The bytes of each token as it comes."""
        return (self.decode([token]) for token in tokens)

    def describe(self) -> str:
        return "bytes"


class FileTokenizer:
    """A tokenizer of the `tokenizers` library.

    Args:
        json: the text of its file (tokenizer.json).

    `bos` is the file's own special token for it where it has one of `KNOWN_BOS`, else one id more.
    A byte-level tokenizer decodes to exactly the bytes that were encoded.
    """

    def __init__(self, json: str):
        from tokenizers import Tokenizer

        self.json = json
        self.sha256 = hashlib.sha256(json.encode()).hexdigest()
        self.tokenizer = Tokenizer.from_str(json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        special = {t.content for t in self.tokenizer.get_added_tokens_decoder().values()}
        size = max(vocabulary.values()) + 1
        self.bos = next((vocabulary[name] for name in KNOWN_BOS if name in special), size)
        self.vocab_size = max(size, self.bos + 1)
        self.dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        self.bytes_of = None  # of each id, where the tokenizer is byte-level
        if type(self.tokenizer.decoder).__name__ == "ByteLevel":
            values = byte_values()
            added = {
                i: t.content.encode() for i, t in self.tokenizer.get_added_tokens_decoder().items()
            }
            self.bytes_of = [b""] * self.vocab_size
            for token, index in vocabulary.items():
                if index in added:
                    self.bytes_of[index] = added[index]
                else:
                    self.bytes_of[index] = bytes(values[character] for character in token)
        self.alphabet = frozenset()  # the bytes it knows, where those are not all
        if self.bytes_of is not None:
            known = frozenset(b"".join(token for token in self.bytes_of if len(token) == 1))
            self.alphabet = known if len(known) < 256 else frozenset()

    def __reduce__(self):
        return FileTokenizer, (self.json,)

    def encode(self, text: bytes) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[bytes]) -> list[np.ndarray]:
        """Token ids of each text, which is UTF-8; on all cores.

        Raises:
            UserError: a text has a character for which there is no token.
        """
        decoded = [text.decode("utf-8", "replace") for text in texts]
        for text in decoded if self.alphabet else ():
            if unknown := set(text.encode()) - self.alphabet:
                at = next(i for i, char in enumerate(text) if unknown & set(char.encode()))
                raise UserError(
                    f"the tokenizer has no tokens for {bytes(sorted(unknown))!r}, as in "
                    f"{text[max(0, at - 20) : at + 20]!r}; {ANY_TEXT}"
                )
        try:
            encodings = self.tokenizer.encode_batch_fast(decoded, add_special_tokens=False)
        except Exception as error:  # `tokenizers` raises plain Exception
            raise UserError(f"the tokenizer cannot encode a text ({error}); {ANY_TEXT}") from error
        return [np.array(encoding.ids, dtype=token_dtype(self)) for encoding in encodings]

    def decode(self, tokens: list[int]) -> bytes:
        tokens = [int(token) for token in tokens if token != self.bos]
        if self.bytes_of is not None:
            return b"".join(self.bytes_of[token] for token in tokens)
        return self.tokenizer.decode(tokens, skip_special_tokens=False).encode()

    def decode_each(self, tokens: Iterable[int]) -> Iterator[bytes]:
        """The bytes that each token adds as it comes."""
        if self.bytes_of is not None:
            yield from (self.decode([token]) for token in tokens)
            return
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        for token in tokens:
            yield (stream.step(self.tokenizer, int(token)) or "").encode()

    def describe(self) -> str:
        return f"{self.vocab_size:,} tokens, sha256 {self.sha256[:16]}"


def token_dtype(tokenizer: ByteTokenizer | FileTokenizer) -> type:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def byte_values() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves, the other bytes in order for U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    values = {chr(byte): byte for byte in printable}
    return values | {chr(256 + index): byte for index, byte in enumerate(others)}


def train_bpe(merges: int, documents: Iterable[bytes]) -> FileTokenizer:
    """Byte-level BPE with at most `merges` merges, on the first `TRAINING_BYTES` of documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def texts() -> Iterator[str]:
        size = 0
        for text in documents:
            yield text[: TRAINING_BYTES - size].decode("utf-8", "replace")
            size += len(text)
            if size >= TRAINING_BYTES:
                return

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return FileTokenizer(tokenizer.to_str())


def character_tokenizer(documents: Iterable[bytes]) -> FileTokenizer:
    """One token for each byte value in the first `TRAINING_BYTES` of documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    seen, size = set(), 0
    for text in documents:
        seen |= set(text[: TRAINING_BYTES - size])
        size += len(text)
        if size >= TRAINING_BYTES:
            break
    names = [name for name, byte in byte_values().items() if byte in seen]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return FileTokenizer(tokenizer.to_str())


def bpe_merges(spec: str) -> int | None:
    """N of `bpe:N`, None for other tokenizers."""
    if not spec.startswith("bpe:"):
        return None
    number = spec.removeprefix("bpe:")
    if not (number.isascii() and number.isdigit() and int(number) > 0):
        raise UserError(f"--tokenizer {spec}: N of bpe:N must be a positive number of merges")
    return int(number)


def read_tokenizer(spec: str) -> FileTokenizer:
    """The tokenizer of a tokenizer.json, a folder with one, or a name on the Hub (org/name)."""
    path = Path(os.path.expanduser(spec))
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.exists():
            return FileTokenizer(path.read_text(encoding="utf-8"))
        if spec.count("/") == 1 and not spec.startswith((".", "/", "~")):
            from kru_triton.train.text.shards import check_hub

            check_hub(f"--tokenizer {spec}")
            from huggingface_hub import hf_hub_download

            file = hf_hub_download(spec, "tokenizer.json")
            return FileTokenizer(Path(file).read_text(encoding="utf-8"))
    except UserError:
        raise
    except Exception as error:  # `tokenizers` raises plain Exception; the Hub many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"--tokenizer {spec}: {reason[0]}") from error
    raise UserError(
        f"--tokenizer {spec}: no such file; known: bytes, characters, bpe:N, the path of a "
        "tokenizer.json, org/name on the Hub"
    )


def is_lossless(tokenizer: FileTokenizer, texts: list[bytes]) -> bool:
    """Whether the first of the texts come back as they were."""
    return all(tokenizer.decode(tokenizer.encode(text).tolist()) == text for text in texts[:20])
