"""Phase 2: every post-training quantization cell, from the checkpoints."""

from __future__ import annotations

import pandas as pd

from config import Config
from phases import derived
from runner import Report
from store import Store


def run(config: Config, store: Store, report: Report, device: str = "cpu") -> pd.DataFrame:
    return derived.run("quantization", config, store, report, device)
