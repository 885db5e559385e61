"""What others found about compression and fairness, beside what this study finds by the same question.

The literature contradicts itself: compression amplifies bias, or leaves it alone, or lessens it. Each finding below
names the hypothesis of ours that asks the nearest question and which verdict of it would agree. What ours says is
computed (hypotheses.py); nothing about our results is written here.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from analysis import tables

TITLE = "Beside the literature"
NOTE = (
    "The nearest question of ours to each finding, and what it says. Others studied other models, data, kinds of "
    "compression and measures, so that a disagreement refutes nobody: it says where findings do not carry over."
)


@dataclass(frozen=True)
class Finding:
    """A finding of a paper and the default hypothesis that speaks to it."""

    finding: str
    studied: str
    citation: str
    hypothesis: str  # an id of HYPOTHESES
    agrees_with: str  # the verdict of it that agrees with the finding


HOOKER_2019 = (
    "Hooker, Courville, Clark, Dauphin & Frome: What Do Compressed Deep Neural Networks Forget? arXiv:1911.05248, 2019"
)
HOOKER_2020 = (
    "Hooker, Moorosi, Clark, Bengio & Denton: Characterising Bias in Compressed Models. arXiv:2010.03058, 2020"
)
PAGANINI = "Paganini: Prune Responsibly. arXiv:2009.09936, 2020"
TRAN = "Tran, Fioretto, Kim & Naidu: Pruning Has a Disparate Impact on Model Accuracy. NeurIPS 2022, arXiv:2205.13574"
STOYCHEV = (
    "Stoychev & Gunes: The Effect of Model Compression on Fairness in Facial Expression Recognition. ICPR Workshops "
    "2022, arXiv:2201.01709"
)
XU = "Xu & Hu: Can Model Compression Improve NLP Fairness. arXiv:2201.08542, 2022"
HONG = (
    "Hong et al.: Decoding Compressed Trust: Scrutinizing the Trustworthiness of Efficient LLMs Under Compression. "
    "ICML 2024, arXiv:2403.15447"
)
LIU = (
    "Liu, Miao, Zhang, Zhang, Yuan, Wang, Liu & Deng: Understanding the Unfairness in Network Quantization. ICML 2025, "
    "PMLR 267:39106-39125"
)
FAIRQUANT = (
    "Woergaard & Selvan: FairQuant: Fairness-Aware Mixed-Precision Quantization for Medical Image Classification. "
    "arXiv:2602.23192, 2026"
)
KRISHNAMOORTHI = (
    "Krishnamoorthi: Quantizing Deep Convolutional Networks for Efficient Inference: A Whitepaper. arXiv:1806.08342, "
    "2018"
)
DETTMERS = (
    "Dettmers & Zettlemoyer: The Case for 4-bit Precision: k-bit Inference Scaling Laws. ICML 2023, PMLR 202:7750-7774"
)

FINDINGS = (
    Finding(
        "Compression falls disproportionately on the underrepresented long tail, while overall accuracy hides it",
        "pruning, quantization; images",
        HOOKER_2019,
        "H7-small-groups",
        "supported",
    ),
    Finding(
        "Compression amplifies the bias that a model has",
        "pruning, quantization; CelebA",
        HOOKER_2020,
        "H9-worst-group",
        "supported",
    ),
    Finding(
        "Pruning falls disproportionately on underrepresented or outlier groups",
        "pruning; images",
        PAGANINI,
        "H7-small-groups",
        "supported",
    ),
    Finding(
        "Pruning creates or exacerbates disparate impacts on accuracy",
        "pruning; images",
        TRAN,
        "H9-worst-group",
        "supported",
    ),
    Finding(
        "Compression amplifies the bias for gender on CK+",
        "several kinds, quantization among them; facial expressions",
        STOYCHEV,
        "H9-worst-group",
        "supported",
    ),
    Finding(
        "Compression does not widen the gap for gender, race and age on RAF-DB",
        "several kinds, quantization among them; facial expressions",
        STOYCHEV,
        "H9-worst-group",
        "contradicted",
    ),
    Finding(
        "Distillation lessens toxicity and bias: compression regularizes",
        "distillation, pruning; GPT-2",
        XU,
        "H9-worst-group",
        "contradicted",
    ),
    Finding(
        "4-bit models retain the trustworthiness of the original; moderate quantization can improve fairness",
        "quantization, pruning; LLMs",
        HONG,
        "H9-worst-group",
        "contradicted",
    ),
    Finding(
        "QAT is less fair than PTQ",
        "QAT, PTQ; UTKFace, FER2013, CIFAR-10, MNIST",
        LIU,
        "H8-qat-fairness",
        "supported",
    ),
    Finding(
        "QAT often keeps a higher accuracy than PTQ at lower widths",
        "QAT, PTQ; UTKFace, FER2013, CIFAR-10, MNIST",
        LIU,
        "H2-qat-gain",
        "supported",
    ),
    Finding(
        "Mixed precision chosen for fairness, of 4 to 6 bits on average, improves the worst group",
        "mixed precision; skin lesions",
        FAIRQUANT,
        "H4-mixed-precision",
        "supported",
    ),
    Finding(
        "8-bit PTQ stays within 2 % of floating point",
        "PTQ, QAT; ImageNet CNNs",
        KRISHNAMOORTHI,
        "H5-int8",
        "supported",
    ),
    Finding(
        "At 4 bits smaller networks lose more",
        "QAT; ImageNet CNNs",
        KRISHNAMOORTHI,
        "H1-larger-models",
        "supported",
    ),
    Finding(
        "4 bits, not 8, are almost universally optimal for a given number of bits in all",
        "weight-only PTQ; LLMs",
        DETTMERS,
        "H5-int8",
        "contradicted",
    ),
)


def literature_table(verdicts: pd.DataFrame) -> pd.DataFrame:
    """One line a finding: what others found, what our nearest hypothesis says, and whether they agree."""
    ours = verdicts.set_index("id") if len(verdicts) else verdicts
    lines = []
    for finding in FINDINGS:
        line = {"finding": finding.finding, "studied": finding.studied, "source": finding.citation}
        if finding.hypothesis not in ours.index:
            lines.append({**line, "our question": tables.MISSING, "ours": "not asked", **_blank()})
            continue
        row = ours.loc[finding.hypothesis]
        line |= {"our question": row["statement"], "ours": row["verdict"], **_blank()}
        if row["verdict"] in ("supported", "contradicted"):
            line["beside it"] = "agrees" if row["verdict"] == finding.agrees_with else "disagrees"
        elif row["verdict"] == "inconclusive":
            line["beside it"] = "undecided"
        if pd.notna(row["effect"]):
            low, high = (tables.number(row[name], 2, sign=True) for name in ("ci_low", "ci_high"))
            line["effect [interval]"] = f"{tables.number(row['effect'], 2, sign=True)} [{low}, {high}]"
            line["unit"] = row["unit"]
        lines.append(line)
    return pd.DataFrame(lines)


def _blank() -> dict[str, str]:
    return {"effect [interval]": tables.MISSING, "unit": tables.MISSING, "beside it": tables.MISSING}
