"""Runs the code blocks of a Markdown page, and compares what they print with what the page shows.

By the language of the block:

- `console`: lines after `$ ` are commands (`> ` or a final backslash continues one), the lines up
  to the next command are its output. Output that starts with `error:` belongs to exit code 2.
- `pycon`: a Python session (`>>>`), checked as by doctest. `python`: a program, run as a whole.
- `json`: must be JSON. `text` and `bibtex` are not run. Other languages are refused.

A page runs in one folder, top to bottom, in one Python namespace. A command that ends in
`# needs ...` (a GPU, the network) or leaves options out with ` ... ` is not run, but its options
must exist; `make` is only asked what it would do, and nothing is installed. In output, spaces do
not count, `...` stands for anything, and quantities may differ by a factor of two: calibrations are
fitted again and again, and a page that is further off tells another story. Where no output is
shown, built-in workloads are stood in for by a small trace.

`python tests/docs_blocks.py` writes today's output into README.md and docs/.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_RUN = ("text", "bibtex")
NOT_HERE = re.compile(r"#\s*needs .+$|\s\.\.\.(?=\s|$)", re.M)
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<body>.*?)^ *```$", re.M | re.S
)
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
_UNITS = {
    **{"GJ": (1e9, "J"), "MJ": (1e6, "J"), "kJ": (1e3, "J"), "mJ": (1e-3, "J"), "µJ": (1e-6, "J")},
    **{"MWh": (1e6, "Wh"), "kWh": (1e3, "Wh"), "mWh": (1e-3, "Wh")},
    **{"h": (3600, "s"), "min": (60, "s"), "ms": (1e-3, "s"), "µs": (1e-6, "s")},
    **{"t": (1e6, "g"), "kg": (1e3, "g"), "mg": (1e-3, "g")},
    **{unit: (1, unit) for unit in ("J", "Wh", "s", "g")},
}
_QUANTITY = re.compile(rf"({_NUMBER.pattern}) ({'|'.join(_UNITS)})\b")
_RANGE = re.compile(rf"({_NUMBER.pattern}) - ({_NUMBER.pattern}) ({'|'.join(_UNITS)})\b")
_LARGEST_FACTOR = 2.0
_LARGE = re.compile(r"\b(azure_code|azure_conv|burstgpt)\b")


class BlockError(AssertionError):
    """A block does not do what its page shows."""


@dataclass(frozen=True)
class Piece:
    """A command or statement of a block, and where its output stands in the page."""

    line: int
    kind: str
    """`shell` or `python`."""
    source: str
    shown: str
    start: int
    """Offset in the page of the first character of the output shown."""


def pages() -> list[Path]:
    """README and all pages of the documentation that are written by hand."""
    generated = {ROOT / "docs" / "cli.md"}
    return [ROOT / "README.md", *sorted(set((ROOT / "docs").rglob("*.md")) - generated)]


def pieces(text: str) -> Iterator[Piece]:
    """Everything to run in a page, in order; refuses blocks that nobody could run."""
    for fence in _FENCE.finditer(text):
        language, body, start = fence["language"], fence["body"], fence.start("body")
        line = text.count("\n", 0, start) + 1
        if fence["indent"]:
            raise BlockError(f"line {line}: an indented block; move it out of the list")
        if language == "console":
            yield from _commands(body, line, start)
        elif language == "pycon":
            yield from _statements(body, line, start)
        elif language == "python":
            yield Piece(line, "python", body, "", start)
        elif language == "json":
            json.loads(body)
        elif language not in NOT_RUN:
            raise BlockError(
                f"line {line}: a block of language '{language}' is never run; use console, pycon, "
                "python or json, or text for what is not code"
            )


def _commands(body: str, line: int, start: int) -> Iterator[Piece]:
    command: list[str] = []
    shown = ""
    first, output_start, continues = line, start, False
    for number, row in enumerate(body.splitlines(keepends=True), start=line):
        text = row.rstrip("\n")
        is_command = text.startswith("$ ")
        if command and not continues and is_command:
            yield Piece(first, "shell", "\n".join(command), shown, output_start)
            command, shown = [], ""
        start += len(row)
        if is_command and not command:
            first = number
            command = [text[2:]]
        elif command and (continues or (not shown and text.startswith("> "))):
            command.append(text.removeprefix("> "))
        elif command:
            shown += row
            continue
        elif text.strip():
            raise BlockError(f"line {number}: output before any `$ ` command")
        continues = text.endswith("\\")
        output_start = start
    if command:
        yield Piece(first, "shell", "\n".join(command), shown, output_start)


def _statements(body: str, line: int, start: int) -> Iterator[Piece]:
    offsets = [0]
    for row in body.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(row))
    for example in doctest.DocTestParser().get_examples(body):
        rows = example.source.count("\n")
        output = start + offsets[example.lineno + rows]
        yield Piece(line + example.lineno, "python", example.source, example.want, output)


class Runner:
    """Runs the pieces of one page in a folder, commands with those beside `python`."""

    def __init__(self, folder: Path, python: Path = Path(sys.executable)) -> None:
        self.folder = folder
        self.commands = python.parent
        self.names: dict[str, object] = {"__name__": "__main__"}

    def run(self, piece: Piece) -> str | None:
        """What the piece prints; None where it is not run here."""
        return self._python(piece) if piece.kind == "python" else self._shell(piece)

    def _python(self, piece: Piece) -> str:
        printed = io.StringIO()
        mode = "single" if piece.source.count("\n") == 1 or piece.shown else "exec"
        with contextlib.redirect_stdout(printed):
            try:
                exec(compile(piece.source, f"<line {piece.line}>", mode), self.names)
            except Exception as error:
                said = traceback.format_exception_only(error)[-1]
                if not piece.shown.startswith("Traceback"):
                    raise BlockError(f"line {piece.line}: {said}") from error
                return f"Traceback (most recent call last):\n    ...\n{said}"
        return printed.getvalue()

    def _shell(self, piece: Piece) -> str | None:
        if NOT_HERE.search(piece.source):
            check_options(piece)
            return None
        if piece.source.startswith("pip install "):
            return None
        if piece.source.startswith("make "):
            self._bash(piece, f"make -C {ROOT} -n {piece.source.removeprefix('make ')}")
            return None
        small = piece.source if piece.shown.strip() else _LARGE.sub(r"\1.csv", piece.source)
        return self._bash(piece, small)

    def _bash(self, piece: Piece, command: str) -> str:
        path = f"{self.commands}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail\n{command}"],
            cwd=self.folder,
            env=os.environ | {"PATH": path, "COLUMNS": "100", "PYTHONWARNINGS": "default"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        wanted = 2 if piece.shown.startswith("error:") else 0
        if done.returncode != wanted:
            raise BlockError(
                f"line {piece.line}: `{piece.source}` ended with {done.returncode}, not {wanted}:\n"
                f"{done.stdout}"
            )
        return done.stdout


def check_options(piece: Piece) -> None:
    """The options of an `energymodel` command that is not run must exist."""
    from typer.testing import CliRunner  # noqa: PLC0415

    from energymodel.cli import app  # noqa: PLC0415

    words = NOT_HERE.sub("", piece.source).replace("\\\n", " ").split()
    if words[0] != "energymodel":
        return
    command = []
    for word in words[1:]:
        if word.startswith("-") or "." in word:
            break
        command.append(word)
        if CliRunner().invoke(app, [*command, "--help"]).exit_code != 0:
            command.pop()
            break
    helped = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    known = helped.stdout.split()
    if unknown := [word for word in words if word.startswith("--") and word not in known]:
        raise BlockError(
            f"line {piece.line}: `{piece.source}`: `energymodel {' '.join(command)}` has no "
            f"{', '.join(unknown)}"
        )


def compare(piece: Piece, printed: str) -> None:
    """Refuse output that is not what is shown, see above."""
    shown, got = _in_base_units(piece.shown), _in_base_units(printed)
    match = re.fullmatch(_pattern(shown), got, re.S)
    if match is None:
        raise BlockError(
            f"line {piece.line}: `{piece.source.strip()}` shows\n{piece.shown.strip()}\n"
            f"but prints\n{printed.strip()}"
        )
    for old, new in zip(_NUMBER.findall(shown), match.groups(), strict=True):
        a, b = (float(text.replace(",", "")) for text in (old, new))
        if not (a == b or (a > 0 and b > 0 and 1 / _LARGEST_FACTOR <= a / b <= _LARGEST_FACTOR)):
            raise BlockError(
                f"line {piece.line}: `{piece.source.strip()}` shows {old} where it prints {new}; "
                "look whether the text still holds, then `make docs-output`"
            )


def _in_base_units(text: str) -> str:
    """Words one space apart, `1.2 kJ` as `1200 J`: a prefix may change with the number."""

    def base(match: re.Match[str]) -> str:
        size, unit = _UNITS[match[2]]
        return f"{float(match[1].replace(',', '')) * size:.6g} {unit}"

    return _QUANTITY.sub(base, _RANGE.sub(r"\1 \3 - \2 \3", " ".join(text.split())))


def _pattern(shown: str) -> str:
    parts = []
    for part in re.split(r"(\.\.\.|\s+|\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)", shown):
        if part == "...":
            parts.append(".*?")
        elif part.isspace():
            parts.append(r"\s*" if parts and parts[-1] == ".*?" else r"\s+")
        elif _NUMBER.fullmatch(part):
            parts.append(f"({_NUMBER.pattern})")
        elif part:
            parts.append(re.escape(part))
    # spaces around `...` are part of what it stands for
    return re.sub(r"\\s\+(?=\.\*\?)", r"\\s*", "".join(parts))


def refreshed(text: str, folder: Path) -> str:
    """The page with today's output in place of the output shown."""
    runner, changes = Runner(folder), []
    for piece in pieces(text):
        printed = runner.run(piece)
        if not piece.shown.strip() or printed is None:
            continue
        if "..." not in piece.shown:
            new = "\n".join(line.rstrip() for line in printed.strip().splitlines()) + "\n"
            blank = piece.shown[len(piece.shown.rstrip("\n")) + 1 :]
            changes.append((piece.start, len(piece.shown), new + blank))
            continue
        numbers = iter(compare_words(piece, printed).groups())
        new = _NUMBER.sub(lambda _, numbers=numbers: next(numbers), piece.shown)
        changes.append((piece.start, len(piece.shown), new))
    for start, length, new in reversed(changes):
        text = text[:start] + new + text[start + length :]
    return text


def compare_words(piece: Piece, printed: str) -> re.Match[str]:
    """As `compare`, whatever the numbers."""
    match = re.fullmatch(_pattern(piece.shown.strip()), " ".join(printed.split()), re.S)
    if match is None:
        raise BlockError(f"line {piece.line}: prints other words now:\n{printed}")
    return match


def prepare(folder: Path) -> None:
    """Files that a reader would bring: traces and a model's config."""
    rows = [f"{2.5 * i},{200 + 37 * i % 900},{20 + 11 * i % 200}" for i in range(40)]
    header = "arrival_seconds,input_tokens,output_tokens"
    for name in ("requests", "week", "azure_code", "azure_conv", "burstgpt"):
        text = "\n".join([header, *rows]) + "\n"
        (folder / f"{name}.csv").write_text(text, encoding="utf-8")
    config = json.loads((ROOT / "profiles" / "models" / "llama-3.2-1b.json").read_text("utf-8"))
    (folder / "my-model").mkdir()
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    (folder / "my-model" / "config.json").write_text(json.dumps(public), encoding="utf-8")


def main() -> None:
    """Write today's output into the pages named, or into all."""
    for page in [Path(name) for name in sys.argv[1:]] or pages():
        text = page.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
            prepare(Path(name))
            new = refreshed(text, Path(name))
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page}: output renewed")


if __name__ == "__main__":
    main()
