"""The files that documents are in, local or remote, as bytes.

**Faults.** Shards have the size that was found when the run began, or reading fails: a reply or a
file that is short, even one cut at a line end, or a reply of a file that has another size, is an
error, not an end. Anything that goes wrong with a remote shard, a request or what comes of it, is
tried again, `RETRIES` times in a row with growing pauses; then, and at once for local files,
`DataError` names the shard.
"""

import bz2
import contextlib
import dataclasses
import functools
import gzip
import io
import lzma
import os
import re
import socket
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kru_triton.train.run.settings import UserError

RETRIES = 10  # in a row, without a document between them
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds; doubled each time
STALL = 30.0  # seconds without a byte
CHUNK = 4 << 20  # bytes of one request
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
MAGIC = re.compile(  # the first bytes of compressed files
    rb"(?P<gzip>\x1f\x8b\x08)|(?P<bz2>BZh[1-9](?:1AY&SY|\x17rE8P\x90))|(?P<xz>\xfd7zXZ\0)"
    rb"|(?P<zstd>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)"
)


class DataError(UserError):
    """A shard that cannot be read, or not to its end."""

    def __init__(self, shard: str, reason: str):
        super().__init__(shard, reason)
        self.shard, self.reason = shard, reason

    def __str__(self) -> str:
        return f"{self.shard}: {self.reason}"


@dataclass(frozen=True)
class Shard:
    """One file, local or remote, and what was known of it when the run began."""

    url: str
    kind: str  # "json", "parquet" or "text"
    size: int | None  # bytes; None where the server does not say
    name: str  # the URL; of local files, which may be moved, the path below their common folder

    @property
    def remote(self) -> bool:
        return "://" in self.url

    @property
    def identity(self) -> str:
        """What is equal for two shards that are one file."""
        return self.url if self.remote else os.path.realpath(self.url)

    @property
    def compression(self) -> str | None:
        """By its name; `opened` reads its first bytes."""
        return compression_of(self.url)


@dataclass(frozen=True)
class Source:
    """The shards of one spec."""

    spec: str
    weight: float
    field: str
    shards: tuple[Shard, ...]

    def with_shards(self, shards: Iterable[Shard]) -> "Source":
        return dataclasses.replace(self, shards=tuple(shards))

    def as_json(self) -> dict:
        return dataclasses.asdict(self)

    @staticmethod
    def of_json(value: dict) -> "Source":
        return Source(**{**value, "shards": tuple(Shard(**shard) for shard in value["shards"])})


def is_url(where: str) -> bool:
    return where.startswith(("http://", "https://"))


# Requests


def check_hub(what: str) -> None:
    """Raise UserError at once where the Hub cannot be reached."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{what}: HF_HUB_OFFLINE is set; use local files, as in json:GLOB")
    check_host(f"{what} (the Hub)", urllib.parse.urlsplit(constants.ENDPOINT))


def check_host(what: str, url: urllib.parse.SplitResult) -> None:
    """Raise UserError where nothing answers at the host of `url`."""
    if urllib.request.getproxies().keys() & {"http", "https", "all"}:
        return  # the way is through the proxy
    address = url.hostname, url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection(address, timeout=5).close()
    except OSError as error:
        raise UserError(
            f"{what}: no connection to {address[0]}:{address[1]} ({describe_error(error)}); is "
            "there a network? Local files need none"
        ) from error


def describe_error(error: BaseException, lines: int = 1) -> str:
    """The first lines of an error, in one."""
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(text[:lines]) or type(error).__name__


def patiently(call: Callable, attempts: int = 4):
    """The result of `call`, after up to `attempts` tries while it raises OSError."""
    for attempt in range(attempts):
        try:
            return call()
        except OSError as error:
            status = getattr(error, "status", 0)
            if attempt == attempts - 1 or (400 <= status < 500 and status != 429):
                raise
            time.sleep(pause(attempt))


@functools.cache
def file_system(url: str):
    """The fsspec file system of a URL's protocol."""
    import fsspec

    if url.startswith("hf://"):
        return fsspec.filesystem("hf")
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)
    options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    return fsspec.filesystem(url.partition(":")[0], **options)


class Reply(NamedTuple):
    """What a server sends for a file or a part of it."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def mimetype(self) -> str:
        return self.headers.get("Content-Type", "").partition(";")[0]

    @property
    def encoding(self) -> str:
        """How it is compressed, though that was not asked for."""
        return self.headers.get("Content-Encoding", "").replace("identity", "")

    @property
    def content_range(self) -> tuple[int | None, int | None]:
        """Where a part begins, and the size of the whole; None where the reply does not say."""
        pattern = r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)"
        match = re.fullmatch(pattern, self.headers.get("Content-Range", ""))
        return tuple(number and int(number) for number in match.groups()) if match else (None, None)


class StatusError(OSError):
    """A reply that is an error."""

    def __init__(self, status: int):
        super().__init__(f"HTTP {status}")
        self.status = status


def ask(
    url: str, begin: int = 0, end: int | None = None, *, body: bool = True, fresh: bool = False
) -> Reply:
    """The reply for a remote file or, with `end`, for a part of it.

    Args:
        body: whether to read it.
        fresh: whether caches on the way must ask the server.

    Raises:
        StatusError: the reply is an error, other than that there are no bytes at `begin`.
        OSError: none came.
    """
    headers = {"Accept-Encoding": "identity"}  # or byte ranges would be of something else
    if end is not None:
        headers["Range"] = f"bytes={begin}-{end - 1}"
    if fresh:
        headers["Cache-Control"] = "no-cache"
    files = file_system(url.partition("//")[0] + "//")
    if url.startswith("hf://"):
        return ask_hub(files.url(url), headers)
    import aiohttp
    from fsspec.asyn import sync

    async def send() -> Reply:
        session = await files.set_session()
        async with session.get(files.encode_url(url), headers=headers) as reply:
            return Reply(reply.status, reply.headers, await reply.read() if body else b"")

    try:
        reply = sync(files.loop, send)
    except aiohttp.TooManyRedirects as error:
        raise OSError(f"{len(error.history)} redirects, one after another") from error
    except aiohttp.ClientError as error:
        raise OSError(describe_error(error)) from error
    if reply.status >= 400 and reply.status != 416:
        raise StatusError(reply.status)
    return reply


def ask_hub(url: str, headers: dict[str, str]) -> Reply:
    """The Hub's reply, with the user's token and the Hub's own retries."""
    from huggingface_hub import constants, utils

    headers = {**utils.build_hf_headers(), **headers}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    reply = utils.http_backoff("GET", url, headers=headers, timeout=timeout)
    utils.hf_raise_for_status(reply)
    return Reply(reply.status_code, reply.headers, reply.content)


# Bytes


class RangeFile(io.RawIOBase):
    """A shard as a file. Reads give what was asked for up to the shard's recorded size, or raise.

    A server that ignores byte ranges, or does not say the size, sends the whole file once.
    """

    def __init__(self, shard: Shard):
        self.shard, self.size = shard, shard.size
        self.position, self.whole = 0, None
        if self.size is None:
            self.whole = ask(shard.url).body
            self.size = len(self.whole)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.position)
        count = left if count is None or count < 0 else min(count, left)
        data = self.fetch(self.position, count) if count else b""
        self.position += count
        return data

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def fetch(self, begin: int, count: int) -> bytes:
        failures = 0
        while self.whole is None:
            try:
                if self.shard.remote:
                    data = self.remote_bytes(begin, count, fresh=failures > 0)
                else:
                    data = self.local_bytes(begin, count)
                if len(data) == self.size > count:
                    self.whole = data
                    break
                if len(data) == count:
                    return data
                raise OSError(
                    f"{len(data)} bytes at {begin} where {count} should be; the size was "
                    f"{self.size} when the run began"
                )
            except Exception as error:  # of many kinds below fsspec; see `wait`
                failures = wait(self.shard, error, failures)
        return self.whole[begin : begin + count]

    def local_bytes(self, begin: int, count: int) -> bytes:
        with open(self.shard.url, "rb") as file:
            file.seek(begin)
            return file.read(count)

    def remote_bytes(self, begin: int, count: int, fresh: bool) -> bytes:
        """A part of the shard, or all of it; OSError where the reply says that it is neither."""
        reply = ask(self.shard.url, begin, begin + count, fresh=fresh)
        first, total = reply.content_range
        if total not in (None, self.size):
            raise OSError(
                f"the server says that it has {total:,} bytes; it had {self.size:,} when the run "
                "began. If it has changed, begin a new run"
            )
        if reply.status == 200:
            if len(reply.body) != self.size:
                raise OSError(
                    f"{len(reply.body):,} bytes of {reply.mimetype or 'no type'} come in its "
                    f"place; it had {self.size:,} when the run began"
                )
        elif reply.encoding or first != begin:
            kind = f"bytes from {first} on" if first is not None else "no part"
            encoding = f" of what is compressed ({reply.encoding})" if reply.encoding else ""
            raise OSError(
                f"HTTP {reply.status} with {kind}{encoding}, where {count} bytes from {begin} on "
                "were asked for"
            )
        return reply.body


def wait(shard: Shard, error: Exception, failures: int) -> int:
    """Say what has gone wrong and pause, the longer the more often in a row; one failure more.

    Raises:
        DataError: it was once too often, or the shard is local and will not get better.
    """
    if not shard.remote or failures == RETRIES:
        times = f" ({failures + 1} times)" if failures else ""
        raise DataError(shard.url, f"{describe_error(error)}{times}") from error
    seconds = pause(failures)
    print(
        f"warning: {shard.url}: {describe_error(error)}; again in {seconds:.0f} s",
        file=sys.stderr,
    )
    time.sleep(seconds)
    return failures + 1


def pause(failures: int) -> float:
    return min(FIRST_PAUSE * 2**failures, LONGEST_PAUSE)


@contextlib.contextmanager
def opened(shard: Shard) -> Iterator[io.IOBase]:
    """The shard as a file of uncompressed bytes: a RangeFile where it is not compressed."""
    file = RangeFile(shard)
    compression = compression_of(shard.url, file.read(16))
    file.seek(0)
    if compression is None:
        yield file
        return
    with unpacked(io.BufferedReader(file, CHUNK), compression) as plain:
        yield plain


def compression_of(path: str, head: bytes = b"") -> str | None:
    """How a file is compressed, by its first bytes, else by its name."""
    path = path.partition("?")[0] if is_url(path) else path
    match = MAGIC.match(head)
    return match.lastgroup if match else COMPRESSED.get(os.path.splitext(path)[1])


def unpacked(file: io.IOBase, compression: str) -> io.IOBase:
    """The bytes of a compressed file."""
    if compression == "zstd":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return {"gzip": gzip, "bz2": bz2, "xz": lzma}[compression].open(file)


def read_all(file: io.IOBase) -> bytes:
    return b"".join(iter(lambda: file.read(CHUNK), b""))
