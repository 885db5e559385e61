"""The synthetic faces: reproducible by index, neutral when the knobs are, harder where and how a knob says."""

import numpy as np
import pytest

import synthetic_faces
from synthetic_faces import MINORITY, VALUE_NAMES, contact_sheet, draw_faces, in_minority, iterate_faces

LABELS = tuple(VALUE_NAMES)


def assert_same(a, b):
    assert np.array_equal(a.image, b.image)
    assert np.array_equal(a.index, b.index)
    for name in LABELS:
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    for name in a.parameters:
        assert np.array_equal(a.parameters[name], b.parameters[name]), name


def take(sample, part):
    fields = {name: getattr(sample, name)[part] for name in ("image", "index", *LABELS)}
    return synthetic_faces.FaceSample(**fields, parameters={k: v[part] for k, v in sample.parameters.items()})


def describe(n, **knobs):
    """Labels and parameters alone, as large samples need no pixels."""
    return synthetic_faces._describe(0, n, 3, synthetic_faces.Knobs(**knobs))


def standard_error(p, n):
    return (p * (1 - p) / n) ** 0.5


# --- form and reproducibility ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 32, 45, 64, 128, 224])
def test_images_and_labels_have_the_promised_form(size):
    sample = draw_faces(5, size, 0)
    assert sample.image.shape == (5, size, size, 3)
    assert sample.image.dtype == np.uint8
    assert sample.image.std(axis=(1, 2, 3)).min() > 15  # not blank
    assert len(sample) == 5
    for name in LABELS:
        label = getattr(sample, name)
        assert label.shape == (5,)
        assert label.dtype == np.int64
        assert set(label) <= {0, 1}
    assert all(value.shape == (5,) for value in sample.parameters.values())


def test_the_same_arguments_give_the_same_faces_and_another_seed_others():
    assert_same(draw_faces(40, 32, 7), draw_faces(40, 32, 7))
    one, other = draw_faces(40, 32, 7, difficulty=0), draw_faces(40, 32, 8, difficulty=0)  # without sensor noise
    assert (one.image != other.image).any(axis=(1, 2, 3)).all()
    assert not np.array_equal(one.smile, other.smile)


def test_sensor_noise_differs_by_seed_and_by_face():
    grains = []
    for seed in (0, 1):
        out = np.empty((2, 16, 16, 3), np.uint8)
        grey = np.full((3, 2, 256), 0.5, np.float32)
        synthetic_faces._photograph(grey, np.ones(2, np.float32), np.full(2, 0.1, np.float32), seed, 0, out)
        grains += [out[0].ravel(), out[1].ravel()]
    # Independent noise: correlations of 768 values are about 1 / sqrt(768) = 0.036.
    assert np.abs(np.corrcoef(grains) - np.eye(4)).max() < 4.5 * 0.036


def test_a_face_does_not_depend_on_how_many_are_drawn_nor_in_what_chunks():
    # 1000 .. 1069 crosses the block boundary at 1024, and 70 is a multiple of neither the tile (32) nor the chunk (13).
    sample = draw_faces(70, 32, 7, start=1000, group_noise=0.1, group_contrast=0.3)
    assert_same(draw_faces(41, 32, 7, start=1000, group_noise=0.1, group_contrast=0.3), take(sample, slice(41)))
    assert_same(draw_faces(70, 32, 7, start=1000, group_noise=0.1, group_contrast=0.3, chunk=13), sample)
    assert_same(draw_faces(9, 32, 7, start=1020, group_noise=0.1, group_contrast=0.3), take(sample, slice(20, 29)))


@pytest.mark.parametrize("size", [16, 64])
def test_a_face_does_not_depend_on_the_faces_rendered_with_it(size):
    knobs = {"difficulty": 2, "overlap": 0.4}
    assert_same(draw_faces(60, size, 5, chunk=1, **knobs), draw_faces(60, size, 5, **knobs))


def test_no_two_faces_of_a_seed_are_alike_across_blocks():
    parameters = describe(3 * synthetic_faces.BLOCK)[1]
    assert len(np.unique(parameters["tilt"])) > 0.9 * 3 * synthetic_faces.BLOCK  # a few are cut at two deviations
    assert len(np.unique(parameters["parting"])) > 0.99 * 3 * synthetic_faces.BLOCK


def test_iterating_is_lazy_and_ends_where_it_should():
    blocks = iterate_faces(10**9, 32, 0, chunk=8)  # would not fit anywhere
    assert len(next(blocks)) == 8
    assert [len(block) for block in iterate_faces(20, 32, 0, chunk=8)] == [8, 8, 4]
    assert [int(block.index[0]) for block in iterate_faces(20, 32, 0, start=5, chunk=8)] == [5, 13, 21]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"n": 2.5}, "n must be a whole number"),
        ({"image_size": 8}, "image_size must be at least 16"),
        ({"image_size": 5000}, "at most 1024"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"start": -1}, "start must be at least 0"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"minority_share": 1.2}, r"minority_share must lie in \[0, 1\], got 1.2"),
        ({"label_correlation": -1.1}, r"label_correlation must lie in \[-1, 1\]"),
        ({"group_noise": -0.1}, "group_noise must lie in"),
        ({"group_contrast": 1.0}, r"group_contrast must lie in \[0, 1\)"),
        ({"label_noise": 0.6}, "label_noise must lie in"),
        ({"overlap": 0.5}, "overlap must lie in"),
        ({"difficulty": float("nan")}, "difficulty must lie in"),
        ({"difficulty": "hard"}, "difficulty must be a number"),
        ({"group_nois": 0.1}, "unknown knob 'group_nois'; choose from minority_share, "),
    ],
)
def test_bad_values_are_refused_by_name_before_anything_is_drawn(arguments, message):
    with pytest.raises(ValueError, match=message):
        iterate_faces(**{"n": 4, **arguments})


# --- what the knobs say ---------------------------------------------------------------------------------------------


def test_neutral_labels_are_balanced_and_independent():
    n = 40_000
    labels, _ = describe(n)
    table = np.zeros((2, 2, 2, 2))
    np.add.at(table, tuple(labels[name] for name in LABELS), 1)
    # 16 cells of 1/16 each; 4.5 standard errors is one false alarm in about 10 000 runs, and the seed is fixed.
    assert np.abs(table / n - 1 / 16).max() < 4.5 * standard_error(1 / 16, n)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_minority_share_is_the_share_of_dark_skin_and_changes_nothing_else(share):
    n = 20_000
    neutral, (labels, parameters) = describe(n), describe(n, minority_share=share)
    assert abs(labels["skin"].mean() - share) <= 4 * standard_error(share, n)
    for name in ("smile", "gender", "age"):
        assert np.array_equal(labels[name], neutral[0][name])
    assert [k for k, v in parameters.items() if not np.array_equal(v, neutral[1][k])] == ["tone"]


@pytest.mark.parametrize("correlation", [-1.0, -0.4, 0.0, 0.25, 0.8, 1.0])
def test_label_correlation_is_the_correlation_of_smile_and_gender(correlation):
    n = 20_000
    neutral, (labels, _) = describe(n), describe(n, label_correlation=correlation)
    measured = np.corrcoef(labels["smile"], labels["gender"])[0, 1]
    assert abs(measured - correlation) <= 4 * (1 - correlation**2) / n**0.5 + 1e-12
    assert abs(labels["smile"].mean() - 0.5) < 4 * standard_error(0.5, n)
    for name in ("gender", "age", "skin"):
        assert np.array_equal(labels[name], neutral[0][name])


@pytest.mark.parametrize("overlap", [0.0, 0.03, 0.1, 0.3])
def test_overlap_is_the_error_of_a_classifier_that_sees_the_causes(overlap):
    n = 20_000
    labels, parameters = describe(n, overlap=overlap)
    for cause, label in zip(("curvature", "masculinity", "ageing", "tone"), LABELS, strict=True):
        error = np.mean((parameters[cause] > 0.5) != labels[label])
        assert abs(error - overlap) <= 4 * standard_error(overlap, n), cause
        assert np.abs(parameters[cause] - 0.5).max() < 1.3 + 1e-6, cause  # so that every mouth stays in its face


def test_label_noise_flips_that_share_of_smiles_in_every_group_and_leaves_the_images():
    n = 20_000
    (clean, _), (noisy, _) = describe(n), describe(n, label_noise=0.2)
    flipped = clean["smile"] != noisy["smile"]
    for name in ("gender", "age", "skin", "smile"):
        for value in (0, 1):
            group = clean[name] == value
            assert abs(flipped[group].mean() - 0.2) < 4 * standard_error(0.2, group.sum())
    assert np.array_equal(draw_faces(20, 32, 3).image, draw_faces(20, 32, 3, label_noise=0.5).image)


@pytest.mark.parametrize("knob", [{"group_noise": 0.1}, {"group_contrast": 0.4}])
def test_group_knobs_change_the_pixels_of_the_minority_intersection_alone(knob):
    neutral, biased = draw_faces(200, 32, 3), draw_faces(200, 32, 3, **knob)
    for name in LABELS:
        assert np.array_equal(getattr(neutral, name), getattr(biased, name))
    changed = (neutral.image != biased.image).any(axis=(1, 2, 3))
    assert MINORITY == {"gender": "female", "skin": "dark"}
    assert np.array_equal(changed, (neutral.gender == 0) & (neutral.skin == 1))
    assert np.array_equal(changed, in_minority(neutral))


def test_group_noise_and_contrast_have_the_size_they_say():
    scene = draw_faces(100, 64, 3, difficulty=0)
    minority = in_minority(scene)
    clean = scene.image[minority].astype(float) / 255
    grain = draw_faces(100, 64, 3, difficulty=0, group_noise=0.05).image[minority] / 255 - clean
    middling = (clean > 0.3) & (clean < 0.7)  # far from the ends of the range, where noise is cut off
    assert grain[middling].std() == pytest.approx(0.05, rel=0.02)
    faint = draw_faces(100, 64, 3, difficulty=0, group_contrast=0.4).image[minority] / 255
    for c in range(3):
        assert faint[..., c].std(axis=(1, 2)) == pytest.approx(0.6 * clean[..., c].std(axis=(1, 2)), rel=0.02)
        assert faint[..., c].mean(axis=(1, 2)) == pytest.approx(clean[..., c].mean(axis=(1, 2)), abs=0.005)


def test_difficulty_zero_is_a_straight_face_in_a_perfect_camera():
    parameters = describe(50, difficulty=0)[1]
    for name in ("shift_x", "shift_y", "tilt", "scale", "turn", "nod", "light_x", "light_y"):
        assert not parameters[name].any(), name
    for name in ("curvature", "masculinity", "ageing", "tone", "hair_hue"):
        assert np.array_equal(parameters[name], describe(50)[1][name]), name


# --- neutral is neutral, biased is biased ---------------------------------------------------------------------------


def test_the_smile_signal_is_the_same_picture_in_every_group():
    """Smiling minus neutral is the same picture for any gender, age and skin."""
    _, parameters = describe(64)
    signals = []
    for gender in (0.0, 1.0):
        for age in (0.0, 1.0):
            for tone in (-0.2, 0.0, 1.0, 1.2):
                group = {"masculinity": gender, "ageing": age, "tone": tone}
                neutral, smiling = (
                    synthetic_faces._render(
                        {
                            **parameters,
                            **{k: np.full(64, x, np.float32) for k, x in {**group, "curvature": c}.items()},
                        },
                        32,
                    )
                    for c in (0.0, 1.0)
                )
                touched = np.abs(smiling - neutral) > 0.01
                assert touched.any(axis=(0, 2)).all()
                for planes in (neutral, smiling):  # neither end of the range cuts the signal off
                    assert planes[touched].min() > 0.02
                    assert planes[touched].max() < 0.98
                signals.append(smiling - neutral)
    for signal in signals[1:]:
        assert np.abs(signal - signals[0]).max() < 1e-5


def test_causes_and_nuisances_are_independent_of_the_groups():
    n = 20_000
    labels, parameters = describe(n)
    own = {"masculinity": "gender", "ageing": "age", "tone": "skin"}
    for name, value in parameters.items():
        for group in ("gender", "age", "skin"):
            if own.get(name) == group:
                continue
            a, b = value[labels[group] == 0], value[labels[group] == 1]
            assert abs(a.mean() - b.mean()) < 4.5 * value.std() * (4 / n) ** 0.5, (name, group)
            assert a.std() == pytest.approx(b.std(), rel=0.05), (name, group)


def linear_features(sample):
    return np.column_stack(
        [
            sample.image.mean(axis=3, dtype=np.float32).reshape(len(sample), -1) / 255 - 0.5,
            np.ones(len(sample), np.float32),
        ]
    )


def ridge_is_right(train, test):
    """Whether a ridge classifier of grey pixels is right about the smile of each test face."""
    x = linear_features(train)
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1], dtype=np.float32), x.T @ (2 * train.smile - 1))
    return (linear_features(test) @ weights > 0) == test.smile


def accuracy_by_intersection(sample, is_right):
    return {(g, s): is_right[(sample.gender == g) & (sample.skin == s)].mean() for g in (0, 1) for s in (0, 1)}


def test_with_neutral_knobs_a_classifier_is_equally_right_in_each_group():
    train, test = draw_faces(4000, 32, 1), draw_faces(5000, 32, 1, start=20_000)
    is_right = ridge_is_right(train, test)
    assert (
        0.75 < is_right.mean() < 0.93
    )  # below the 0.97 that the overlap allows: there is something to learn and to lose
    for name in ("gender", "age", "skin"):
        a, b = (is_right[getattr(test, name) == value] for value in (0, 1))
        error = (a.var() / len(a) + b.var() / len(b)) ** 0.5
        assert abs(a.mean() - b.mean()) < 0.01 + 2.5 * error, name
    # The same faces, noise and mouths with the other skin: a paired comparison, several times sharper.
    light, dark = (draw_faces(2000, 32, 1, start=40_000, minority_share=share) for share in (0, 1))
    change = ridge_is_right(train, light).astype(float) - ridge_is_right(train, dark)
    assert abs(change.mean()) < 0.01 + 2.5 * change.std() / 2000**0.5


@pytest.mark.parametrize(
    "knob", [{"group_noise": 0.12}, {"group_contrast": 0.6}, {"group_noise": 0.1, "group_contrast": 0.4}]
)
def test_with_group_knobs_on_the_minority_intersection_is_clearly_harder(knob):
    train, test = draw_faces(3000, 32, 1, **knob), draw_faces(3000, 32, 1, start=20_000, **knob)
    accuracy = accuracy_by_intersection(test, ridge_is_right(train, test))
    others = [accuracy[group] for group in accuracy if group != (0, 1)]
    # Four points is about two standard errors of the difference (0.02) at this n, and the effect is ten.
    assert accuracy[0, 1] < min(others) - 0.04, accuracy


def test_label_correlation_teaches_a_shortcut_that_fails_those_who_break_it():
    """Trained where males smile, a classifier is worse on smiling females and neutral males than on the others."""
    train, test = draw_faces(3000, 32, 1, label_correlation=0.8), draw_faces(2000, 32, 1, start=20_000)
    is_right = ridge_is_right(train, test)
    follows = test.smile == test.gender
    assert is_right[follows].mean() > is_right[~follows].mean() + 0.05


def test_contact_sheet_is_written_where_asked(tmp_path):
    path = tmp_path / "new" / "sheet.png"
    contact_sheet(path, image_size=32, columns=4)
    assert path.read_bytes().startswith(b"\x89PNG")
