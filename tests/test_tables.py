import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from fake_report import EVIL, result_rows

from analysis.study_tables import result_table
from analysis.tables import (
    LATEX_NEEDS,
    latex_escape,
    markdown_escape,
    number,
    numeric_columns,
    to_csv,
    to_latex,
    to_markdown,
    with_interval,
    with_margin,
)

# What has broken tables: every special of LaTeX, ligatures, options after \\, characters without a glyph, controls.
HOSTILE = [
    r"\input{/etc/passwd} \undefined \end{tabular}", "a & b % c $ d # e _ f { g } h ~ i ^ j", "[x] starts a row",
    "*[3pt]", "^^M ^^41", "<script>alert(1)</script> a|b", "--phase ``quoted'' ,, !` ?`", "漢字 😀 ẞ Ħ \u00ad ﬁ",
    "çãé ÅØ ßþ ŁŠž “x” ‘y’ – — … €", "a\u2028b\x00c\x1b[0m\u200b\u202ed", "± − × ≤ ≥ ≈ ≠ ∞ µ ·",
    "", " ", "}", "{", "\\",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- escaping


def test_latex_escapes_every_special_character():
    assert latex_escape("a_b%&#$") == r"a\_b\%\&\#\$"
    assert latex_escape("{x}^2~\\y<>|") == (
        r"\{x\}\textasciicircum{}2\textasciitilde{}\textbackslash{}y\textless{}\textgreater{}\textbar{}"
    )


def test_latex_keeps_two_hyphens_two_and_a_bracket_no_option_and_names_what_it_has_no_glyph_for():
    assert latex_escape("--phase") == "-{}-phase"
    assert latex_escape("[1]") == "{[}1]"
    assert latex_escape("é漢\x00") == "é{[}U+6F22]{[}U+0000]"


def test_markdown_keeps_a_table_cell_one_cell_and_starts_no_html_or_link():
    assert markdown_escape("a|b\nc") == r"a\|b c"
    assert markdown_escape(EVIL) == r"\<script>alert('x')\</script>"
    assert markdown_escape("[a](javascript:b)") == r"[a\](javascript:b)"
    assert markdown_escape("bias_aware *x* _y_") == r"bias_aware \*x\* \_y\_"


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "digits", "options", "text"),
    [
        (np.nan, 1, {}, "–"),
        (None, 1, {}, "–"),
        (-0.04, 1, {"sign": True}, "0.0"),
        (1.25, 2, {"sign": True}, "+1.25"),
        (94.04, 3, {"significant": True}, "94.0"),
        (0.18774, 3, {"significant": True}, "0.188"),
        (1234.5, 3, {"significant": True}, "1234"),
    ],
)
def test_numbers_for_print(value, digits, options, text):
    assert number(value, digits, **options) == text


def test_margins_and_intervals_for_print():
    assert with_margin(91.23, 90.0, 92.5, 1) == "91.2 ± 1.2"
    assert with_interval(-1.234, -2.0, 0.04, 1) == "-1.2 [-2.0, 0.0]"
    nan = float("nan")
    assert with_margin(91.23, nan, 92.5, 1) == "91.2" and with_margin(nan, 90.0, 92.5, 1) == "–"
    assert with_interval(-1.234, nan, nan, 1) == "-1.2" and with_interval(nan, -2.0, 0.0, 1) == "–"


def test_columns_of_numbers_are_told_from_text():
    table = pd.DataFrame(
        {
            "plain": ["1", "–"], "margin": ["91.2 ± 1.3", ""], "interval": ["-1.2 [-2.0, 0.4]", "–"],
            "range": ["-1.2 to +3.0", "–"], "setting": ["8 bits", "4"], "nothing": ["–", ""],
        }
    )  # fmt: skip
    assert numeric_columns(table) == [True, True, True, True, False, False]


# --------------------------------------------------------------------------------------------------------------- tables


def test_the_same_numbers_are_in_every_format():
    table = result_table(result_rows())
    for text in (to_csv(table), to_markdown(table), to_latex(table)):
        for value in ("91.2", "-1.2", "23.6", "W8A8 static (mse)"):
            assert value in text


def test_bold_is_markup_in_markdown_and_latex_and_nothing_in_csv():
    table = pd.DataFrame({"a_b": ["1 ± 2", "3"], "c": ["1 ± 2", "*"]})
    bold = {(0, "a_b"), (1, "c")}
    assert to_markdown(table, bold).splitlines()[2:] == ["| **1 ± 2** | 1 ± 2 |", r"| 3 | **\*** |"]
    assert r"\textbf{1 $\pm$ 2} & 1 $\pm$ 2 \\" in to_latex(table, bold=bold)
    assert to_csv(table) == "a_b,c\n1 ± 2,1 ± 2\n3,*\n"


def test_latex_is_booktabs_with_one_row_a_line():
    table = pd.DataFrame({"model_name": ["a_b%&", "c"], "accuracy %": ["91.2", "–"]})
    assert to_latex(table, "50 % of_it", "tab:x_y") == "\n".join(
        [
            LATEX_NEEDS,
            r"\begin{table}",
            r"\centering",
            r"\caption{50 \% of\_it}",
            r"\label{tab:x-y}",
            r"\small\setlength{\tabcolsep}{3pt}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            r"\begin{tabular}{lr}",
            r"\toprule",
            r"model\_name & \shortstack[r]{accuracy\\\%} \\",
            r"\midrule",
            r"a\_b\%\& & 91.2 \\",
            r"c & -- \\",
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )


def test_long_latex_tables_may_break_over_pages():
    text = to_latex(pd.DataFrame({"n": [str(i) for i in range(40)]}), "Long")
    assert r"\begin{longtable}{r}" in text and r"\endhead" in text and text.count(r"\\") == 43
    assert text.index(r"\caption") < text.index(r"\endfirsthead") < text.index(r"\endhead")  # once, not on each page


def test_a_wide_latex_table_is_turned_and_its_names_are_broken():
    wide = pd.DataFrame({f"quantized accuracy {i}": ["91.2 ± 1.3"] for i in range(12)})
    text = to_latex(wide)
    assert text.splitlines()[1] == r"\begin{landscape}" and text.splitlines()[-1] == r"\end{landscape}"
    assert r"\shortstack[r]{quantized\\accuracy 0}" in text
    assert "landscape" not in to_latex(wide.iloc[:, :3]).replace(LATEX_NEEDS, "")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles_whatever_the_strings(tmp_path):
    """A short and a long table of hostile strings, as names of columns, values, captions and labels, bold and not."""
    rows = [dict.fromkeys(("first", *HOSTILE[:3]), text) for text in HOSTILE]
    short = pd.DataFrame(rows)
    bold = {(row, HOSTILE[0]) for row in range(len(rows))}
    long = pd.concat([short] * 4, ignore_index=True)
    preamble = LATEX_NEEDS.partition(": ")[2]  # what a user is told to write
    texts = [to_latex(table, " ".join(HOSTILE), HOSTILE[0], bold) for table in (short, long, short.iloc[:, :0])]
    document = "\n".join([r"\documentclass{article}", preamble, r"\begin{document}", *texts, r"\end{document}"])
    (tmp_path / "t.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=120)
    log = (tmp_path / "t.log").read_text(encoding="utf-8", errors="replace")
    assert result.returncode == 0, log[-2000:]
    assert "Missing character" not in log and "Output written on t.pdf" in log
