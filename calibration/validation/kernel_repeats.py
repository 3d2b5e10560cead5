"""Tables of how far two boards of a kind agree, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from calibration.kernels.comparisons import Record
from calibration.validation.kernel_boards import (
    BAR,
    CAUSES,
    Repeat,
    celsius,
    idle_offset_watts,
    without_offset,
)
from calibration.validation.kernel_plots import BOARDS
from calibration.validation.kernel_tables import signed
from calibration.validation.report import markdown_table


def statistics_cells(values: Sequence[float]) -> list[str]:
    """Median, p90 and max of the sizes, and the median with its sign, in percent."""
    size = np.abs(values)
    return [
        f"{100 * np.median(size):.2f}",
        f"{100 * np.percentile(size, 90):.2f}",
        f"{100 * size.max():.2f}",
        f"{100 * np.median(values):+.2f}",
    ]


STATISTICS = ("median", "p90", "max", "sign")
_HEAD = [
    *("n", "warmer K"),
    *(f"{q}: {s}" if s == "median" else s for q in ("s", "W", "J") for s in STATISTICS),
]
_BAR = f"{100 * BAR:g} %"


def _difference_row(name: str, found: Sequence[Repeat]) -> list[str]:
    row = [name, str(len(found)), _warmer(found)]
    differences = [(r.seconds, r.watts, r.joules) for r in found]
    for values in zip(*differences, strict=True):
        known = [v for v in values if v is not None]
        row += statistics_cells(known) if known else ["-"] * len(STATISTICS)
    return row


def _warmer(found: Sequence[Repeat]) -> str:
    return f"{np.median([celsius(r.second) - celsius(r.first) for r in found]):+.1f}"


def repeat_sections(
    pairs: Sequence[Sequence[Repeat]], same_board: Sequence[Sequence[Repeat]]
) -> Iterator[str]:
    """Section of the page: every pair of boards, by class, causes, and what is beyond the bar."""
    yield (
        "## Repeatability: two boards of a kind\n\n"
        f"The same case on two boards; the aim is {_BAR}. Differences are second board / first "
        'board - 1, in %; median, p90 and max of their sizes, "sign" the median with its sign. '
        '"Warmer": how much warmer the second board was, median. The last rows are cases that one '
        "board measured twice."
    )
    if not pairs:
        yield "No case was measured on two boards of a kind yet."
        return
    rows = [_difference_row(" and ".join(pair[0].boards), pair) for pair in pairs]
    rows += [_difference_row(f"{pair[0].boards[0]}, twice", pair) for pair in same_board]
    every = [r for pair in pairs for r in pair]
    yield markdown_table(["boards", *_HEAD], rows)
    yield f"![Differences of two boards]({BOARDS})"
    yield "By class, all pairs of boards:"
    classes = dict.fromkeys(r.op_class for r in every)
    of = {c: [r for r in every if r.op_class == c] for c in classes}
    yield markdown_table(["class", *_HEAD], [_difference_row(c, of[c]) for c in classes])
    yield "### What the differences are"
    yield _causes(every)
    yield _offsets(pairs)
    yield _limits(pairs)
    missed = [r for r in every if r.largest > BAR]
    yield (
        f"### Beyond {_BAR}\n\n{len(missed)} of {len(every)} comparisons differ by more in "
        "seconds, watts or joules. Each case once, by its furthest pair of boards, the first board "
        'left of the arrow. "Limited": share of samples that the power limit held down. "Host us": '
        "the host's time an iteration, where it launches."
    )
    yield _missed(missed, every)


def _causes(every: Sequence[Repeat]) -> str:
    rows = []
    for cause, text in CAUSES.items():
        mine = [r for r in every if r.cause == cause]
        if mine:
            within = sum(r.largest <= BAR for r in mine)
            rows.append([f"{cause}: {text}", str(within), *_difference_row("", mine)[1:]])
    return markdown_table(["what the windows record", f"within {_BAR}", *_HEAD], rows)


def _offsets(pairs: Sequence[Sequence[Repeat]]) -> str:
    rows = []
    for pair in pairs:
        offset = idle_offset_watts(pair)
        steady = [
            r for r in pair if r.op_class not in ("idle", "base") and r.cause in ("draw", "time")
        ]
        if offset is None or not steady:
            continue
        before = [r.watts for r in steady]
        after = [without_offset(r, offset) for r in steady]
        rows.append(
            [
                " and ".join(pair[0].boards),
                f"{offset:+.1f}",
                _warmer(steady),
                str(len(steady)),
                *statistics_cells(before),
                *statistics_cells(after),
            ]
        )
    if not rows:
        return "No two boards measured both idle states and kernels at the same clock."
    head = ["boards", "idle offset W", "warmer K", "n"]
    head += [f"{what}: median" if s == "median" else s for what in ("W", "W less the offset")
             for s in STATISTICS]  # fmt: skip
    return (
        "Boards differ before they do any work. The offset is the median difference of idle states "
        'and of kernels that do next to nothing, at the same clock; "W less the offset" is what is '
        "left of the differences of kernels that ran at the same clock below the power limit, once "
        "it is taken off.\n\n" + markdown_table(head, rows)
    )


def _limits(pairs: Sequence[Sequence[Repeat]]) -> str:
    rows = []
    for pair in pairs:
        capped = [r for r in pair if r.cause == "power limit"]
        if capped:
            watts = [np.median([x["power_watts"] for x in side]) for side in _sides(capped)]
            clocks = [np.median([r.clocks[i] for r in capped]) / 1e6 for i in (0, 1)]
            rows.append(
                [
                    " and ".join(pair[0].boards),
                    str(len(capped)),
                    _arrow(watts, "{:.0f}"),
                    _arrow(clocks, "{:.0f}"),
                    *statistics_cells([v for r in capped if (v := r.seconds) is not None]),
                    *statistics_cells([v for r in capped if (v := r.joules) is not None]),
                ]
            )
    if not rows:
        return "No two boards ran the same kernel at the power limit."
    head = ["boards", "n", "median W", "median SM MHz"]
    head += [f"{q}: {s}" if s == "median" else s for q in ("s", "J") for s in STATISTICS]
    return (
        "At the power limit each board's regulation sets the average power it keeps, and the clock "
        "follows:\n\n" + markdown_table(head, rows)
    )


def _sides(found: Sequence[Repeat]) -> tuple[list[Record], list[Record]]:
    return [r.first for r in found], [r.second for r in found]


def _missed(missed: Sequence[Repeat], every: Sequence[Repeat]) -> str:
    furthest: dict[str, Repeat] = {}
    for r in sorted(missed, key=lambda r: (r.case, -r.largest)):
        furthest.setdefault(r.case, r)
    rows = []
    for r in furthest.values():
        one, other = r.first, r.second
        host = [None if x["graph"] else x.get("host_seconds_per_iteration") for x in (one, other)]
        limited = [x["window"]["throttle_shares"].get("sw_power_cap", 0.0) for x in (one, other)]
        beyond, pairs = (sum(x.case == r.case for x in found) for found in (missed, every))
        rows.append(
            [
                f"{r.case} ({', '.join(r.boards)})",
                f"{beyond}/{pairs}",
                *(signed(d) for d in (r.seconds, r.watts, r.joules)),
                _arrow([one["power_watts"], other["power_watts"]], "{:.0f}"),
                _arrow([c / 1e6 for c in r.clocks], "{:.0f}"),
                _arrow([celsius(one), celsius(other)], "{:.0f}"),
                _arrow([100.0 * s for s in limited], "{:.0f} %"),
                "-" if None in host else _arrow([1e6 * h for h in host if h is not None], "{:.0f}"),
                r.cause,
            ]
        )
    head = ["case", "pairs beyond", "s %", "W %", "J %", "W", "SM MHz", "deg C", "limited"]
    return markdown_table([*head, "host us", "cause"], rows)


def _arrow(pair: Sequence[float], form: str) -> str:
    one, other = (form.format(value) for value in pair)
    return one if one == other else f"{one} → {other}"
