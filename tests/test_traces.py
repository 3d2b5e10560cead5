from __future__ import annotations

import gzip
import io
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from energymodel.errors import EnergyModelError, TraceError
from energymodel.trace_formats import known_formats
from energymodel.traces import (
    MAX_TOKENS,
    ROW_FAULTS,
    explain_dropped,
    read_trace,
)

SHARED = Path(__file__).parents[2] / "shared" / "data" / "traces"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the published traces are not beside this checkout"
)
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:05.9799600,110,27
"""
EXPECTED = {"arrival": [0.0, 0.052, 2.0], "input": [4808, 3180, 110], "output": [10, 8, 27]}
SAME_IN_EVERY_FORMAT = {
    "azure": AZURE,
    "azure-crlf": AZURE.replace("\n", "\r\n"),
    "azure-no-final-newline": AZURE.rstrip(),
    "azure-bom-and-blank-lines": "\ufeff" + AZURE.replace("\n", "\n\n"),
    "azure-offset": AZURE.replace("600,", "600+00:00,"),
    "azure-zulu": AZURE.replace(" 18:", "T18:").replace("600,", "600Z,"),
    "azure-some-offsets": AZURE.replace("04.0319600,", "04.0319600+00:00,").replace(
        "18:17:05.9799600,", "20:17:05.9799600+0200,"
    ),
    "azure-quoted": AZURE.replace(",", '","')
    .replace("\n", '"\n"')
    .removesuffix('"')
    .join('"\n')[:-1],
    "azure-semicolons": AZURE.replace(",", ";"),
    "burstgpt": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,4808,10,4818,Conversation log\n"
        "5.052,GPT-4,3180,8,3188,API log\n"
        '7,"GPT-4, turbo",110,27,137,"a ""log"""\n'
    ),
    "burstgpt-sessions": (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,"
        "Log Type\n"
        "5,1,0.5,ChatGPT,4808,10,4818,Conversation log\n"
        "5.052,2,0.5,ChatGPT,3180,8,3188,Conversation log\n"
        "7,3,0.5,ChatGPT,110,27,137,Conversation log\n"
    ),
    "mooncake": (
        '{"timestamp": 3000, "input_length": 4808, "output_length": 10, "hash_ids": [0, 1]}\n'
        '{"timestamp": 3052, "input_length": 3180, "output_length": 8, "hash_ids": []}\n'
        '{"hash_ids": [7], "output_length": 27, "input_length": 110, "timestamp": 5000.0}\n'
    ),
    "mooncake-csv": (
        "timestamp_ms,input_length,output_length,n_hash_blocks\n"
        "3000,4808,10,14\n3052,3180,8,15\n5000,110,27,1\n"
    ),
    "vidur": (
        "arrived_at,num_prefill_tokens,num_decode_tokens\n1.0,4808,10\n1.052,3180,8\n3.0,110,27\n"
    ),
    "splitwise": (
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,"
        "token_size\n0,2,0,0,1,4808,10\n1,2,0,0.052,1,3180,8\n2,2,0,2,1,110,27\n"
    ),
    "plain": (
        "Arrival_Seconds, input_tokens ,output_tokens\n0,4808.0,10\n 0.052 ,3180,8e0\n2,110,+27\n"
    ),
    "plain-trailing-separator": (
        "arrival_seconds,input_tokens,output_tokens\n0,4808,10,\n0.052,3180,8,\n2,110,27,\n"
    ),
    "plain-jsonl": (
        '{"arrival_seconds": "0", "input_tokens": "4808", "output_tokens": 10}\n'
        '{"arrival_seconds": 0.052, "input_tokens": 3180, "output_tokens": 8}\n'
        '{"arrival_seconds": 2.0, "input_tokens": 110, "output_tokens": 27.0}\n'
    ),
}


def write(folder: Path, content: str | bytes, name: str = "trace.csv") -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def plain(*rows: str) -> str:
    return "\n".join(["arrival_seconds,input_tokens,output_tokens", *rows]) + "\n"


def zstd_frame(content: bytes) -> bytes:
    """A zstd file, as the command line tool writes it."""
    return zstandard.ZstdCompressor().compress(content)


def assert_expected(requests, trace_format):
    np.testing.assert_allclose(requests.arrival_seconds, EXPECTED["arrival"], atol=1e-9)
    assert requests.input_tokens.tolist() == EXPECTED["input"]
    assert requests.output_tokens.tolist() == EXPECTED["output"]
    assert requests.arrival_seconds.dtype == np.float64
    assert requests.input_tokens.dtype == requests.output_tokens.dtype == np.int64
    assert requests.trace_format == trace_format
    assert requests.dropped == ()
    assert requests.rows_read == 3


@pytest.mark.parametrize("name", SAME_IN_EVERY_FORMAT)
def test_the_same_requests_in_every_format(tmp_path, name):
    path = write(tmp_path, SAME_IN_EVERY_FORMAT[name])
    trace_format = name.split("-", maxsplit=1)[0]
    assert_expected(read_trace(path, strict=True), trace_format)
    assert_expected(read_trace(path, strict=True, trace_format=trace_format), trace_format)


@pytest.mark.parametrize("name", ["azure", "burstgpt", "mooncake", "plain"])
def test_compressed(tmp_path, name):
    text = SAME_IN_EVERY_FORMAT[name].encode()
    assert_expected(read_trace(write(tmp_path, gzip.compress(text, mtime=0), "t.csv.gz")), name)
    assert_expected(read_trace(write(tmp_path, zstd_frame(text), "t.csv.zst")), name)


@pytest.mark.parametrize("time", ["text", "date", "date-utc", "milliseconds-date"])
def test_parquet_with_dates(tmp_path, time):
    frame = pl.read_csv(AZURE.encode())
    if time != "text":
        unit = "ms" if time.startswith("milli") else "ns"
        frame = frame.with_columns(
            pl.col("TIMESTAMP").str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit=unit)
        )
    if time == "date-utc":
        frame = frame.with_columns(pl.col("TIMESTAMP").dt.replace_time_zone("UTC"))
    frame.write_parquet(tmp_path / "t.parquet")
    requests = read_trace(str(tmp_path / "t.parquet"), strict=True)
    assert requests.trace_format == "azure"
    np.testing.assert_allclose(requests.arrival_seconds, EXPECTED["arrival"], atol=1e-9)
    assert requests.input_tokens.tolist() == EXPECTED["input"]


def test_parquet_with_numbers_counts_bad_rows(tmp_path):
    pl.DataFrame(
        {
            "arrival_seconds": [0.0, 1.0, None, float("nan"), 2.0],
            "input_tokens": [5, 0, 7, 8, None],
            "output_tokens": [1.0, 2.0, 3.0, 4.0, 5.0],
            "note": [[1], [2], [3], [4], [5]],
        }
    ).write_parquet(tmp_path / "t.parquet")
    requests = read_trace(str(tmp_path / "t.parquet"))
    assert requests.input_tokens.tolist() == [5]
    found = {rows.kind: (rows.count, rows.first_lines) for rows in requests.dropped}
    assert found == {"missing": (2, (3, 5)), "bad_time": (1, (4,)), "zero_tokens": (1, (2,))}


def test_parquet_with_a_wrong_type_is_refused(tmp_path):
    pl.DataFrame(
        {"arrival_seconds": [[0.0]], "input_tokens": [1], "output_tokens": [1]}
    ).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(TraceError, match=r"arrival_seconds.*List"):
        read_trace(str(tmp_path / "t.parquet"))


@pytest.mark.parametrize("name", ["azure", "mooncake", "parquet", "gzip"])
def test_stdin_and_pipes(tmp_path, monkeypatch, name):
    if name == "parquet":
        packed = io.BytesIO()
        pl.read_csv(AZURE.encode()).write_parquet(packed)
        content = packed.getvalue()
    elif name == "gzip":
        content = gzip.compress(AZURE.encode())
    else:
        content = SAME_IN_EVERY_FORMAT[name].encode()
    trace_format = "mooncake" if name == "mooncake" else "azure"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert_expected(read_trace("-"), trace_format)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    assert_expected(read_trace(str(pipe)), trace_format)
    writer.join()


BAD_ROWS = {
    "extra_fields": ["1,2,3,4"],
    "missing": ["1,2", "1,,3", ",2,3", "1, ,3", "1"],
    "bad_time": [
        "soon,2,3",
        "nan,2,3",
        "inf,2,3",
        "-1,2,3",
        "1e300,2,3",
        "2023-11-16 18:17:03,2,3",
    ],
    "non_numeric": ["1,two,3", "1,nan,3", "1,2,0x10", "1,2,true", "1,2,\ufffd"],
    "negative": ["1,-2,3", "1,2,-1", "1,-inf,3"],
    "absurd": [f"1,{MAX_TOKENS + 1},3", "1,2,inf", "1,2,1e300", "1,2,99999999999999999999999"],
    "fractional": ["1,2.5,3", "1,2,0.5"],
    "zero_tokens": ["1,0,3", "1,2,0", "1,0,0"],
}


@pytest.mark.parametrize(
    ("kind", "row"), [(k, row) for k, rows in BAD_ROWS.items() for row in rows]
)
def test_each_kind_of_bad_row(tmp_path, kind, row):
    path = write(tmp_path, plain("0,10,20", row, "5,30,40"))
    requests = read_trace(path)
    assert requests.input_tokens.tolist() == [10, 30]
    (dropped,) = requests.dropped
    assert (dropped.kind, dropped.count, dropped.first_lines) == (kind, 1, (3,))
    assert requests.rows_read == 3
    assert f"1 row {kind}" in explain_dropped(dropped)
    with pytest.raises(TraceError, match=rf"--strict: 1 row {kind}.*line 3\)"):
        read_trace(path, strict=True)


def test_bad_dates(tmp_path):
    rows = ["2023-13-01 00:00:00,1,1", "2023-11-16,1,1", "0001-01-01 00:00:00,1,1", "17,1,1"]
    requests = read_trace(write(tmp_path, AZURE + "\n".join(rows)))
    assert_bad = {rows.kind: rows for rows in requests.dropped}
    assert assert_bad.keys() == {"bad_time"}
    assert assert_bad["bad_time"].first_lines == (5, 6, 7, 8)
    assert requests.arrival_seconds[-1] == pytest.approx(2.0)


def test_only_the_first_five_lines_are_kept(tmp_path):
    requests = read_trace(write(tmp_path, plain("0,1,1", *["1,-1,1"] * 1000)))
    (dropped,) = requests.dropped
    assert (dropped.count, dropped.first_lines) == (1000, (3, 4, 5, 6, 7))
    assert explain_dropped(dropped).endswith("lines 3, 4, 5, 6, 7, ...)")


def test_unsorted_rows_are_sorted_stably_and_reported(tmp_path):
    path = write(tmp_path, plain("7,1,1", "5,2,1", "x,9,9", "9,3,1", "5,4,1"))
    requests = read_trace(path)
    assert requests.arrival_seconds.tolist() == [0.0, 0.0, 2.0, 4.0]
    assert requests.input_tokens.tolist() == [2, 4, 1, 3]
    found = {rows.kind: rows.first_lines for rows in requests.dropped}
    assert found == {"bad_time": (4,), "unsorted": (3, 6)}
    with pytest.raises(TraceError, match="unsorted"):
        read_trace(path, strict=True)


def test_a_stray_quote_hides_no_other_row(tmp_path):
    requests = read_trace(write(tmp_path, plain("0,1,1", '"1,2,2', "2,3,3", '3,"4",4')))
    assert requests.input_tokens.tolist() == [1, 3, 4]
    assert [rows.first_lines for rows in requests.dropped] == [(3,)]


def test_broken_json_lines_are_counted(tmp_path):
    text = SAME_IN_EVERY_FORMAT["mooncake"] + '{"timestamp": 6, "inp\n[]\nnull\n'
    requests = read_trace(write(tmp_path, text))
    assert [(rows.kind, rows.first_lines) for rows in requests.dropped] == [("missing", (4, 5, 6))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n\n", "only blank lines"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (gzip.compress(b"x" * (3 << 20), mtime=0), "first two lines are longer"),
        (zstd_frame(b"x" * (3 << 20)), "first two lines are longer"),
        (plain("0,1,1", "1" * (2 << 20)).encode(), "line 3 is longer than 1,048,576 bytes"),
        (gzip.compress(plain("0,1,1", "1" * (2 << 20)).encode(), mtime=0), "line 3 is longer"),
        (zstd_frame(plain("0,1,1", "1" * (2 << 20)).encode()), "line 3 is longer"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\n", "no rows"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens", "no rows"),
        (b"a,b,c\n1,2,3\n", r"Found: 'a,b,c'.*azure: TIMESTAMP,ContextTokens.*plain: arrival_sec"),
        (b"1,2,3\n4,5,6\n", "not the columns of a known trace format"),
        (b"x\n" * 100, "Found: 'x'"),
        (b"x" * (3 << 20), "first two lines are longer"),
        (b"arrival_seconds,input_tokens,output_tokens\n" + b"1" * (3 << 20), "longer"),
        (bytes(range(256)) * 100, "binary data"),
        (plain("0,1,1").encode("utf-16"), "binary data"),
        (b"\xff\xd8\xff\xe0 picture", "binary data"),
        (b"PAR1 but not really", "cannot be read"),
        (b"\x1f\x8b\x08 but not really", "cannot be read"),
        (b"\x28\xb5\x2f\xfd but not really", "cannot be read"),
        (gzip.compress(AZURE.encode() * 1000, mtime=0)[:200], "cannot be read"),
        (AZURE.replace("\n", "\r").encode(), "cannot be read|not the columns"),
        (b'[{"timestamp": 1}]', "not one JSON object"),
        (b'{\n"timestamp": 1\n}', "not one JSON object"),
        (b"[" * 100_000, "not one JSON object"),
        (b'{"prompt": "hello"}\n', "Found: 'prompt'"),
        (plain("0,1,1").encode().replace(b"output", b"input"), "not the columns"),
        (
            b"arrival_seconds,input_tokens,output_tokens,input_tokens\n0,1,1,2\n",
            "two columns named 'input_tokens'",
        ),
        (
            b"timestamp,arrived_at,ContextTokens,GeneratedTokens,num_prefill_tokens,"
            b"num_decode_tokens\n",
            "columns of azure and vidur; choose with --trace-format",
        ),
        (plain("0,x,1", "1,0,1").encode(), "none of its 2 rows is a usable request.*1 row non_nu"),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_unusable_files(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(TraceError, match=f"(?s)trace.csv.*({message})") as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1200


def test_forced_format_lacks_its_columns(tmp_path):
    with pytest.raises(TraceError, match=r"Needed \(vidur\): vidur: arrived_at,num_prefill"):
        read_trace(write(tmp_path, AZURE), trace_format="vidur")


def test_unknown_format_lists_the_known():
    with pytest.raises(TraceError, match="Did you mean azure"):
        read_trace("any.csv", trace_format="azur")
    assert "burstgpt" in known_formats()


def test_paths_that_are_no_trace(tmp_path):
    with pytest.raises(TraceError, match="no such file"):
        read_trace(str(tmp_path / "absent.csv"))
    with pytest.raises(TraceError, match="is a folder"):
        read_trace(str(tmp_path))
    with pytest.raises(TraceError, match="not a regular file"):
        read_trace("/dev/null")
    with pytest.raises(TraceError, match="cannot be opened"):
        read_trace("x" * 5000 + ".csv")
    with pytest.raises(TraceError, match="cannot be opened"):
        read_trace("nul\0.csv")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_permission_denied(tmp_path):
    path = write(tmp_path, AZURE)
    Path(path).chmod(stat.S_IWUSR)
    with pytest.raises(TraceError, match="cannot be opened"):
        read_trace(path)


def test_a_name_with_wildcards_is_one_file(tmp_path):
    write(tmp_path, AZURE, "a1.csv")
    with pytest.raises(TraceError, match="no such file"):
        read_trace(str(tmp_path / "a*.csv"))
    assert_expected(read_trace(write(tmp_path, AZURE, "a[1].csv")), "azure")


fields = st.one_of(
    st.integers(-5, 50).map(str),
    st.floats().map(str),
    st.sampled_from(["", " ", "nan", "null", "1e3", '"', "\x00", "\x01", "\u00e9", "0x1", "1;2"]),
    st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=5),
)


@quick
@given(rows=st.lists(st.lists(fields, max_size=5), max_size=20))
def test_rows_are_used_or_counted(tmp_path, rows):
    good = ["0,1,1"]
    lines = [",".join(row) for row in rows]
    path = write(tmp_path, plain(*good, *lines, *good))
    try:
        requests = read_trace(path)
    except EnergyModelError:
        return
    dropped = sum(r.count for r in requests.dropped if r.kind != "unsorted")
    assert requests.arrival_seconds.size + dropped == requests.rows_read
    assert requests.rows_read <= len(lines) + 2
    assert requests.arrival_seconds[0] == 0.0
    assert np.all(np.diff(requests.arrival_seconds) >= 0)
    for tokens in (requests.input_tokens, requests.output_tokens):
        assert tokens.min() >= 1
        assert tokens.max() <= MAX_TOKENS
    assert {r.kind for r in requests.dropped} <= ROW_FAULTS.keys()


@quick
@given(
    milliseconds=st.lists(st.integers(0, 10**10), min_size=1, max_size=30),
    data=st.data(),
    json_lines=st.booleans(),
)
def test_what_is_written_is_read(tmp_path, milliseconds, data, json_lines):
    arrivals = [time / 1000 for time in milliseconds]
    lengths = st.lists(st.integers(1, MAX_TOKENS), min_size=len(arrivals), max_size=len(arrivals))
    rows = list(zip(arrivals, data.draw(lengths), data.draw(lengths), strict=True))
    keys = ("arrival_seconds", "input_tokens", "output_tokens")
    if json_lines:
        text = "\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in rows)
    else:
        text = plain(*(f"{t!r},{i},{o}" for t, i, o in rows))
    requests = read_trace(write(tmp_path, text))
    rows.sort(key=lambda row: row[0])
    expected = [t - rows[0][0] for t, _, _ in rows]
    np.testing.assert_allclose(requests.arrival_seconds, expected, rtol=1e-12, atol=1e-9)
    assert requests.input_tokens.tolist() == [i for _, i, _ in rows]
    assert requests.output_tokens.tolist() == [o for _, _, o in rows]


@quick
@given(
    content=st.one_of(
        st.binary(max_size=300),
        st.tuples(
            st.sampled_from([AZURE.encode(), SAME_IN_EVERY_FORMAT["mooncake"].encode(), b"PAR1"]),
            st.binary(max_size=100),
        ).map(b"".join),
        st.tuples(st.integers(0, 120), st.binary(min_size=1, max_size=3)).map(
            lambda edit: gzip.compress(AZURE.encode())[: edit[0]] + edit[1]
        ),
    )
)
def test_any_bytes_give_requests_or_a_clear_error(tmp_path, content):
    try:
        requests = read_trace(write(tmp_path, content))
    except EnergyModelError as error:
        assert "trace.csv" in str(error)
    else:
        assert requests.arrival_seconds.size >= 1


def edited(text: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """`text` with pieces cut out and others put in their place."""
    for place, length, piece in edits:
        at = place % (len(text) + 1)
        text = text[:at] + piece + text[at + length :]
    return text


@quick
@given(
    name=st.sampled_from(sorted(SAME_IN_EVERY_FORMAT)),
    edits=st.lists(
        st.tuples(
            st.integers(0, 10_000),
            st.integers(0, 30),
            st.one_of(
                st.binary(max_size=4),
                st.sampled_from(
                    [b",", b'"', b"\n", b"\r", b"\r\n", b"\0", b"-", b"1e18", b"nan", b"{", b"\xff"]
                ),
            ),
        ),
        max_size=6,
    ),
    packed=st.sampled_from([bytes, gzip.compress, zstd_frame]),
)
def test_an_edited_trace_gives_requests_or_a_clear_error(tmp_path, name, edits, packed):
    content = packed(edited(SAME_IN_EVERY_FORMAT[name].encode(), edits))
    try:
        requests = read_trace(write(tmp_path, content))
    except EnergyModelError as error:
        assert "trace.csv" in str(error)
        assert "\n" not in str(error)
    else:
        assert requests.arrival_seconds[0] == 0.0
        assert np.all(np.diff(requests.arrival_seconds) >= 0)
        for tokens in (requests.input_tokens, requests.output_tokens):
            assert tokens.min() >= 1
            assert tokens.max() <= MAX_TOKENS


@quick
@given(cut=st.integers(0, 400), packed=st.sampled_from([gzip.compress, zstd_frame]))
def test_a_packed_trace_that_breaks_off_is_refused(tmp_path, cut, packed):
    whole = packed(plain("0,1,1", *(f"{i},{i % 7 + 1},3" for i in range(1, 500))).encode())
    with pytest.raises(TraceError, match=r"trace\.csv"):
        read_trace(write(tmp_path, whole[: min(20 + cut, len(whole) - 5)]))


class Endless(io.RawIOBase):
    """A stream that repeats a piece, and fails the test if more than 2 MiB are taken from it."""

    def __init__(self, piece: bytes) -> None:
        self.piece = piece * (65536 // len(piece) + 1)
        self.taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        size = min(len(buffer), 65536)
        buffer[:size] = self.piece[:size]
        self.taken += size
        assert self.taken <= 2 << 20, "the whole stream is read"
        return size


@pytest.mark.parametrize(
    ("piece", "message"),
    [(b"y\n", "Found: 'y'"), (b"\0", "binary data"), (b"1,", "longer"), (b"\n", "only blank")],
)
def test_an_endless_stream_is_refused_by_its_head(monkeypatch, piece, message):
    stream = io.TextIOWrapper(io.BufferedReader(Endless(piece)))
    monkeypatch.setattr("sys.stdin", stream)
    with pytest.raises(TraceError, match=f"stdin.*{message}"):
        read_trace("-")


def test_a_stream_too_long_to_hold_is_refused(monkeypatch):
    monkeypatch.setattr("energymodel.trace_files._MOST_STREAM_BYTES", 1 << 20)
    content = plain("0,1,1", *["1,1,1"] * 300_000).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(TraceError, match=r"stdin: more than .* write it to a file"):
        read_trace("-")


def test_too_many_lines_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("energymodel.trace_files._MOST_LINES", 1000)
    with pytest.raises(TraceError, match="more than 1,000 lines"):
        read_trace(write(tmp_path, gzip.compress(plain("0,1,1", *[""] * 2000).encode())))


def test_closed_stdin(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(TraceError, match="stdin is closed"):
        read_trace("-")


def test_quotes_far_down_the_file_are_read(tmp_path):
    rows = [f"{i},100,10" for i in range(100_000)]  # more than the head
    requests = read_trace(write(tmp_path, plain(*rows, '100000,"7","8"')), strict=True)
    assert requests.input_tokens[-1] == 7
    assert requests.output_tokens[-1] == 8


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_mixed_line_ends_and_the_first_arrival_late(tmp_path, end):
    text = f"\ufeffarrival_seconds,input_tokens,output_tokens\r\n100.5,7,1{end}102,8.0,2\n103,9,3"
    requests = read_trace(write(tmp_path, text), strict=True)
    assert requests.arrival_seconds.tolist() == [0.0, 1.5, 2.5]
    assert requests.input_tokens.tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("azure_code.csv", "azure_code"),
        ("day.2024-05-01.csv.gz", "day.2024-05-01"),
        ("v1.2", "v1.2"),
        ("t.JSONL.zst", "t"),
        (".csv", ".csv"),
    ],
)
def test_the_name_is_the_file_without_its_endings(tmp_path, file, name):
    assert read_trace(write(tmp_path, plain("0,1,1"), file)).name == name


@needs_shared
@pytest.mark.parametrize(
    ("file", "rows", "kept", "duration", "input_mean", "output_mean"),
    [
        ("azure_llm_2023_code.csv", 8819, 8819, 3435.9, 2047.8, 27.9),
        ("azure_llm_2023_conv.csv", 19366, 19366, 3501.7, 1154.7, 211.1),
        ("mooncake_conversation.csv", 12031, 12031, 3537.0, 12035.1, 342.6),
        ("burstgpt_1_head.csv", 379, 364, 37003.0, 558.5, 283.9),
    ],
)
def test_published_traces(file, rows, kept, duration, input_mean, output_mean):
    requests = read_trace(str(SHARED / file))
    assert requests.rows_read == rows
    assert requests.arrival_seconds.size == kept
    assert requests.arrival_seconds[-1] == pytest.approx(duration, abs=0.06)
    assert requests.input_tokens.mean() == pytest.approx(input_mean, abs=0.06)
    assert requests.output_tokens.mean() == pytest.approx(output_mean, abs=0.06)
    failed = {r.kind: r.count for r in requests.dropped}
    assert failed == ({"zero_tokens": 15} if "burst" in file else {})


@needs_shared
def test_published_gap_variation_and_quantiles():
    code = read_trace(str(SHARED / "azure_llm_2023_code.csv"))
    gaps = np.diff(code.arrival_seconds)
    assert gaps.std() / gaps.mean() == pytest.approx(13.15, abs=0.005)
    assert np.median(code.input_tokens) == 1469
    assert np.percentile(code.input_tokens, 95) == pytest.approx(7303, abs=1)
    assert np.median(code.output_tokens) == 13


def test_importing_the_reader_imports_no_polars():
    script = "import sys, energymodel.traces, energymodel.workloads; print('polars' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert result.stdout.strip() == b"False"
