"""Documents, each a name and its text, and what is known of them."""

import gzip
import hashlib
import io
import lzma
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from kru_triton.train.run.settings import UserError
from kru_triton.train.text.rows import START, read_shard
from kru_triton.train.text.shards import (
    Source,
    compression_of,
    describe_error,
    is_url,
    read_all,
    unpacked,
)
from kru_triton.train.text.sources import (
    find_source,
    matching_files,
    relative_names,
    stdlib_files,
)

Document = tuple[str, bytes]  # name, text


def read_documents(spec: str, limit: int = 1 << 62, once: bool = True) -> list[Document]:
    """Every document that `spec` names, in a fixed order; of a stream, the first `limit` bytes.

    `once` is that of `matching_files`.
    """
    if spec == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = stdlib_files()
        return [(Path(file).relative_to(root).as_posix(), read_text(file)) for file in files]
    if is_local_text(spec):
        files = matching_files(spec, once)
        texts = [read_text(file) for file in files]
        if not any(texts):
            raise UserError(f"{spec!r} is an empty corpus: all {len(files)} files have 0 bytes")
        return list(zip(relative_names(files), texts))
    return list(first_bytes(source_documents(find_source(spec)), limit))


def read_text(file: str) -> bytes:
    """The bytes of one file, which must be UTF-8, maybe compressed."""
    try:
        text = Path(file).read_bytes()
        if compression := compression_of(file, text[:16]):
            with unpacked(io.BytesIO(text), compression) as plain:
                text = read_all(plain)
        text.decode("utf-8")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or describe_error(error)
        raise UserError(f"cannot read {file}: {reason}") from error
    except UnicodeDecodeError as error:
        byte = f"byte 0x{text[error.start]:02x} at offset {error.start}"
        raise UserError(f"{file} is not UTF-8 text: {byte} ({error.reason})") from error
    return text


def is_local_text(spec: str) -> bool:
    return spec.startswith("text:") and not is_url(spec.removeprefix("text:"))


def files_by_name(spec: str, once: bool = True) -> dict[str, str]:
    """Real paths and URLs of a spec's files; without `once`, paths as they are."""
    if once or not is_local_text(spec):
        return {shard.name: shard.identity for shard in find_source(spec).shards}
    files = matching_files(spec, once)
    return dict(zip(relative_names(files), files))


def source_documents(source: Source) -> Iterator[Document]:
    """The documents of a source, shard after shard; the name of each is its place."""
    for index, shard in enumerate(source.shards):
        for row in read_shard(source, index, START, 0, 1):
            if row.text:
                yield f"{shard.name}:{row.at}", row.text


def first_bytes(documents: Iterator[Document], limit: int) -> Iterator[Document]:
    """The first documents that have `limit` bytes together."""
    size = 0
    for name, text in documents:
        yield name, text
        size += len(text)
        if size >= limit:
            return


# Statistics


def statistics(documents: list[Document]) -> dict:
    """Counts, and the SHA-256 of all names, lengths and texts."""
    digest = hashlib.sha256()
    for name, text in documents:
        digest.update(name_bytes(f"{name}\0{len(text)}\0"))
        digest.update(text)
    count = sum(len(text) for _, text in documents)
    return {"documents": len(documents), "bytes": count, "sha256": digest.hexdigest()}


def shard_statistics(sources: Sequence[Source]) -> dict:
    """Number and size of the shards, and the SHA-256 of their names and sizes."""
    shards = [shard for source in sources for shard in source.shards]
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(name_bytes(f"{shard.name}\0{shard.size}\0"))
    sizes = [shard.size for shard in shards]
    return {
        "sources": [source.spec for source in sources],
        "shards": len(shards),
        "bytes": None if None in sizes else sum(sizes),
        "sha256": digest.hexdigest(),
    }


def name_bytes(name: str) -> bytes:
    """UTF-8, or what bytes a file's name has that is none."""
    return name.encode("utf-8", "surrogateescape")


def describe_statistics(known: dict) -> str:
    """Statistics for people."""
    size = "unknown size" if known["bytes"] is None else f"{known['bytes']:,} bytes"
    if "shards" in known:
        kind = f"{known['shards']:,} shards of {', '.join(known['sources'])}, streamed, {size}"
        return f"{kind}, sha256 of names and sizes {known['sha256'][:16]}"
    return f"{known['documents']:,} documents, {size}, sha256 {known['sha256'][:16]}"


def compressed_bits_per_byte(documents: list[Document]) -> dict[str, float]:
    """What `gzip -9` and `xz` make of the documents, one after another."""
    text = b"".join(text for _, text in documents)
    return {
        "gzip": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz": 8 * len(lzma.compress(text)) / len(text),
    }
