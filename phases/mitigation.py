"""Phase 3: every fairness-aware cell, from the checkpoints; analysis sets it beside plain quantization."""

from __future__ import annotations

import pandas as pd

from config import Config
from phases import derived
from runner import Report
from store import Store


def run(config: Config, store: Store, report: Report, device: str = "cpu") -> pd.DataFrame:
    return derived.run("mitigation", config, store, report, device)
