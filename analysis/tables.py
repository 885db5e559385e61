"""One table in CSV, Markdown (GitHub's) and booktabs LaTeX, with everything escaped for the format it goes into.

A table is a DataFrame of strings as a reader shall see them, so that the numbers are the same in every format. Which
values stand in bold is told apart from them, by place.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pandas as pd

MISSING = "–"  # how a missing value is shown
LONG = 40  # rows from which on a LaTeX table may break over pages
LATEX_NEEDS = r"% In the preamble: \usepackage[T1]{fontenc} \usepackage{booktabs,graphicx,longtable,pdflscape}"
LATEX_SIZES = ((r"\small", 4.6), (r"\scriptsize", 3.7), (r"\tiny", 2.9))  # and points that a character takes, about
UPRIGHT, TURNED = (
    345,
    550,
)  # points of a line of the class article on A4 and letter, and of one on a page turned sideways
LATEX_SPECIALS = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    "[": "{[}",  # a row that begins with one would be read as the option of the \\ before it
    "*": "{*}",  # likewise
    "±": r"$\pm$",
    "–": "--",
    "−": r"$-$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "≠": r"$\neq$",
    "∞": r"$\infty$",
    "µ": r"$\mu$",
}
# Beside ASCII, what pdfLaTeX sets in T1 without a package; any other character is shown by its number.
LATEX_LETTERS = frozenset(map(chr, range(0xA1, 0x17F))) - frozenset("\u00adĦħĸĿŀŉŦŧ") | frozenset("—‘’“”„‚…•€™←→")
LATEX_LIGATURES = re.compile(r"(?<=-)(?=-)|(?<=')(?=')|(?<=,)(?=,)")
# What Markdown (GitHub's) would take for markup; an underscore inside a word is none.
MARKDOWN_SPECIALS = re.compile(r"([\\`*|<$]|\](?=[(\[:])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|~(?=~)|&(?=#?\w+;)|^[#>])")
NUMBER = re.compile(r"[-+]?\d[\d.,]*( (±|to) [-+]?\d[\d.,]*)?( \[.*\])?")

Places = Collection[tuple[int, str]]  # (row, column): the row by position, the column by name


@dataclass(frozen=True)
class TableSection:
    """A table of the report with a heading of its own; its values are as a reader shall see them."""

    id: str  # of the heading's anchor and of the files tables/<id>.csv, .md, .tex
    title: str
    note: str
    table: pd.DataFrame  # not empty
    bold: Places = ()


def number(value: float, digits: int, sign: bool = False, significant: bool = False) -> str:
    """A number for print; a missing one is a dash, and -0.0 is 0.0."""
    if value is None or pd.isna(value):
        return MISSING
    if significant:
        return f"{value:#.{digits}g}".rstrip(".") if abs(value) < 10**digits else f"{value:.0f}"
    value = round(float(value), digits) + 0.0
    return f"{value:+.{digits}f}" if sign and value else f"{value:.{digits}f}"


def with_margin(value: float, low: float, high: float, digits: int) -> str:
    """'91.2 ± 1.3': a value and half the width of its interval; without an interval the value alone."""
    text, half = number(value, digits), (high - low) / 2
    return text if pd.isna(value) or pd.isna(half) else f"{text} ± {number(half, digits)}"


def with_interval(value: float, low: float, high: float, digits: int) -> str:
    """'-1.2 [-2.0, -0.4]': a difference and its interval, signed; without an interval the difference alone."""
    text = number(value, digits, sign=True)
    if pd.isna(value) or pd.isna(low) or pd.isna(high):
        return text
    return f"{text} [{number(low, digits, sign=True)}, {number(high, digits, sign=True)}]"


def numeric_columns(table: pd.DataFrame) -> list[bool]:
    """Which columns hold numbers for print (with their intervals or without)."""
    answer = []
    for position in range(table.shape[1]):
        texts = {str(value) for value in table.iloc[:, position]} - {MISSING, ""}
        answer.append(bool(texts) and all(NUMBER.fullmatch(text) for text in texts))
    return answer


def to_csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False)


def to_markdown(table: pd.DataFrame, bold: Places = ()) -> str:
    """A pipe table, escaped; columns of numbers to the right."""
    lines = ["| " + " | ".join(markdown_escape(name) for name in table.columns) + " |"]
    lines.append("|" + "|".join("---:" if is_numeric else "---" for is_numeric in numeric_columns(table)) + "|")
    lines += ["| " + " | ".join(cells) + " |" for cells in _cells(table, bold, markdown_escape, "**{}**")]
    return "\n".join(lines) + "\n"


def to_latex(table: pd.DataFrame, caption: str = "", label: str = "", bold: Places = ()) -> str:
    """A booktabs table that fits the page, all escaped: a table float, or from `LONG` rows on a longtable.

    One that is too wide for the column is set in smaller print and, where that does not do, on pages turned sideways.
    """
    columns = "".join("r" if is_numeric else "l" for is_numeric in numeric_columns(table)) or "l"
    heads, widths = _latex_heads(table, columns)
    head = " & ".join(heads) + r" \\"
    body = [" & ".join(cells) + r" \\" for cells in _cells(table, bold, latex_escape, r"\textbf{{{}}}")]
    title = [rf"\caption{{{latex_escape(caption)}}}"] if caption else []
    title += [rf"\label{{{re.sub(r'[^A-Za-z0-9:.-]', '-', label)}}}"] if label else []
    upright = [size for size, points in LATEX_SIZES[:-1] if _latex_width(widths, points) <= UPRIGHT]
    turned = [size for size, points in LATEX_SIZES if _latex_width(widths, points) <= TURNED]
    size = (upright or turned or [LATEX_SIZES[-1][0]])[0]
    if len(table) >= LONG:
        lines = [rf"{{{size}\setlength{{\tabcolsep}}{{3pt}}\setlength{{\LTcapwidth}}{{\linewidth}}"]
        lines += [rf"\begin{{longtable}}{{{columns}}}"]
        lines += [*title, r"\\", r"\toprule", head, r"\midrule", r"\endfirsthead"] if title else []
        lines += [r"\toprule", head, r"\midrule", r"\endhead", r"\bottomrule", r"\endfoot", *body]
        lines += [r"\end{longtable}}"]
    else:
        lines = [r"\begin{table}", r"\centering", *title, rf"{size}\setlength{{\tabcolsep}}{{3pt}}"]
        lines += [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
        lines += [rf"\begin{{tabular}}{{{columns}}}"]
        lines += [r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]
    if not upright:
        lines = [r"\begin{landscape}", *lines, r"\end{landscape}"]
    return "\n".join([LATEX_NEEDS, *lines]) + "\n"


def latex_escape(text: Any) -> str:
    """Text that pdfLaTeX sets as it is, hostile or not; a character that it has no glyph for is shown as [U+4E2D]."""
    line = LATEX_LIGATURES.sub("\u200b", one_line(text))
    return "".join(_latex_character(character) for character in line)


def markdown_escape(text: Any) -> str:
    return MARKDOWN_SPECIALS.sub(r"\\\1", one_line(text))


def one_line(text: Any) -> str:
    return " ".join(str(text).split())


# -------------------------------------------------------------------------------------------------------------- helpers


def _cells(table: pd.DataFrame, bold: Places, escape, form: str):
    names = [str(name) for name in table.columns]
    for position, values in enumerate(table.itertuples(index=False)):
        yield [
            form.format(escape(value)) if (position, name) in bold else escape(value)
            for name, value in zip(names, values, strict=True)
        ]


def _latex_heads(table: pd.DataFrame, columns: str) -> tuple[list[str], list[int]]:
    """The names of the columns, broken into lines no wider than what is below them (or than their longest word); and
    each column's width in characters."""
    heads, widths = [], []
    for position, name in enumerate(map(one_line, table.columns)):
        width = max(
            [len(one_line(value)) for value in table.iloc[:, position]] + list(map(len, name.split())), default=0
        )
        lines = textwrap.wrap(name, max(width, 1), break_long_words=False, break_on_hyphens=False) or [""]
        escaped = [latex_escape(line) for line in lines]
        heads.append(
            escaped[0] if len(lines) == 1 else rf"\shortstack[{columns[position]}]{{" + r"\\".join(escaped) + "}"
        )
        widths.append(width)
    return heads, widths


def _latex_width(widths: list[int], points: float) -> float:
    """Points that a table of columns so many characters wide takes, with 3 points at either side of each."""
    return sum(width * points + 6 for width in widths)


def _latex_character(character: str) -> str:
    if character == "\u200b":  # where a ligature would be
        return "{}"
    if character in LATEX_SPECIALS:
        return LATEX_SPECIALS[character]
    if " " <= character <= "~" or character in LATEX_LETTERS:
        return character
    return f"{{[}}U+{ord(character):04X}]"
