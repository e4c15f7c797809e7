"""Where documents come from: the shards behind a `--data` spec.

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

A source without a string in its first rows is an error: another field may be meant.
"""

import collections
import glob
import itertools
import os
import re
import sysconfig
import urllib.parse
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kru_triton.train.run.settings import UserError
from kru_triton.train.text.rows import AS_TEXT, START, read_shard
from kru_triton.train.text.shards import (
    COMPRESSED,
    Shard,
    Source,
    ask,
    check_host,
    check_hub,
    describe_error,
    file_system,
    is_url,
    patiently,
)

FIRST_ROWS = 10_000  # of a source, one of which must have text
KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    ".parquet": "parquet",
    ".txt": "text",
}


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
    rows = (
        row for index in range(len(source.shards)) for row in read_shard(source, index, START, 0, 1)
    )
    reasons = collections.Counter()
    for row in itertools.islice(rows, FIRST_ROWS):
        if row.text and row.remark != AS_TEXT:
            return source
        reasons[row.why] += 1
    why = ": " + reasons.most_common(1)[0][0] if reasons else ""
    raise UserError(f"{source.spec}: the first rows have no text{why}")


# Remote files


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


# Local files


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
