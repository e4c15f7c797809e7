"""Where documents come from: the shards behind a `--data` spec, read from any position on.

    [WEIGHT:]SPEC   stdlib                                   source of this Python's own library
                    text:GLOB                                a file is a document
                    json:GLOB[#field]                        a line is a document (JSON lines)
                    parquet:GLOB[#field]                     a row is a document
                    hub:org/name[@config][/split][#field]    a row is a document

A GLOB is a local one or an http(s) URL, where only `*` matches. What of a local one exists by that
very name, special characters and all, is that file or folder. JSON lines and text may be compressed
(gzip, bzip2, xz, zstd: known by the first bytes, whatever the name). The field is `text`, the split
`train` where none is named; `meta.text` is the field `text` of the object or struct `meta`, unless
there is a field of that whole name. Shards of a Hub data set must be .jsonl, .ndjson, .json,
.parquet or .txt files; none of its code ever runs.

**Once.** A file that a spec reaches several times (links, cycles of links, `**/**`) is one shard.
Its real path decides, and names it where that matches. A hard link is a file of its own, as a copy.

**Positions.** A place in a shard is one number: the byte offset of a line, the number of a row. So
reading goes on from any document without what lies before it (but for compressed lines), and a
shard can be cut into pieces that different readers read, each line or row by exactly one of them.

**Rows without text** are left out, told and counted, wherever they are: where the field is missing,
null or empty, or the JSON line no object. A value that is no string is read as it is spelled, told
and counted too; a list or struct of Parquet is left out. A source without a string in its first
rows is an error: another field may be meant.

**Faults.** Shards have the size that was found when the run began, or reading fails: a reply or a
file that is short, even one cut at a line end, or a reply of a file that has another size, is an
error, not an end. Anything that goes wrong with a remote shard, a request or what comes of it, is
tried again, `RETRIES` times in a row with growing pauses; then, and at once for local files,
`DataError` names the shard.
"""

import bz2
import collections
import contextlib
import dataclasses
import functools
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import re
import socket
import sys
import sysconfig
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kru_triton.train.run.settings import UserError

RETRIES = 10  # in a row, without a document between them
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds; doubled each time
STALL = 30.0  # seconds without a byte
CHUNK = 4 << 20  # bytes of one request
STRIPE = 1 << 16  # bytes of uncompressed text: what readers of one compressed file take in turn
START = -1  # position before the first document of a piece
FIRST_ROWS = 10_000  # of a source, one of which must have text

NO_TEXT = "no text (left out)"  # what is counted of rows
NOT_TEXT = "not text (left out)"
AS_TEXT = "no string (read as text)"
REPLACED = "invalid UTF-8 (replaced)"

KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    ".parquet": "parquet",
    ".txt": "text",
}
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


class Row(NamedTuple):
    """One document, or what is in the place of one."""

    at: int  # its position in the shard
    next: int  # that of what follows
    text: bytes | None  # UTF-8; None where the row has none
    remark: str = ""  # NO_TEXT, NOT_TEXT, AS_TEXT or REPLACED, where something is to be told
    why: str = ""  # in words


# From specs to shards


def split_weight(spec: str) -> tuple[float, str]:
    """Weight (1 where there is none) and the rest of `[WEIGHT:]SPEC`."""
    match = re.match(r"(\d+\.?\d*|\.\d+):(.*)", spec)
    if not match:
        return 1.0, spec
    if not float(match[1]) > 0:
        raise UserError(f"--data {spec}: the weight must be positive")
    return float(match[1]), match[2]


def find_source(spec: str) -> Source:
    """Look up the shards of `[WEIGHT:]SPEC` and their sizes.

    Raises:
        UserError: there is no such data, or no text in the first rows.
        DataError: these cannot be read.
    """
    weight, rest = split_weight(spec)
    kind, _, where = rest.partition(":")
    if rest == "stdlib":
        return Source(spec, weight, "", local_shards(stdlib_files(), "text"))
    if kind == "text" and where:
        return Source(spec, weight, "", find_shards(where, "text"))
    if kind in ("json", "parquet") and where:
        where, field = split_field(where, local=not is_url(where))
        return with_text(Source(spec, weight, field, find_shards(where, kind)))
    if kind == "hub" and where:
        where, field = split_field(where, local=False)
        return with_text(Source(spec, weight, field, find_hub_shards(where)))
    raise UserError(
        f"unknown data {spec!r}; known: stdlib, text:GLOB (as in text:books/**/*.txt), "
        "json:GLOB[#field], parquet:GLOB[#field], hub:org/name[@config][/split][#field]"
    )


def split_field(where: str, local: bool) -> tuple[str, str]:
    """GLOB and field of `GLOB[#field]`. A # in the name of a local file marks no field."""
    cuts = [match.start() for match in re.finditer("#", where)]
    for cut in [len(where), *reversed(cuts)] if cuts and local else ():
        if any(map(os.path.isfile, find_paths(where[:cut]))):
            return where[:cut], where[cut + 1 :] or "text"
    where, _, field = where.partition("#")
    return where, field or "text"


def with_text(source: Source) -> Source:
    """`source`, one of whose first rows must have text: else the field may not be meant."""
    rows = (row for index in range(len(source.shards)) for row in read(source, index, START, 0, 1))
    reasons = collections.Counter()
    for row in itertools.islice(rows, FIRST_ROWS):
        if row.text and row.remark != AS_TEXT:
            return source
        reasons[row.why] += 1
    why = ": " + reasons.most_common(1)[0][0] if reasons else ""
    raise UserError(f"{source.spec}: the first rows have no text{why}")


def is_url(where: str) -> bool:
    return where.startswith(("http://", "https://"))


def find_shards(where: str, kind: str) -> tuple[Shard, ...]:
    """The files of a local or http(s) GLOB, sorted."""
    if not is_url(where):
        return local_shards(matching_files(f"{kind}:{where}"), kind)
    import aiohttp

    check_host(where, urllib.parse.urlsplit(where))
    urls = [where]
    if "*" in where:
        try:
            urls = sorted(patiently(lambda: file_system(where).glob(where)))
        except (OSError, aiohttp.ClientError) as error:
            reason = getattr(error, "status", 0)
            reason = f"HTTP {reason}" if reason else describe_error(error)
            raise UserError(f"cannot list {where}: {reason}") from error
    if not urls:
        raise UserError(f"no file matches '{kind}:{where}'")
    with ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(find_size, urls, itertools.repeat(kind)))
    return tuple(Shard(url, kind, size, url) for url, size in zip(urls, sizes))


def find_size(url: str, kind: str) -> int | None:
    """The bytes of a remote file of a kind; None where the server does not say.

    The reply for its first byte says it beyond doubt in its Content-Range. One without may be of
    something else, such as a login page, and must come twice.
    """
    try:
        size, sure = patiently(lambda: reported_size(url, kind))
        if not sure:
            before = size
            size, sure = patiently(lambda: reported_size(url, kind, fresh=True))
            if not sure and size != before:
                raise OSError(f"it has {before} bytes in one reply, {size} in the next")
    except OSError as error:
        raise UserError(f"cannot read {url}: {describe_error(error)}") from error
    return size


def reported_size(url: str, kind: str, fresh: bool = False) -> tuple[int | None, bool]:
    """The size that a reply for the first byte says, and whether it is the file's beyond doubt."""
    reply = ask(url, 0, 1, body=False, fresh=fresh)
    if reply.encoding:  # the size is that of something compressed
        return None, False
    if reply.status in (206, 416):  # an empty file has no first byte
        return reply.content_range[1], True
    if kind != "text" and reply.mimetype == "text/html":
        raise OSError("a page (text/html) comes in its place; is there a login?")
    length = reply.headers.get("Content-Length")
    return length and int(length), False


def matching_files(spec: str, once: bool = True) -> list[str]:
    """The files of `KIND:GLOB`, local, absolute, sorted.

    Args:
        once: each real file once. Without it a file counts as often as links lead to it, as it did
            when some runs began. (A cycle of links leads to it 40 times; with two it is endless.)
    """
    kind, _, where = spec.partition(":")
    pattern, paths = os.path.abspath(os.path.expanduser(where)), find_paths(where)
    files = distinct(filter(os.path.isfile, paths))
    if not once:
        every = filter(os.path.isfile, glob.iglob(pattern, recursive=True))
        return sorted(itertools.islice(every, 100 * len(files))) or files
    if files:
        return files
    if any(map(os.path.isdir, paths)):
        suffix = {"json": ".jsonl", "parquet": ".parquet"}.get(kind, ".txt")
        files = f"{kind}:{where.rstrip('/')}/**/*{suffix}"
        raise UserError(f"{spec!r} is a folder; name the files in it, as in {files!r}")
    raise UserError(f"no file matches {spec!r} (looked for {pattern})")


def find_paths(where: str) -> list[str]:
    """What a local GLOB matches. As much of it as exists by that very name is no pattern."""
    known, rest = os.path.abspath(os.path.expanduser(where)), []
    while not os.path.lexists(known):
        known, name = os.path.split(known)
        rest.insert(0, name)
    return expand(os.path.join(glob.escape(known), *rest))


def expand(pattern: str) -> list[str]:
    """Paths that an absolute pattern matches; `**` is this folder and those below it."""
    if pattern.endswith("/**"):
        pattern += "/*"
    root, deep, rest = pattern.partition("/**/")
    if not deep:
        return glob.glob(pattern)
    folders = [folder for path in glob.glob(root or "/") for folder in folders_below(path)]
    return [path for f in folders for path in expand(os.path.join(glob.escape(f), rest))]


def folders_below(root: str) -> list[str]:
    """A folder and those in it, each real one once: links are followed after everything else."""
    found, seen, starts = [], set(), [root]
    for start in starts:
        for folder, names, _ in os.walk(start):
            if (real := os.path.realpath(folder)) in seen:
                names.clear()
                continue
            names[:] = sorted(name for name in names if not name.startswith("."))
            starts += filter(os.path.islink, (os.path.join(folder, name) for name in names))
            seen.add(real)
            found.append(folder)
    return found


def distinct(files: Iterable[str]) -> list[str]:
    """Sorted, each real file once: under the path with the fewest links, the first of these."""
    paths = {}
    for path in sorted(files):
        paths.setdefault(os.path.realpath(path), []).append(path)
    return sorted(p[0] if len(p) == 1 else min(p, key=count_links) for p in paths.values())


def count_links(path: str) -> int:
    return sum(map(os.path.islink, [path, *Path(path).parents]))


def local_shards(paths: list[str], kind: str) -> tuple[Shard, ...]:
    names = relative_names(paths)
    return tuple(Shard(p, kind, os.stat(p).st_size, name) for p, name in zip(paths, names))


def relative_names(paths: list[str]) -> list[str]:
    """Paths below their common folder."""
    folder = common_folder(paths)
    return [os.path.relpath(path, folder) for path in paths]


def common_folder(paths: Iterable[str]) -> str:
    return os.path.commonpath([os.path.dirname(path) for path in paths])


def stdlib_files() -> list[str]:
    """The `*.py` files of the running Python's standard library, sorted by path.

    Left out: tests, installed packages, and what depends on how this Python was built. The text is
    the same for every build of one Python version, up to what a distribution changes; so its
    SHA-256 is part of every result.
    """
    root = sysconfig.get_paths()["stdlib"]
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [n for n in folders if n not in skip and not n.startswith("config-")]
        paths += [
            os.path.join(folder, name)
            for name in files
            if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    if not paths:
        raise UserError(f"no *.py file under {root}; use --data text:GLOB")
    return sorted(paths, key=lambda path: Path(path).relative_to(root).as_posix())


def find_hub_shards(where: str) -> tuple[Shard, ...]:
    """The files of org/name[@config][/split], at the commit that is the newest now."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/([^/@]+))?", where)
    if not match:
        raise UserError(f"hub:{where}: must be hub:org/name[@config][/split][#field]")
    name, config, split = match[1], match[2], match[3] or "train"
    check_hub(f"hub:{where}")
    import datasets
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        builder = datasets.load_dataset_builder(name, config)
    except (datasets.exceptions.DatasetNotFoundError, RepositoryNotFoundError) as error:
        advice = "is the name right? A gated or private one needs HF_TOKEN"
        raise UserError(f"hub:{where}: {describe_error(error)} ({advice})") from error
    except Exception as error:  # an unknown config, code, no data files, an odd server: many kinds
        raise UserError(f"hub:{where}: {describe_error(error, 3)}") from error
    splits = builder.config.data_files or {}
    if split not in splits:
        raise UserError(f"hub:{where}: no split {split!r}; it has {', '.join(map(str, splits))}")
    files = file_system("hf://")
    shards = []
    for url in dict.fromkeys(map(str, splits[split])):  # its patterns may name a file twice
        stem, suffix = os.path.splitext(url)
        kind = KINDS.get(os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix)
        if kind is None:
            raise UserError(
                f"hub:{where}: {os.path.basename(url)} is not of a kind that is read here "
                f"({', '.join(KINDS)}, plain or {', '.join(COMPRESSED)})"
            )
        size = patiently(lambda url=url: files.info(url))["size"]
        shards.append(Shard(url, kind, size, url))
    return tuple(shards)


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


# Reading


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


def read(source: Source, index: int, at: int, piece: int, pieces: int) -> Iterator[Row]:
    """The documents from position `at` on of piece `piece` of `pieces` of one shard.

    Raises:
        DataError: the shard cannot be read, or has no text in that field.
    """
    shard, failures = source.shards[index], 0
    rows = {"json": json_rows, "parquet": parquet_rows, "text": text_rows}[shard.kind]
    while True:
        try:
            for row in rows(shard, source.field, at, piece, pieces):
                yield row
                at, failures = row.next, 0
            return
        except DataError:
            raise
        except Exception as error:  # what the parsers say of wrong bytes; see `wait`
            failures = wait(shard, error, failures)


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


def json_rows(shard: Shard, field: str, at: int, piece: int, pieces: int) -> Iterator[Row]:
    """Lines as documents. A piece has the lines that begin in its part of the bytes."""
    with opened(shard) as file:
        plain = isinstance(file, RangeFile)
        if plain:
            begin, end = file.size * piece // pieces, file.size * (piece + 1) // pieces
            goes_on = at > begin
            lines = read_lines(file, at if goes_on else begin, end, not goes_on and begin > 0)
        else:
            lines = read_lines(file, 0, sys.maxsize)
        for offset, line in lines:
            if offset < at or not line or line.isspace():
                continue
            if not plain and offset // STRIPE % pieces != piece:
                continue
            yield row_of_line(shard, field, offset, line)


def read_lines(
    file: io.IOBase, begin: int, end: int, inside: bool = False
) -> Iterator[tuple[int, bytes]]:
    """Each line that begins at `begin` or later and before `end`, with its own offset.

    Args:
        inside: whether `begin` may be inside a line, which is not given.
    """
    offset = begin - inside  # the line before may end there
    if offset:
        file.seek(offset)
    parts = []  # of a line whose end has not been read
    while offset < end and (chunk := file.read(CHUNK)):
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            line = b"".join([*parts, line])
            parts.clear()
            if not inside and offset < end:
                yield offset, line
            offset += len(line) + 1
            inside = False
        if inside:
            offset += len(rest)
        else:
            parts.append(rest)
    if any(parts) and offset < end:
        yield offset, b"".join(parts)


def row_of_line(shard: Shard, field: str, offset: int, line: bytes) -> Row:
    """The row of one JSON line."""
    row = functools.partial(Row, offset, offset + len(line) + 1)
    remark = why = ""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        text, remark, why = line.decode("utf-8", "replace"), REPLACED, error.reason
    try:
        value = parse_json(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise OSError(
            f"not JSON lines: {error} in the line at byte {offset}, {line[:40]!r}; each object "
            "must be one line, as jq -c . writes it (a line of spaces is left out)"
        ) from error
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        raise DataError(
            shard.url,
            f"not JSON lines: the line at byte {offset} is list, not an object with a field "
            f"{field!r}; each object must be one line, as jq -c '.[]' writes it",
        )
    if value is None:
        return row(None, NO_TEXT, "the line is null")
    if not isinstance(value, dict):
        why = f"the line is {type(value).__name__}, not an object with a field {field!r}"
        return row(None, NOT_TEXT, why)
    path = reach(value, field)
    if not path:
        kinds = (f"{key} ({type(item).__name__})" for key, item in leaves(value))
        return row(None, NO_TEXT, missing_field(field, kinds))
    text = functools.reduce(dict.get, path, value)
    if text is None or text == "":
        return row(None if text is None else b"", NO_TEXT, empty_field(field))
    if not isinstance(text, str):
        remark, why = AS_TEXT, not_text(field, type(text).__name__)
        text = json.dumps(text, ensure_ascii=False, separators=(",", ":"))
    try:
        return row(text.encode("utf-8"), remark, why)
    except UnicodeEncodeError as error:  # half of a surrogate pair
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return row(text.encode(), REPLACED, error.reason)


def reach(tree: dict, field: str) -> list[str]:
    """The keys from a dict of dicts to a field: the one of that name, or `a.b` as `b` in `a`.

    Empty where there is none.
    """
    if field in tree:
        return [field]
    for dot in reversed([match.start() for match in re.finditer(r"\.", field)]):
        inner = tree.get(field[:dot])
        if isinstance(inner, dict) and (path := reach(inner, field[dot + 1 :])):
            return [field[:dot], *path]
    return []


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every field that can be named, with its value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


json_decoder = json.JSONDecoder(parse_constant=lambda name: None)  # NaN is no value


def parse_json(text: str):
    try:
        return json_decoder.decode(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # a whole number of more digits than int() takes
        return json.loads(text, parse_int=float)


def missing_field(field: str, known: Iterable[str]) -> str:
    return f"no field {field!r}; it has {', '.join(known) or 'none'}; name one with #field"


def empty_field(field: str) -> str:
    return f"field {field!r} is null or empty"


def not_text(field: str, kind: str) -> str:
    return f"field {field!r} is {kind}, not text; name another with #field"


def parquet_rows(shard: Shard, field: str, at: int, piece: int, pieces: int) -> Iterator[Row]:
    """Rows as documents. A piece has its part of the row numbers."""
    import pyarrow.compute
    from pyarrow import parquet

    file = parquet.ParquetFile(RangeFile(shard), page_checksum_verification=True)
    columns = struct_tree(file.schema_arrow)
    path = reach(columns, field)
    count = file.metadata.num_rows
    first, last = max(at, count * piece // pieces), count * (piece + 1) // pieces
    if not path:
        why = missing_field(field, (f"{name} ({kind})" for name, kind in leaves(columns)))
        for row in range(first, last):
            yield Row(row, row + 1, None, NO_TEXT, why)
        return
    begin = 0  # row number of the group
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if begin < last and begin + size > first:
            number = begin
            for batch in file.iter_batches(1024, [group], [".".join(path)]):
                column = batch.column(path[0])
                for name in path[1:]:
                    column = pyarrow.compute.struct_field(column, name)
                texts, remark, why = column_texts(column, field)
                for row in range(max(first, number), min(last, number + len(texts))):
                    yield make_row(row, texts[row - number], remark, why)
                number += len(texts)
                if number >= last:
                    return
        begin += size


def struct_tree(fields) -> dict:
    """Types by name, of an Arrow schema or of a struct's fields; a struct as such a dict."""
    import pyarrow

    return {
        field.name: struct_tree(field.type) if pyarrow.types.is_struct(field.type) else field.type
        for field in fields
    }


def column_texts(column, field: str) -> tuple[list[bytes | None], str, str]:
    """The texts of an Arrow array, a remark on all of them, and why."""
    import pyarrow

    strings, kind = pyarrow.large_string(), not_text(field, column.type)
    try:
        return column.cast(pyarrow.large_binary()).to_pylist(), "", empty_field(field)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):  # neither strings nor bytes
        pass
    try:
        return column.cast(strings).cast(pyarrow.large_binary()).to_pylist(), AS_TEXT, kind
    except pyarrow.ArrowNotImplementedError:
        return [None] * len(column), NOT_TEXT, kind


def make_row(at: int, text: bytes | None, remark: str = "", why: str = "") -> Row:
    """A row, or a file, whose position is counted; invalid UTF-8 is replaced."""
    if not text:
        return Row(at, at + 1, text, remark if remark == NOT_TEXT else NO_TEXT, why)
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        return Row(at, at + 1, text.decode("utf-8", "replace").encode(), REPLACED, error.reason)
    return Row(at, at + 1, text, remark, why)


def text_rows(shard: Shard, field: str, at: int, piece: int, pieces: int) -> Iterator[Row]:
    """The file as one document, which belongs to the first piece."""
    if at > 0 or piece > 0:
        return
    with opened(shard) as file:
        text = read_all(file)
    yield make_row(0, text, why="the file is empty")


def read_all(file: io.IOBase) -> bytes:
    return b"".join(iter(lambda: file.read(CHUNK), b""))


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
