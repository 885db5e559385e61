"""report.html: one page that opens offline from a file, made of page.html.j2, page.css, recommend.js and page.js.

No script runs but those that the page's Content-Security-Policy names by their hash, and it lets the page load nothing
from anywhere. Strings from data reach the page as escaped text, as escaped JSON, or not at all. Without JavaScript
everything but the plot and the reader's own bounds is there.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from analysis.configurations import MEASURES
from analysis.recommendation import BOUND_LABELS, PREFERENCES, Bounds
from analysis.result_rows import model_label
from analysis.tables import Places, number, numeric_columns, with_interval

FOLDER = Path(__file__).parent
ROWS = 50  # of a table at a time; a longer one is paged
WORDY = 40  # letters from which on a text wraps in its cell; a table of several such columns is stacked on a phone
SET_UP = 'document.documentElement.className = "js";'  # before anything is drawn: what needs scripts is shown
# What would end the script element, start a comment in it, or end a line in JavaScript.
JSON_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
FIELDS = {  # bound -> (label, unit)
    "largest_loss": ("Largest loss of accuracy", "points"),
    "largest_worst_group_loss": ("Largest loss, worst group", "points"),
    "smallest_accuracy": ("Smallest accuracy", "%"),
    "largest_gap": ("Largest accuracy gap", "points"),
    "largest_size_mb": ("Largest file", "MB"),
    "largest_latency_ms": ("Largest latency, 1 image", "ms"),
}


def render(parts: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """The page. `parts`: what the template shows; `data`: what its scripts compute with (`page_data`)."""
    style = _read("page.css")
    script = f"{_read('recommend.js')}\n{_read('page.js')}"
    plotly, packed = _plotly() if parts["configurations"] else (None, None)
    runs = [SET_UP, script, *([plotly] if plotly else [])]
    loader = jinja2.FileSystemLoader(FOLDER)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        **parts,
        fields=FIELDS,
        preferences={name: words for name, (_, _, words) in PREFERENCES.items()},
        bounds=data["bounds"],
        page_rows=ROWS,
        policy="; ".join(
            [
                "default-src 'none'",
                "img-src data:",
                f"script-src {' '.join(map(_hash, runs))}",
                "style-src 'unsafe-inline'",  # plotly brings style elements and attributes, other ones in each version
                "base-uri 'none'",
                "form-action 'none'",
            ]
        ),
        set_up=Markup(SET_UP),
        style=Markup(style),
        script=Markup(script),
        data=Markup(to_json(data)),
        plotly=packed,
    )


def page_data(configs: pd.DataFrame, bounds: Bounds) -> dict[str, Any]:
    """What the scripts compute with: the configurations as rows of `columns`, their values for print as rows of
    `shown`, and the bounds to start from."""
    columns = ["dataset", "model", "setting", "width", "is_fp32", "n_seeds", *MEASURES]
    shown = ["accuracy", "worst_group_accuracy", "accuracy_gap", "size_mb", "latency_ms_b1", "change"]
    texts = [
        [
            *(number(row[name], 1) for name in shown[:3]),
            *(number(row[name], 3, significant=True) for name in shown[3:5]),
            with_interval(row["change"], row["ci_low"], row["ci_high"], 1),
        ]
        for row in configs.to_dict("records")
    ]
    return {
        "columns": columns,
        "shown": shown,
        "texts": texts,
        "rows": configs[columns].astype(object).values.tolist(),
        "models": {name: model_label(name) for name in dict.fromkeys(configs["model"])},
        "bounds": asdict(bounds),
        "labels": BOUND_LABELS,
        "page_rows": ROWS,
    }


def table_parts(table: pd.DataFrame, bold: Places, label: str, values: Mapping[str, list[float]]) -> dict[str, Any]:
    """A table for the template: `values` are the numbers behind a column's text, to sort by."""
    names = [str(name) for name in table.columns]
    columns = []
    for position, name in enumerate(names):
        texts = table.iloc[:, position].tolist()
        numbers = [f"{value:.6g}" if math.isfinite(value) else None for value in values.get(name, ())]
        numbers = numbers or [None] * len(texts)
        columns.append([(text, (row, name) in bold, numbers[row]) for row, text in enumerate(texts)])
    wordy = [any(len(str(text)) > WORDY for text, _, _ in cells) for cells in columns]
    heads = list(zip(names, numeric_columns(table), wordy, strict=True))
    return {"label": label, "columns": heads, "rows": list(zip(*columns, strict=True)), "is_stacked": sum(wordy) > 1}


def to_json(value: Any) -> str:
    """JSON that may stand in a script element of a page, whatever strings it holds; NaN and infinities are null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(
        JSON_ESCAPES
    )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if hasattr(value, "item"):  # numpy's scalars
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


@functools.cache
def _plotly() -> tuple[str, str]:
    """plotly.js of the installed package plotly, and packed for the page. The package ships one bundle, of everything:
    5 MB, packed 2 MB."""
    from plotly.offline import get_plotlyjs

    text = get_plotlyjs()
    return text, base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode("ascii")


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
