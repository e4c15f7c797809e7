"""The documents of a shard, read from any position on.

**Positions.** A place in a shard is one number: the byte offset of a line, the number of a row. So
reading goes on from any document without what lies before it (but for compressed lines), and a
shard can be cut into pieces that different readers read, each line or row by exactly one of them.

**Rows without text** are left out, told and counted, wherever they are: where the field is missing,
null or empty, or the JSON line no object. A value that is no string is read as it is spelled, told
and counted too; a list or struct of Parquet is left out.
"""

import functools
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kru_triton.train.text import shards
from kru_triton.train.text.shards import DataError, RangeFile, Shard, Source, opened, read_all, wait

STRIPE = 1 << 16  # bytes of uncompressed text: what readers of one compressed file take in turn
START = -1  # position before the first document of a piece
NO_TEXT = "no text (left out)"  # what is counted of rows
NOT_TEXT = "not text (left out)"
AS_TEXT = "no string (read as text)"
REPLACED = "invalid UTF-8 (replaced)"


class Row(NamedTuple):
    """One document, or what is in the place of one."""

    at: int  # its position in the shard
    next: int  # that of what follows
    text: bytes | None  # UTF-8; None where the row has none
    remark: str = ""  # NO_TEXT, NOT_TEXT, AS_TEXT or REPLACED, where something is to be told
    why: str = ""  # in words


def read_shard(source: Source, index: int, at: int, piece: int, pieces: int) -> Iterator[Row]:
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


# JSON lines


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
    while offset < end and (chunk := file.read(shards.CHUNK)):
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


# Parquet


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


# Text files


def text_rows(shard: Shard, field: str, at: int, piece: int, pieces: int) -> Iterator[Row]:
    """The file as one document, which belongs to the first piece."""
    if at > 0 or piece > 0:
        return
    with opened(shard) as file:
        text = read_all(file)
    yield make_row(0, text, why="the file is empty")
