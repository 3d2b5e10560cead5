"""Opens trace files, pipes and stdin, packed or not, in memory that does not grow with a line.

A line is what a reader has to hold at once, so files with endless lines (a disk image, one column
without line ends, a packed bomb) are found by reading in pieces and refused.
"""

from __future__ import annotations

import gzip
import stat
import sys
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from energymodel.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD_BYTES = 1 << 20
"""The header and the first row must lie within this many bytes; no line may be longer."""

_MOST_LINES = 1 << 28  # 4.6 GB of requests
_MOST_STREAM_BYTES = 1 << 31  # of stdin or a pipe, which has to be held in memory
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_PARQUET = b"PAR1"


def is_parquet(source: Path | bytes) -> bool:
    """Whether the content starts as Parquet does."""
    return _first_bytes(source) == _PARQUET


def open_source(path: str, check_head: Callable[[bytes], object]) -> Path | bytes:
    """The path of a regular file, or the bytes of stdin (`-`) or of a pipe.

    Parameters
    ----------
    path : str
    check_head : callable
        Refuses a stream by its first `HEAD_BYTES`, before the rest is read; not called for packed
        streams and Parquet.

    Raises
    ------
    TraceError
        If there is no such file, it cannot be opened, or a stream is too long to be held.
    """
    try:
        if path == "-":
            if sys.stdin is None:
                raise TraceError("stdin is closed; give a trace file")
            return _read_stream(sys.stdin.buffer, "stdin", check_head)
        mode = Path(path).stat().st_mode
        if stat.S_ISFIFO(mode):
            with Path(path).open("rb") as pipe:
                return _read_stream(pipe, path, check_head)
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise TraceError(f"{path}: is {kind}; give a trace file, or - for stdin")
        with Path(path).open("rb") as file:
            if not path.isascii() and not _is_unicode(path):
                return _read_stream(file, path, check_head)  # polars takes no such name
            return Path(path)
    except FileNotFoundError as error:
        raise TraceError(f"{path}: no such file; check the path given as the trace") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TraceError(f"{path!r}: cannot be opened ({reason})") from error


def read_head(source: Path | bytes, where: str) -> bytes:
    """First bytes of a text file, unpacked, at most `HEAD_BYTES`."""
    with unpacked(source, where) as file:
        return _read_up_to(file, HEAD_BYTES)


def check_lines(source: Path | bytes, where: str) -> bool:
    """Read through a text file, unpacked, in pieces; whether it holds a double quote.

    Raises
    ------
    TraceError
        If a line is longer than `HEAD_BYTES`, there are more than 268 million lines, or a packed
        file is damaged.
    """
    line, length, quotes = 1, 0, False
    with unpacked(source, where) as file:
        while piece := file.read(HEAD_BYTES):
            first = piece.find(b"\n")
            if length + (len(piece) if first < 0 else first) > HEAD_BYTES:
                raise TraceError(
                    f"{where}: line {line} is longer than {HEAD_BYTES:,} bytes; a trace has one "
                    "line for each request"
                )
            length = length + len(piece) if first < 0 else len(piece) - piece.rfind(b"\n") - 1
            line += piece.count(b"\n")
            quotes = quotes or b'"' in piece
            if line > _MOST_LINES:
                raise TraceError(
                    f"{where}: has more than {_MOST_LINES:,} lines; split the trace into parts"
                )
    return quotes


def unreadable(where: str, reason: object) -> TraceError:
    """The error for a file that breaks off or breaks its format's rules."""
    text = str(reason).strip().split("\n")[0]
    return TraceError(
        f"{where}: cannot be read as a trace ({text}); is the file complete, and is it CSV, JSON "
        "lines (plain, gzip, zstd) or Parquet?"
    )


@contextmanager
def unpacked(source: Path | bytes, where: str) -> Iterator[IO[bytes]]:
    """A source, open for reading, gzip and zstd undone; TraceError if it is damaged."""
    import zstandard  # noqa: PLC0415

    magic = _first_bytes(source)
    try:
        with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as raw:
            if magic.startswith(_GZIP):
                with gzip.open(raw, "rb") as file:
                    yield cast("IO[bytes]", file)
            elif magic == _ZSTD:
                decompressor = zstandard.ZstdDecompressor()
                with decompressor.stream_reader(raw, read_across_frames=True) as file:
                    yield file
            else:
                yield raw
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise unreadable(where, error) from error


def _first_bytes(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:4]
    with source.open("rb") as file:
        return file.read(4)


def _is_unicode(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_up_to(file: IO[bytes], size: int) -> bytes:
    """Exactly `size` bytes unless the file ends: a single read may give fewer."""
    pieces = []
    while size > 0 and (piece := file.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _read_stream(stream: IO[bytes], where: str, check_head: Callable[[bytes], object]) -> bytes:
    pieces = [_read_up_to(stream, HEAD_BYTES)]
    if not pieces[0].startswith((_GZIP, _ZSTD, _PARQUET)):
        check_head(pieces[0])
    size = len(pieces[0])
    while piece := stream.read(HEAD_BYTES):
        pieces.append(piece)
        size += len(piece)
        if size > _MOST_STREAM_BYTES:
            raise TraceError(
                f"{where}: more than {_MOST_STREAM_BYTES >> 30} GiB; write it to a file and give "
                "its path, which is read piece by piece"
            )
    return b"".join(pieces)
