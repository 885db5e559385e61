"""Cartoon faces drawn by formula: a data set whose truth is known, for runs without a download.

A face has four labels (smile, gender, age, skin), each with a continuous cause behind it, and nuisances that carry no
label (pose, light, colours, glasses, sensor noise). Any label can be the target; the knobs below speak of the default
one, smile.

What makes the data useful is what is known about them:

* With the knobs neutral no group differs in what carries the smile. The mouth is *added* to the skin, as one offset in
  colour whatever the skin, and so is the shading: turning a neutral mouth into a smiling one changes the same pixels by
  the same amount for every gender, age and skin. Labels, causes and nuisances are independent, the noise is one. What
  lies around the mouth (hair, jaw, skin) does differ, as it must; a linear classifier of pixels feels it by about a
  point, a small convolutional network by less than 4000 test images can show.
* With a knob turned, the minority intersection (female faces with dark skin) is harder, by a known cause.
* No classifier can be perfect: `overlap` is the share of faces whose mouth lies on the other class's side.

Face i of a seed is always the same, whatever n, the chunk or the faces drawn before it: what is random comes from
generators keyed by (seed, index), and a knob never changes a draw that it does not name.

    python synthetic_faces.py --contact-sheet docs/images/synthetic_faces.png
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import NormalDist

import numpy as np
from PIL import Image, ImageDraw, ImageFont

VALUE_NAMES = {
    "smile": ("neutral", "smiling"),
    "gender": ("female", "male"),
    "age": ("young", "old"),
    "skin": ("light", "dark"),
}
MINORITY = {"gender": "female", "skin": "dark"}  # the intersection that group_noise and group_contrast act on

SENSOR_NOISE = 0.035  # standard deviation at difficulty 1; intensities run from 0 to 1
BLOCK = 1024  # parameters are drawn for this many consecutive indices at once
TILE_PIXELS = 1 << 15  # faces are rendered this many pixels at a time, so that the planes stay in the cache

SKIN = np.array([[0.82, 0.65, 0.54], [0.54, 0.38, 0.30]], np.float32)  # the mean light and dark skin
HAIR = np.array([[0.13, 0.11, 0.12], [0.30, 0.19, 0.13], [0.50, 0.27, 0.15], [0.80, 0.64, 0.38]], np.float32)
GREY_HAIR = np.array([0.78, 0.78, 0.80], np.float32)
IRIS = np.array([[0.25, 0.16, 0.10], [0.24, 0.40, 0.58], [0.28, 0.44, 0.30], [0.38, 0.40, 0.44]], np.float32)
LIPS = (-0.02, -0.11, -0.09)  # offsets from the skin, the same for every skin
MOUTH_LINE = (-0.15, -0.10, -0.07)
WRINKLE = (-0.12, -0.12, -0.11)
BLUSH = (0.035, -0.035, -0.02)


@dataclass(frozen=True)
class Knobs:
    """What can be turned. The defaults are neutral: no group is rarer, confounded, noisier or fainter than another."""

    minority_share: float = 0.5
    """Share of the faces with dark skin, in [0, 1]; 0.5 is balanced. Genders and ages are always half and half."""
    label_correlation: float = 0.0
    """Correlation (phi) of smiling with being male, in [-1, 1]. Half of all faces smile whatever it is."""
    group_noise: float = 0.0
    """Standard deviation, in [0, 1], of extra sensor noise on the minority intersection (full intensity is 1)."""
    group_contrast: float = 0.0
    """Share of the image contrast, in [0, 1), that the minority intersection loses."""
    label_noise: float = 0.0
    """Share of smile labels, in [0, 0.5], flipped at random in every group (it shrinks the correlation by 1 - 2x)."""
    overlap: float = 0.03
    """Share of faces, in [0, 0.5), whose cause (mouth curve, and likewise for gender, age and skin) lies on the other
    class's side: for the smile, with the other knobs neutral, the error of the best possible classifier."""
    difficulty: float = 1.0
    """Size, in [0, 2], of pose, light and sensor noise; at 0 every face looks straight into a perfect camera."""

    def __post_init__(self):
        for name, low, high, open_end in (
            ("minority_share", 0, 1, False),
            ("label_correlation", -1, 1, False),
            ("group_noise", 0, 1, False),
            ("group_contrast", 0, 1, True),
            ("label_noise", 0, 0.5, False),
            ("overlap", 0, 0.5, True),
            ("difficulty", 0, 2, False),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if not low <= value <= high or (open_end and value == high):
                raise ValueError(f"{name} must lie in [{low}, {high}{')' if open_end else ']'}, got {value!r}")


@dataclass(frozen=True)
class FaceSample:
    """n faces: images, labels (positions in VALUE_NAMES) and the continuous causes and nuisances behind them."""

    image: np.ndarray  # (N, H, W, 3) uint8
    smile: np.ndarray  # (N,) int64, as all labels
    gender: np.ndarray
    age: np.ndarray
    skin: np.ndarray
    index: np.ndarray  # (N,) int64: which faces of the seed these are
    parameters: dict[str, np.ndarray]  # name -> (N,) float32; causes: curvature, masculinity, ageing, tone

    def __len__(self) -> int:
        return len(self.index)


def draw_faces(
    n: int, image_size: int = 32, seed: int = 0, *, start: int = 0, chunk: int = BLOCK, **knobs
) -> FaceSample:
    """Draw faces start .. start + n - 1 of a seed, all in memory; `knobs` are the fields of Knobs.

    Raises ValueError, naming the argument, for anything out of range.
    """
    parts = list(iterate_faces(n, image_size, seed, start=start, chunk=chunk, **knobs))
    if len(parts) == 1:
        return parts[0]
    arrays = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(FaceSample)
        if field.name != "parameters"
    }
    names = parts[0].parameters
    return FaceSample(
        **arrays, parameters={name: np.concatenate([p.parameters[name] for p in parts]) for name in names}
    )


def iterate_faces(
    n: int, image_size: int = 32, seed: int = 0, *, start: int = 0, chunk: int = BLOCK, **knobs
) -> Iterator[FaceSample]:
    """The faces of draw_faces, `chunk` at a time, in flat memory. Arguments are checked when it is called."""
    for name, value, low, high in (
        ("n", n, 1, None),
        ("image_size", image_size, 16, 1024),
        ("seed", seed, 0, None),
        ("start", start, 0, None),
        ("chunk", chunk, 1, None),
    ):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        if value < low or (high is not None and value > high):
            raise ValueError(f"{name} must be at least {low}{f' and at most {high}' if high else ''}, got {value}")
    known = [field.name for field in fields(Knobs)]
    for name in knobs:
        if name not in known:
            raise ValueError(f"unknown knob {name!r}; choose from {', '.join(known)}")
    checked = Knobs(**knobs)
    return (
        _sample(first, min(first + chunk, start + n), image_size, seed, checked)
        for first in range(start, start + n, chunk)
    )


def in_minority(sample: FaceSample) -> np.ndarray:
    """(N,) bool: which faces belong to the minority intersection, MINORITY."""
    return _in_minority({name: getattr(sample, name) for name in MINORITY})


# --- what a face is: labels, causes and nuisances -------------------------------------------------------------------

LABELS = ("smile", "gender", "age", "skin", "flip")
CAUSES = ("curvature", "masculinity", "ageing", "tone")
CAUSE_REACH = 1.3
GAUSSIAN = (
    *CAUSES,
    "shift_x",
    "shift_y",
    "tilt",
    "scale",
    "turn",
    "nod",
    "light_x",
    "light_y",
    "hair_length",
    "jaw",
    "brow",
)
UNIFORM = (
    *("hair_hue", "hair_shade", "iris", "eye_spacing", "eye_open", "mouth_width", "parting", "glasses"),
    *(
        "background_r",
        "background_g",
        "background_b",
        "gradient",
        "gradient_angle",
        "clothes_r",
        "clothes_g",
        "clothes_b",
    ),
)
SPREAD = {"shift_x": 0.04, "shift_y": 0.035, "tilt": 0.09, "scale": 0.04, "turn": 0.03, "nod": 0.015}  # at difficulty 1


def _sample(first: int, last: int, image_size: int, seed: int, knobs: Knobs) -> FaceSample:
    labels, parameters = _describe(first, last, seed, knobs)
    image = np.empty((last - first, image_size, image_size, 3), np.uint8)
    minority = _in_minority(labels)
    noise = np.hypot(SENSOR_NOISE * knobs.difficulty, np.where(minority, knobs.group_noise, 0)).astype(np.float32)
    contrast = np.where(minority, 1 - knobs.group_contrast, 1).astype(np.float32)
    tile = max(1, TILE_PIXELS // image_size**2)
    for begin in range(0, last - first, tile):
        part = slice(begin, min(begin + tile, last - first))
        planes_CNP = _render({name: value[part] for name, value in parameters.items()}, image_size)
        _photograph(planes_CNP, contrast[part], noise[part], seed, first + begin, image[part])
    return FaceSample(image=image, index=np.arange(first, last), parameters=parameters, **labels)


def _describe(first: int, last: int, seed: int, knobs: Knobs) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Labels and parameters of faces first .. last - 1."""
    blocks = [_draw_block(seed, block) for block in range(first // BLOCK, (last - 1) // BLOCK + 1)]
    offset = first - first // BLOCK * BLOCK
    draws = {name: np.concatenate([b[name] for b in blocks])[offset : offset + last - first] for name in blocks[0]}

    gender = (draws["label_gender"] < 0.5).astype(np.int64)
    age = (draws["label_age"] < 0.5).astype(np.int64)
    skin = (draws["label_skin"] < knobs.minority_share).astype(np.int64)
    is_smiling = draws["label_smile"] < 0.5 + 0.5 * knobs.label_correlation * (2 * gender - 1)
    smile = (is_smiling ^ (draws["label_flip"] < knobs.label_noise)).astype(np.int64)

    # A cause is Gaussian about 0.5 -+ half (0 and 1 at the default), and `overlap` of each class lies beyond 0.5. It is
    # cut at three standard deviations, always 0.5 -+ CAUSE_REACH, so that no mouth leaves its face and an overlap of 0
    # is none at all.
    separation = min(NormalDist().inv_cdf(1 - knobs.overlap), 3.3) if knobs.overlap > 0 else 3.3  # half / spread
    spread = CAUSE_REACH / (3 + separation)
    half = separation * spread
    parameters = {}
    for name, mean in zip(CAUSES, (is_smiling.astype(int), gender, age, skin), strict=True):
        parameters[name] = (0.5 + half * (2 * mean - 1) + spread * np.clip(draws[name], -3, 3)).astype(np.float32)
    for name in GAUSSIAN[len(CAUSES) :]:
        scale = SPREAD.get(name, 1.0) * (knobs.difficulty if name in (*SPREAD, "light_x", "light_y") else 1.0)
        parameters[name] = (scale * np.clip(draws[name], -2, 2)).astype(np.float32)
    for name in UNIFORM:
        parameters[name] = draws[name].astype(np.float32)
    return {"smile": smile, "gender": gender, "age": age, "skin": skin}, parameters


def _draw_block(seed: int, block: int) -> dict[str, np.ndarray]:
    """Every random number of BLOCK faces but the sensor noise; no knob reaches in here."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 0, block))))
    uniform = generator.random((len(LABELS) + len(UNIFORM), BLOCK))
    gaussian = generator.standard_normal((len(GAUSSIAN), BLOCK))
    return dict(zip([*(f"label_{name}" for name in LABELS), *UNIFORM, *GAUSSIAN], [*uniform, *gaussian], strict=True))


def _in_minority(labels: dict[str, np.ndarray]) -> np.ndarray:
    return np.logical_and.reduce([labels[name] == VALUE_NAMES[name].index(value) for name, value in MINORITY.items()])


# --- how a face is drawn --------------------------------------------------------------------------------------------
# A plane is (N, P) float32: N faces, P = H * W pixels; a parameter is (N, 1). Face coordinates: u to the right and v
# down from the middle of the head. A shape is a distance, negative inside; `cover` turns it into an anti-aliased mask,
# one pixel wide at the edge. `rows` picks the rows of pixels that a feature can reach, which saves half of the time.


def _render(parameters: dict[str, np.ndarray], size: int) -> np.ndarray:
    """(3, N, P) float32 intensities of the scene, before the camera; nothing random."""
    p = {name: value[:, None] for name, value in parameters.items()}
    masculine = np.clip(p["masculinity"], -0.6, 1.6)
    old = np.clip(p["ageing"], 0, 1.3)
    has_glasses = p["glasses"] < 0.18

    axis = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
    x_P, y_P = np.tile(axis, size), np.repeat(axis, size)
    zoom = 0.78 / (1 + p["scale"])
    cos, sin = np.cos(p["tilt"]) * zoom, np.sin(p["tilt"]) * zoom
    centre_x, centre_y = p["shift_x"], p["shift_y"] + 0.08
    u = x_P * cos + y_P * sin - (centre_x * cos + centre_y * sin)
    v = y_P * cos - x_P * sin - (centre_y * cos - centre_x * sin)
    sharpness = (size / 2) / zoom  # pixels to a unit of face coordinates

    def cover(distance, softness=1.0):
        """Consumes `distance`; softness is the width of the edge in pixels."""
        distance *= sharpness * (-1 / softness)
        distance += 0.5
        return np.clip(distance, 0, 1, out=distance)

    def rows(low, high):
        """The rows of pixels between v = low and v = high, and a soft edge more, in any of these faces."""
        edge = 2 / sharpness
        inside = np.flatnonzero(((v > low - edge) & (v < high + edge)).any(axis=0))
        return slice(inside[0] // size * size, (inside[-1] // size + 1) * size) if len(inside) else slice(0, 0)

    # Behind the head: background, back hair, neck, clothes.
    angle = 2 * np.pi * p["gradient_angle"]
    ramp = (x_P * np.cos(angle) + y_P * np.sin(angle)) * (0.16 * p["gradient"])
    image = np.empty((3, *u.shape), np.float32)
    for plane, channel in zip(image, "rgb", strict=True):
        np.add(ramp, 0.42 + 0.28 * p[f"background_{channel}"], out=plane)

    hair = _hair_colour(p, old)
    length = np.clip(0.9 - 1.05 * masculine + 0.10 * p["hair_length"], 0, 1.15)  # 0 is cropped, 1 reaches the shoulders
    hair_width = 0.475 + 0.085 * np.minimum(length, 1)
    drop = v + 0.155
    drop -= np.clip(drop, 0, 0.05 + 0.50 * length)
    back_hair = cover(_length(u, drop) - hair_width)
    _paint(image, back_hair, [0.82 * c for c in hair])

    tone = np.clip(p["tone"], -0.2, 1.2)
    skin = [SKIN[0, c] + (SKIN[1, c] - SKIN[0, c]) * tone for c in range(3)]
    below = rows(0.3, 9)
    width = np.abs(u[:, below])
    neck = np.maximum(width - (0.17 + 0.04 * masculine), 0.3 - v[:, below])
    _paint(image[:, :, below], cover(neck), [c - 0.10 for c in skin])
    shoulders = _ellipse(width, v[:, below] - 1.22, 0.74 + 0.10 * masculine, 0.44)
    collar = _ellipse(width, v[:, below] - 0.72, 0.24, 0.20)
    _paint(image[:, :, below], cover(np.maximum(shoulders, -collar)), [0.22 + 0.5 * p[f"clothes_{c}"] for c in "rgb"])

    # The head: ears, skin, shading (added, so that it is as strong on any skin), blush.
    a, b = 0.425 + 0.015 * masculine, 0.575 + 0.015 * old
    ear_rows = rows(-0.15, 0.25)
    side = np.abs(u[:, ear_rows])
    ears = _ellipse(side - (a + 0.005), v[:, ear_rows] - 0.04, 0.065, 0.115)
    _paint(image[:, :, ear_rows], cover(ears) * (length < 0.45), [c - 0.05 for c in skin])  # long hair hides them

    jaw = np.clip(0.45 - 0.26 * masculine + 0.05 * p["jaw"], 0.02, 0.65)
    chin = np.maximum(v, 0)
    chin *= chin
    radius_u = u / (a * (1 - jaw * chin))
    radius = _length(radius_u, v * (1 / b))
    head = cover((radius - 1) * 0.48)
    _paint(image, head, skin)
    shade = radius * radius
    shade *= shade
    shade *= -0.055
    shade += u * (0.07 * p["light_x"]) + v * (0.04 * p["light_y"] - 0.05)
    shade *= head
    image += np.clip(shade, -0.13, 0.10, out=shade)

    # From here on the features, which turn and nod with the head.
    u -= p["turn"]
    v -= p["nod"]
    width = np.abs(u)
    middle = rows(-0.28, 0.46)
    cheeks = _ellipse(width[:, middle] - 0.25, v[:, middle] - 0.19, 0.13, 0.10)
    _add(image[:, :, middle], np.clip(cheeks * -9, 0, 1), BLUSH)

    _draw_wrinkles(image, u, v, width, old, cover, rows)
    _draw_nose(image, u, v, p, cover, rows)
    _draw_mouth(image, u, v, p, cover, rows)
    _draw_eyes(image, u, v, width, p, masculine, old, hair, cover, rows)

    # Front hair, on the head again.
    u += p["turn"]
    v += p["nod"]
    top = rows(-1.5, 0.55)
    u_top, v_top = u[:, top], v[:, top]
    recede = 0.10 * np.clip(masculine, 0, 1) * np.clip(old, 0, 1)
    hairline = u_top + 0.15 * (p["parting"] - 0.5)
    hairline *= hairline
    hairline *= 1.35 + 1.5 * np.minimum(length, 1)
    hairline += -0.39 - recede
    outline = _length(u_top, (v_top + 0.155) * 0.97)
    gloss = np.abs(outline - 0.37)
    outline -= hair_width
    fringe = cover(np.maximum(outline, (v_top - hairline) * 0.8))
    _paint(image[:, :, top], fringe, hair)
    _add(image[:, :, top], np.clip(1 - gloss * 14, 0, 1) * fringe, (0.07, 0.06, 0.05))

    wearing = np.flatnonzero(has_glasses[:, 0])
    if len(wearing):
        eye_rows = rows(-0.35, 0.25)
        spectacles = image[:, wearing, eye_rows]
        side = np.abs(u[wearing, eye_rows] - p["turn"][wearing])
        level = v[wearing, eye_rows] - p["nod"][wearing] + 0.045
        rim = np.abs(_length(side - _eye_distance(p)[wearing], level * 1.1) - 0.128)
        bridge = np.maximum(np.abs(level + 0.02), side - 0.08)
        frame = np.minimum(rim, bridge) - 0.013
        frame *= -sharpness[wearing]
        _paint(spectacles, np.clip(frame + 0.5, 0, 1), (0.16, 0.15, 0.17))
        image[:, wearing, eye_rows] = spectacles
    return image


def _draw_wrinkles(image, u, v, width, old, cover, rows):
    """On the forehead, under and beside the eyes; none near the mouth, which must be as plain at any age."""
    strength = np.clip(1.6 * old - 0.45, 0, 1)
    forehead = rows(-0.40, -0.22)
    bend = width[:, forehead] * width[:, forehead]
    level = v[:, forehead] + 0.9 * bend
    lines = np.minimum(np.abs(level + 0.325), np.abs(level + 0.265))
    mask = cover(np.maximum(lines - 0.008, (width[:, forehead] - 0.20) * 0.4), 1.3)
    _add(image[:, :, forehead], mask * strength, WRINKLE)

    eyes = rows(-0.12, 0.16)
    side = width[:, eyes] - 0.185
    bags = np.abs(v[:, eyes] - 0.075 + 2.5 * side * side) - 0.008
    mask = cover(np.maximum(bags, np.abs(side) - 0.10), 1.3)
    _add(image[:, :, eyes], mask * strength, WRINKLE)
    feet = np.minimum(
        np.abs(v[:, eyes] + 0.045 + 0.5 * (side - 0.13)), np.abs(v[:, eyes] + 0.035 - 0.5 * (side - 0.13))
    )
    mask = cover(np.maximum(feet - 0.007, np.abs(side - 0.155) - 0.035), 1.3)
    _add(image[:, :, eyes], mask * strength, WRINKLE)


def _draw_nose(image, u, v, p, cover, rows):
    nose = rows(-0.1, 0.22)
    across, level = u[:, nose], v[:, nose]
    bridge = np.abs(across + np.where(p["light_x"] > 0, 0.045, -0.045)) - 0.012 - 0.08 * (level - 0.02)
    mask = cover(np.maximum(bridge, np.abs(level - 0.02) - 0.10), 2.0)
    _add(image[:, :, nose], mask, (-0.05, -0.05, -0.05))
    under = np.abs(level - 0.135 + 3.0 * across * across) - 0.016
    mask = cover(np.maximum(under, np.abs(across) - 0.07), 1.5)
    _add(image[:, :, nose], mask, (-0.11, -0.12, -0.11))


def _draw_mouth(image, u, v, p, cover, rows):
    """The smile signal. It depends on curvature, mouth_width and the pose, and on no other parameter of the face."""
    mouth = rows(0.10, 0.50)
    curve = 0.1 + p["curvature"]
    width = 0.145 + 0.025 * p["mouth_width"] + 0.035 * curve
    across = u[:, mouth] / width
    across *= across
    taper = 1 - across
    level = across * (0.105 * curve)
    level += v[:, mouth] - 0.275 - 0.045 * curve
    beyond = taper * -0.08  # positive past the corners
    parted = 0.026 * np.clip(curve, 0, 1.5) * taper
    level += parted  # a smile opens the mouth upwards
    lips = np.abs(level) - 0.048 * taper - 0.8 * parted
    _add(image[:, :, mouth], cover(np.maximum(lips, beyond)), LIPS)
    line = np.abs(level) - np.maximum(parted, 0) - 0.016 * np.maximum(taper, 0.35)
    _add(image[:, :, mouth], cover(np.maximum(line, beyond)), MOUTH_LINE)


def _draw_eyes(image, u, v, width, p, masculine, old, hair, cover, rows):
    eyes = rows(-0.32, 0.10)
    planes = image[:, :, eyes]
    distance = _eye_distance(p)
    side, level = width[:, eyes] - distance, v[:, eyes] + 0.055
    eye_a = 0.098 - 0.010 * old
    eye_b = (0.046 + 0.024 * p["eye_open"]) - 0.008 * old
    ball = _ellipse(side, level, eye_a, eye_b)
    white = cover(ball.copy())
    _paint(planes, white, (0.95, 0.95, 0.94))
    gaze = _length(u[:, eyes] - np.copysign(distance, u[:, eyes]) - 0.35 * p["turn"], level)
    colour = IRIS[np.minimum((p["iris"] * 4).astype(int), 3)[:, 0]].T[:, :, None]
    _paint(planes, cover(gaze - 0.047) * white, colour)
    _paint(planes, cover(gaze - 0.023) * white, (0.05, 0.04, 0.05))
    lashes = np.abs(ball) - (0.017 - 0.007 * np.clip(masculine, 0, 1))
    _paint(planes, cover(np.maximum(lashes, level + 0.012)), (0.12, 0.09, 0.09))

    thickness = np.clip(0.017 + 0.017 * masculine + 0.003 * p["brow"], 0.008, 0.05)
    arch = side + 0.01
    arch *= arch
    taper = 1 - arch * (1 / 0.125**2)
    brow = np.abs(level + 0.135 + 0.012 * p["eye_open"] - (3.4 - 2.2 * np.clip(masculine, 0, 1)) * arch)
    brow -= thickness * np.maximum(taper, 0)
    _paint(planes, cover(np.maximum(brow, -0.06 * taper)), [0.75 * c for c in hair])


def _eye_distance(p):
    return 0.165 + 0.03 * p["eye_spacing"]


def _hair_colour(p, old) -> list[np.ndarray]:
    """Three (N, 1) channels; darkness and hue are independent of the skin, age turns them grey."""
    position = 3 * p["hair_hue"] ** 1.7  # dark hair is the commoner
    low = np.minimum(position.astype(int), 2)[:, 0]
    colour = HAIR[low] + (HAIR[low + 1] - HAIR[low]) * (position - low[:, None])
    colour *= 0.85 + 0.3 * p["hair_shade"]
    grey = np.clip(1.15 * old - 0.25, 0, 0.9)
    colour += (GREY_HAIR * (0.8 + 0.25 * p["hair_shade"]) - colour) * grey
    return [colour[:, c, None] for c in range(3)]


def _length(x, y):
    squared = x * x
    squared += y * y
    return np.sqrt(squared, out=squared)


def _ellipse(x, y, a, b):
    """Signed distance to an ellipse, to first order at its edge: (|z| - 1) / |grad |z||, z = (x / a, y / b)."""
    zx, zy = x * (1 / a), y * (1 / b)
    radius = _length(zx, zy)
    zx *= 1 / a
    zy *= 1 / b
    slope = _length(zx, zy)
    slope += 1e-6
    distance = radius - 1
    distance *= radius
    distance /= slope
    return distance


def _paint(image, mask, colour):
    """Cover with a colour: three scalars, or three (N, 1)."""
    for plane, value in zip(image, colour, strict=True):
        change = value - plane
        change *= mask
        plane += change


def _add(image, mask, offset):
    for plane, value in zip(image, offset, strict=True):
        plane += mask * np.float32(value)


def _photograph(planes_CNP, contrast, noise, seed: int, first: int, out_NHWC) -> None:
    """The camera: contrast about the image's mean, sensor noise, 8 bits. Consumes the planes."""
    fainter = np.flatnonzero(contrast != 1)
    if len(fainter):
        faint = planes_CNP[:, fainter]
        mean = faint.mean(axis=2, keepdims=True)
        planes_CNP[:, fainter] = mean + (faint - mean) * contrast[fainter, None]
    shape = out_NHWC.shape[1:]
    for i, out in enumerate(out_NHWC):
        pixels = planes_CNP[:, i].T.reshape(shape)
        if noise[i] > 0:
            generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, 1, first + i))))
            grain = generator.standard_normal(shape, np.float32)
            grain *= noise[i]
            pixels = grain.__iadd__(pixels)
        pixels = pixels * np.float32(255)
        pixels += np.float32(0.5)
        out[:] = np.clip(pixels, 0, 255, out=pixels)


# --- the contact sheet ----------------------------------------------------------------------------------------------


def contact_sheet(path: str | Path, image_size: int = 64, columns: int = 10, seed: int = 0) -> None:
    """Write a PNG with a row of faces for each gender, skin and age, and two strips with the bias knobs on."""
    turned = {"group_noise": 0.08, "group_contrast": 0.4}
    neutral = draw_faces(40 * columns, image_size, seed)
    biased = draw_faces(40 * columns, image_size, seed, **turned)
    rows = []
    for skin, skin_name in enumerate(VALUE_NAMES["skin"]):
        for gender, gender_name in enumerate(VALUE_NAMES["gender"]):
            for age, age_name in enumerate(VALUE_NAMES["age"]):
                wanted = (neutral.skin == skin) & (neutral.gender == gender) & (neutral.age == age)
                rows.append((f"{age_name}, {gender_name}, {skin_name}", neutral, wanted))
    minority = in_minority(neutral)
    rows.append(("knobs on: other groups", biased, ~minority))
    rows.append(("knobs on: female and dark", biased, minority))

    gap, margin, header = 3, 196, 30
    step = image_size + gap
    middle = 12  # between the neutral and the smiling faces
    sheet = Image.new("RGB", (margin + columns * step + middle, header + len(rows) * step + 14), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    half = columns // 2
    for smile, name in enumerate(VALUE_NAMES["smile"]):
        pen.text((margin + smile * (half * step + middle), 7), name, "black", font)
    for row, (title, sample, wanted) in enumerate(rows):
        top = header + row * step + (10 if row >= 8 else 0)
        pen.text((8, top + image_size // 2 - 8), title, "black", font)
        for smile in (0, 1):
            for column, i in enumerate(np.flatnonzero(wanted & (sample.smile == smile))[:half]):
                left = margin + (smile * half + column) * step + smile * middle
                sheet.paste(Image.fromarray(sample.image[i]), (left, top))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # 256 colours: sensor noise does not compress, and the sheet is there to be looked at.
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a contact sheet of the synthetic faces.")
    parser.add_argument("--contact-sheet", type=Path, required=True, metavar="PNG")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    contact_sheet(arguments.contact_sheet, seed=arguments.seed)


if __name__ == "__main__":
    main()
