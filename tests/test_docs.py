"""Every code block and command of README.md and docs/ runs, and prints what the page shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from docs_blocks import ROOT, BlockError, Piece, Runner, compare, pages, pieces, prepare, refreshed

import energymodel
from energymodel.deployment import STACKS
from energymodel.models import list_models, load_model
from energymodel.operators import operator_table
from energymodel.specs import Origin, ServingConfig

GENERATED = {"cli.md"}  # made by `make docs`
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_block_does_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    runner = Runner(tmp_path)
    for piece in pieces(page.read_text(encoding="utf-8")):
        printed = runner.run(piece)
        if printed is not None and piece.shown.strip():
            compare(piece, printed)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target or target.startswith(("#", "mailto:")):
            continue
        path = (page.parent / target.partition("#")[0]).resolve()
        assert path.exists() or path.name in GENERATED, f"{page.name}: {target} leads nowhere"


# --- the runner itself --------------------------------------------------------------------------


def piece(shown: str, source: str = "x", kind: str = "shell") -> Piece:
    return Piece(line=1, kind=kind, source=source, shown=shown, start=0)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("a 10 J\n", "a   12 J\n"),
        ("1,024 x\n", "1,024 x"),
        ("head\n...\nlast 3", "head\nmany 5\nlines\nlast 3\n"),
        ("5.0e-3 s", "6e-3 s"),
        ("from 447 kJ - 1.01 MJ in 2 min", "from 439 - 989 kJ in 119 s"),
    ],
)
def test_spaces_elisions_and_small_changes_of_numbers_pass(shown: str, printed: str) -> None:
    compare(piece(shown), printed)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("a 10 J", "a 30 J"),
        ("a 10 J", "b 10 J"),
        ("a 0 J", "a 1 J"),
        ("9 kJ", "9 J"),
        ("a ... c", "a b d"),
    ],
)
def test_other_words_and_large_changes_fail(shown: str, printed: str) -> None:
    with pytest.raises(BlockError):
        compare(piece(shown), printed)


def test_a_page_is_split_into_commands_and_output() -> None:
    text = "# T\n\n```console\n$ echo a \\\n    b\na b\n$ cat <<'E'\n> c\n> E\nc\n```\n"
    first, second = pieces(text)
    assert (first.source, first.shown) == ("echo a \\\n    b", "a b\n")
    assert (second.source, second.shown) == ("cat <<'E'\nc\nE", "c\n")
    assert text[first.start :].startswith("a b\n")


def test_a_failing_command_is_told(tmp_path: Path) -> None:
    with pytest.raises(BlockError, match="ended with 1"):
        Runner(tmp_path).run(piece("", "false"))
    with pytest.raises(BlockError, match="has no --no-such"):
        Runner(tmp_path).run(piece("", "energymodel predict --no-such x  # needs a GPU"))
    assert Runner(tmp_path).run(piece("", "energymodel predict --gpu x  # needs a GPU")) is None


def test_a_session_is_checked(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    for part in pieces("```pycon\n>>> x = 3\n>>> x * 2\n6\n>>> 1 / 0\nTraceback ...\n```\n"):
        printed = runner.run(part)
        assert printed is not None
        if part.shown:
            compare(part, printed)


@pytest.mark.parametrize("text", ["```yaml\na: b\n```\n", "  ```console\n  $ ls\n  ```\n"])
def test_blocks_that_nobody_runs_are_refused(text: str) -> None:
    with pytest.raises(BlockError):
        list(pieces(text))


def test_output_is_renewed_in_place(tmp_path: Path) -> None:
    text = "a\n```console\n$ echo 7 J\n6 J\n\n$ echo x 9 y\nx 5 ...\n```\nb\n"
    assert refreshed(text, tmp_path) == text.replace("6 J", "7 J").replace("x 5", "x 9")


def test_the_pages_of_the_site_are_all_in_its_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"([\w/-]+\.md)$", menu, re.M))
    written = {str(page.relative_to(ROOT / "docs")) for page in pages() if page.parent != ROOT}
    assert written <= listed, written - listed


def test_the_glossary_defines_what_the_output_names() -> None:
    defined = set(re.findall(r"`([^`]+)`", (ROOT / "docs" / "glossary.md").read_text("utf-8")))
    result = energymodel.predict("translation", gpu="h100")
    named = {*result.to_dict(), *STACKS, *get_args(Origin)}
    named |= {*result.by_component_joules, *result.underestimate_factor}
    everything = ServingConfig(tensor_parallel=2, pipeline_parallel=2)
    for model in list_models():
        named |= {*operator_table(load_model(model), everything).names}
    assert named <= defined, named - defined
