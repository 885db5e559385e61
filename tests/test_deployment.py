"""A model as one file: written whole or not at all, read without this project, refused in one line where it is not
ours; and the command line that classifies a picture."""

import errno
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from test_deployable import CLASSES, SIZE, Small, pictures, trained, with_widths
from torch import nn

import deployment
from batches import MEAN, STD, BatchLoader
from deployment import DeploymentError, Export, ModelFile, export_onnx, load_engine, main, read_onnx
from image_cache import decode_image
from quantizers import ptq
from quantizers.modules import QuantizedModel
from quantizers.ptq import Recipe

NAMES = ['Käthe "K" O\'Neil', "日本", "two words", "\\ back\nslash"]
CONFIG = {"dataset": "synthetic", "seed": 3, "options": {"rounding": "nearest"}, "rates": [0.5, None]}
PRINTABLE = ["anna", "bert", "Zoë", "dora"]


@functools.cache
def quantized(weight_bits: int = 8, activation_bits: int = 8) -> QuantizedModel:
    return with_widths(trained(), pictures(64)[0], [weight_bits], [activation_bits])


@functools.cache
def file_bytes(weight_bits: int = 8, activation_bits: int = 8) -> bytes:
    """A file with all metadata; shared."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model = quantized(weight_bits, activation_bits)
        export_onnx(
            model, path, pictures(1)[0], class_names=PRINTABLE, mean=MEAN, std=STD, cell="a-cell", config=CONFIG
        )
        return path.read_bytes()


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(file_bytes())
    return path


def changed(path: Path, change) -> Path:
    """The file with its ONNX model changed."""
    proto = onnx.load_from_string(path.read_bytes())
    change(proto)
    path.write_bytes(proto.SerializeToString())
    return path


def with_metadata(path: Path, **metadata: str | None) -> Path:
    """The file with other metadata; None takes one away."""

    def change(proto: onnx.ModelProto) -> None:
        entries = {entry.key: entry.value for entry in proto.metadata_props} | metadata
        del proto.metadata_props[:]
        for key, value in entries.items():
            if value is not None:
                proto.metadata_props.add(key=key, value=value)

    return changed(path, change)


def message_of(error: pytest.ExceptionInfo) -> str:
    """The message, which must be one line of a readable length."""
    message = str(error.value)
    assert message and message.isprintable() and len(message) < 400, message
    return message


# -------------------------------------------------------------------------------------------------- writing and reading


def test_the_example_of_the_design(tmp_path):
    x, _ = pictures(5)
    path = tmp_path / "new folder" / "model.onnx"
    export = export_onnx(quantized(4, 8), str(path), example=x.numpy())
    predicted = load_engine(str(path), engine="onnxruntime").predict(x.numpy())
    with torch.no_grad():
        assert np.allclose(predicted, quantized(4, 8)(x).numpy(), atol=0.05 * predicted.std())
    assert isinstance(export, Export) and export.path == path
    assert export.size_mb == path.stat().st_size / 1e6
    assert export.weight_types() == "8 x 4 bits in INT4"
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]


def test_a_file_of_mixed_widths_says_what_it_holds(tmp_path):
    model = with_widths(trained(), pictures(64)[0], [8, 4, 3, 16], [8])
    export = export_onnx(model, tmp_path / "model.onnx", pictures(1)[0])
    assert export.weight_types() == "2 x 3 bits in INT4, 2 x 4 bits in INT4, 2 x 8 bits in INT8, 2 x 16 bits in FLOAT16"
    assert [row["layer"] for row in export.weights] == list(model.layers())


def test_metadata_come_back_as_they_were(tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(
        quantized(), path, pictures(1)[0], class_names=NAMES, mean=MEAN, std=np.float32(STD), cell="cell-ä-1",
        config=CONFIG,
    )  # fmt: skip
    file = read_onnx(path)
    assert isinstance(file, ModelFile) and file.path == path and file.content == path.read_bytes()
    assert (file.cell, file.classes) == ("cell-ä-1", NAMES)
    assert file.input == {"image_size": [SIZE, SIZE], "mean": list(MEAN), "std": [float(s) for s in np.float32(STD)]}
    assert file.config == {**quantized().description, **CONFIG}
    assert file.config["method"] == "ptq_static" and file.config["weight_bits"] == 8


def test_metadata_that_were_not_given(tmp_path):
    export_onnx(Small().eval(), tmp_path / "model.onnx", pictures(1)[0])
    file = read_onnx(tmp_path / "model.onnx")
    assert (file.cell, file.classes, file.config) == (None, None, {})
    assert file.input == {"image_size": [SIZE, SIZE], "mean": None, "std": None}


def test_names_of_classes_may_be_numbers(tmp_path):
    export_onnx(Small().eval(), tmp_path / "model.onnx", pictures(1)[0], class_names=np.arange(CLASSES))
    assert read_onnx(tmp_path / "model.onnx").classes == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": MEAN}, "give both mean and std, or neither"),
        ({"mean": MEAN, "std": (1.0, 1.0)}, "mean and std: expected 3 numbers each"),
        ({"example": torch.zeros(3, SIZE, SIZE)}, r"example: expected images \(n, 3, H, W\), got \(3, 16, 16\)"),
        ({"example": torch.zeros(0, 3, SIZE, SIZE)}, r"example: .* got \(0, 3, 16, 16\)"),
    ],
)
def test_arguments_that_do_not_fit(options, message, tmp_path):
    with pytest.raises(DeploymentError, match=f"^{message}") as error:
        export_onnx(quantized(), tmp_path / "model.onnx", **{"example": pictures(1)[0], **options})
    message_of(error)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_exported(tmp_path):
    uncalibrated = ptq.attach(trained(), None, "ptq_static", 8, 8, Recipe())
    without_ranges = ptq.attach(trained(), None, "ptq_static", 8, 8, Recipe())
    ptq.quantize_weights(without_ranges, Recipe())
    dynamic = ptq.ptq_dynamic(trained(), weight_bits=4, activation_bits=4)
    for model, message in (
        (uncalibrated, "its weights are not quantized yet"),
        (without_ranges, "x: used before calibration"),
        (dynamic, "quantize with activation_bits=8"),
        (nn.Conv2d(3, 2, SIZE + 1), "cannot be exported to ONNX"),
    ):
        with pytest.raises(DeploymentError, match=message) as error:
            export_onnx(model, tmp_path / "model.onnx", pictures(1)[0])
        message_of(error)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- a process of its own

ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ImportError(f"{{name}} is not installed here")

REFUSED = {refused!r}
sys.meta_path.insert(0, Refuse())
import numpy, onnxruntime

images = numpy.load("images.npy")
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
for name in {names!r}:
    session = onnxruntime.InferenceSession(name + ".onnx", options, providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {{"image": images}})[0]
    numpy.save(name + ".npy", logits)
assert not REFUSED & set(sys.modules), REFUSED & set(sys.modules)
"""


def test_numpy_and_onnxruntime_are_enough_to_run_a_file(tmp_path):
    """In an empty folder, without this project, PyTorch or onnx: the same predictions."""
    root = Path(deployment.__file__).parent
    ours = {path.stem for path in root.glob("*.py")} | {path.parent.name for path in root.glob("*/__init__.py")}
    assert {"engines", "quantizers", "significance"} <= ours
    refused = ours | {"torch", "torchvision", "timm", "onnx", "onnxscript", "ml_dtypes"}
    x, _ = pictures(64, 5)
    np.save(tmp_path / "images.npy", x.numpy())
    widths = {"eight": (8, 8), "four": (4, 4), "two": (2, 8)}
    for name, bits in widths.items():
        (tmp_path / f"{name}.onnx").write_bytes(file_bytes(*bits))
    code = ALONE.format(refused=refused, names=list(widths))
    result = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name, bits in widths.items():
        logits = np.load(tmp_path / f"{name}.npy")
        assert np.array_equal(logits, load_engine(tmp_path / f"{name}.onnx", threads=1).predict(x.numpy()))
        with torch.no_grad():
            simulated = quantized(*bits)(x).numpy()
        assert (logits.argmax(1) == simulated.argmax(1)).mean() >= 0.95


# ---------------------------------------------------------------------------------------------- files that are not ours


def test_a_truncated_file_is_never_taken_for_a_whole_one(file):
    """Wherever it was cut, between two entries of its metadata too."""
    content = file_bytes()
    metadata = content.index(b"image_size") - 60
    for cut in (0, 1, 2, 7, 100, *range(500, metadata, 997), *range(metadata, len(content))):
        file.write_bytes(content[:cut])
        with pytest.raises(DeploymentError) as error:
            read_onnx(file)
        message = message_of(error)
        assert message.startswith(f"{file}: ") and re.search("truncated|without this program's|damaged", message)


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "model.onnx"
    generator = np.random.default_rng(0)
    contents = [b"", b"\n", b"hello", b"\x00" * 1000, file_bytes()[1:], b"{}"]
    contents += [generator.bytes(size) for size in (1, 2, 3, 10, 100, 10_000)]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(DeploymentError) as error:
            read_onnx(path)
        assert message_of(error).startswith(f"{path}: truncated or not an ONNX file")
    Image.new("RGB", (40, 30)).save(path, "JPEG")
    with pytest.raises(DeploymentError, match="truncated or not an ONNX file"):
        read_onnx(path)


def other_program() -> onnx.ModelProto:
    node = helper.make_node("Relu", ["image"], ["logits"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in ("image", "logits")]
    graph = helper.make_graph([node], "graph", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_another_programs_model(engine, tmp_path):
    path = tmp_path / "other.onnx"
    path.write_bytes(other_program().SerializeToString())
    with pytest.raises(DeploymentError, match="an ONNX file without this program's metadata; export it with") as error:
        load_engine(path, engine)
    assert message_of(error).startswith(f"{path}: ")


def test_places_where_no_file_is(tmp_path):
    for path, message in (
        (tmp_path / "missing.onnx", "no such file"),
        (tmp_path, "cannot be read (Is a directory)"),
        (Path(__file__) / "model.onnx", "cannot be read (Not a directory)"),
    ):
        for read in (read_onnx, load_engine):
            with pytest.raises(DeploymentError) as error:
                read(path)
            assert message_of(error) == f"{path}: {message}"


def test_weights_in_other_files(file):
    def move_out(proto: onnx.ModelProto) -> None:
        tensor = proto.graph.initializer[0]
        tensor.data_location = TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        tensor.external_data.add(key="location", value="/etc/passwd")

    with pytest.raises(DeploymentError, match="its weights lie in other files") as error:
        read_onnx(changed(file, move_out))
    assert message_of(error).startswith(f"{file}: ")


def test_a_graph_that_is_not_valid(file):
    def break_graph(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].op_type = "NoSuchOperator"

    with pytest.raises(DeploymentError, match="damaged") as error:
        read_onnx(changed(file, break_graph))
    assert message_of(error).startswith(f"{file}: ")


INPUT = {"image_size": [SIZE, SIZE], "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize(
    "metadata",
    [
        {"input": "{"},
        {"input": None},
        {"input": "null"},
        {"input": "[]"},
        {"input": '"image_size"'},
        *({"input": json.dumps({**INPUT, "image_size": size})} for size in (None, 16, [16], [16, 17], ["16", "16"])),
        *({"input": json.dumps({**INPUT, "mean": mean})} for mean in (None, 0.5, [0.5], [0.5, 0.5, "0.5"], {"a": 1})),
        {"input": json.dumps({**INPUT, "std": None})},
        {"input": json.dumps({"image_size": [SIZE, SIZE]})},
        {"classes": "[1, 2, 3, 4]"},
        {"classes": '"abcd"'},
        {"classes": "['a']"},
        {"classes": "null,"},
        {"config": "[]"},
        {"config": None},
        {"config": "{'a': 1}"},
    ],
    ids=str,
)
def test_metadata_that_are_damaged(metadata, file):
    with pytest.raises(DeploymentError, match="damaged") as error:
        read_onnx(with_metadata(file, **metadata))
    assert message_of(error).startswith(f"{file}: ")


def test_metadata_of_another_format(file):
    for value in (None, "beyond-naive-quantization/onnx/0", ""):
        with pytest.raises(DeploymentError, match="without this program's metadata"):
            read_onnx(with_metadata(file, format=value))


# -------------------------------------------------------------------------------------- places that cannot be written


@pytest.fixture
def quick_export(monkeypatch):
    """What is written matters here, not how it came about."""
    import onnx_export

    monkeypatch.setattr(onnx_export, "to_onnx", lambda *_: onnx.load_from_string(file_bytes()))


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_place_that_cannot_be_written(tmp_path, quick_export):
    regular = tmp_path / "regular file"
    regular.write_text("here before")
    (tmp_path / "folder.onnx").mkdir()
    before = everything(tmp_path)
    for path in (regular / "model.onnx", regular / "deeper" / "model.onnx", tmp_path / "folder.onnx",
                 Path("/proc/x.onnx"), Path("/dev/null/x.onnx"), tmp_path / ("n" * 256)):  # fmt: skip
        with pytest.raises(DeploymentError, match="cannot be written") as error:
            export_onnx(quantized(), path, pictures(1)[0])
        assert re.fullmatch(r".*: cannot be written \([A-Z][a-z ]+\)", message_of(error))
        assert message_of(error).startswith(f"{path}: ")
    assert everything(tmp_path) == before


def no_space(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(path: Path, data: bytes) -> int:
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
    return no_space()


@pytest.mark.parametrize("moment", ["write", "sync", "rename"])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_full_disk_leaves_what_was_there(moment, is_there, tmp_path, monkeypatch, quick_export):
    path = tmp_path / "model.onnx"
    if is_there:
        path.write_bytes(b"an older model")
    before = everything(tmp_path)
    if moment == "write":
        monkeypatch.setattr(Path, "write_bytes", half_written)
    else:
        monkeypatch.setattr(os, "fsync" if moment == "sync" else "replace", no_space)
    with pytest.raises(DeploymentError) as error:
        export_onnx(quantized(), path, pictures(1)[0])
    assert message_of(error) == f"{path}: cannot be written (No space left on device)"
    monkeypatch.undo()
    assert everything(tmp_path) == before


def test_an_interrupt_leaves_no_file(tmp_path, monkeypatch, quick_export):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(quantized(), tmp_path / "model.onnx", pictures(1)[0])
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- a picture


@pytest.fixture
def picture(tmp_path) -> Path:
    """A JPEG of 90 x 70 pixels."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    path = tmp_path / "a face.jpg"
    coarse.resize((90, 70), Image.Resampling.BICUBIC).save(path, quality=90)
    return path


class OnePicture:
    """The split of a data set that holds one picture, decoded as data sets are."""

    def __init__(self, path: Path):
        self.images = decode_image(path, SIZE)[None]
        self.labels = self.index = np.zeros(1, np.int64)
        self.sensitive: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return 1

    def gather(self, positions, out=None) -> np.ndarray:
        return self.images[positions]


def loaded(path: Path) -> np.ndarray:
    """What the network was trained to see in this picture."""
    (batch,) = BatchLoader(OnePicture(path), 1)
    return batch["image"].numpy()


@pytest.mark.parametrize("kind", ["a face.jpg", "gray.png", "alpha.png", "palette.gif", "tiny.png", "exact.png"])
def test_a_picture_is_prepared_as_the_training_data_are(kind, picture, file):
    path = picture.with_name(kind)
    with Image.open(picture) as image:
        if kind == "gray.png":
            image.convert("L").save(path)
        elif kind == "alpha.png":
            image.convert("RGBA").save(path)
        elif kind == "palette.gif":
            image.convert("P").save(path)
        elif kind == "tiny.png":
            image.resize((3, 5)).save(path)
        elif kind == "exact.png":
            image.resize((SIZE, SIZE)).save(path)
    x = deployment.load_image(path, read_onnx(file))
    assert x.shape == (1, 3, SIZE, SIZE) and x.dtype == np.float32 and x.flags.c_contiguous
    assert np.allclose(x, loaded(path), rtol=1e-5, atol=1e-5)
    assert x.std() > 0.1


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64))
    return weights / weights.sum()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_command_line_prints_label_probability_and_time(engine, file, picture, capsys):
    pytest.importorskip(engine)
    arguments = [str(file), "--image", str(picture), "--engine", engine, "--threads", "1"]
    expected = softmax(load_engine(file, engine, threads=1).predict(loaded(picture))[0])
    assert main([*arguments, "--top", "9"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    *labels, time = captured.out.splitlines()
    found = {}
    for line in labels:
        name, probability = re.fullmatch(r"(\S+) +([\d.]+) %", line).groups()
        found[name] = float(probability)
    assert list(found) == [PRINTABLE[k] for k in np.argsort(-expected)]
    for k, name in enumerate(PRINTABLE):
        assert found[name] == pytest.approx(100 * expected[k], abs=0.051)
    assert re.fullmatch(rf"\d+\.\d\d ms \({engine} on \w+, 1 threads; model\.onnx, \d\.\d\d MB\)", time)
    assert main(arguments) == 0
    (label, _) = capsys.readouterr().out.splitlines()
    assert label.split()[0] == PRINTABLE[int(expected.argmax())]


def test_a_model_without_names_or_with_one_logit(picture, tmp_path, capsys):
    """Classes are numbered; a single logit is that of class 1."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 1))
    path = tmp_path / "one.onnx"
    export_onnx(model, path, pictures(1)[0], mean=MEAN, std=STD)
    assert main([str(path), "--image", str(picture), "--top", "2"]) == 0
    logit = float(load_engine(path).predict(loaded(picture))[0, 0])
    found = dict(re.findall(r"^(\d) +([\d.]+) %$", capsys.readouterr().out, re.MULTILINE))
    assert float(found["1"]) == pytest.approx(100 / (1 + np.exp(-logit)), abs=0.051)
    assert float(found["0"]) + float(found["1"]) == pytest.approx(100, abs=0.11)


def refused(arguments: list, capsys) -> str:
    """The one line on stderr of a call that ends with status 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and line.isprintable()
    return line.removeprefix("error: ")


def test_pictures_that_are_none(file, picture, tmp_path, capsys):
    content = picture.read_bytes()
    pictures_and_messages = []
    for name, data, message in (
        ("text.jpg", b"this is no picture\n" * 50, "not a picture that can be read"),
        ("empty.jpg", b"", "not a picture that can be read"),
        ("truncated.jpg", content[: len(content) // 2], "cannot be read|damaged"),
        ("header.jpg", content[:30], "not a picture that can be read|cannot be read|damaged"),
        ("truncated.png", None, "cannot be read|damaged"),
        ("model.jpg", file_bytes(), "not a picture that can be read"),
    ):
        path = tmp_path / name
        if data is None:
            with Image.open(picture) as image:
                image.save(path)
            data = path.read_bytes()[:-500]
        path.write_bytes(data)
        pictures_and_messages.append((path, message))
    pictures_and_messages += [(tmp_path / "missing.jpg", "no such file"), (tmp_path, "cannot be read")]
    for path, message in pictures_and_messages:
        line = refused([file, "--image", path], capsys)
        assert line.startswith(f"{path}: ") and re.search(message, line), line


def test_models_that_are_none(file, picture, tmp_path, capsys):
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(file_bytes()[:-100])
    other = tmp_path / "other.onnx"
    other.write_bytes(other_program().SerializeToString())
    for path, message in (
        (cut, "truncated or not an ONNX file"),
        (other, "without this program's metadata"),
        (picture, "truncated or not an ONNX file"),
        (tmp_path, "cannot be read"),
        (tmp_path / "missing.onnx", "no such file"),
    ):
        line = refused([path, "--image", picture], capsys)
        assert line.startswith(f"{path}: ") and message in line


def test_models_that_do_not_fit_a_picture(file, picture, tmp_path, capsys):
    path = tmp_path / "bare.onnx"
    export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 2)), path, pictures(1)[0])
    assert "does not say how its images are normalised" in refused([path, "--image", picture], capsys)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * 8, 2))
    export_onnx(model, path, torch.zeros(1, 3, SIZE, 8), mean=MEAN, std=STD)
    assert "its images are 16 x 8; only square ones" in refused([path, "--image", picture], capsys)
    assert "damaged (3 class names, 4 logits)" in refused(
        [with_metadata(file, classes='["a", "b", "c"]'), "--image", picture], capsys
    )


def test_a_model_that_fails_while_it_runs(file, picture, capsys):
    """A valid file whose graph cannot be computed: one line too."""

    def break_head(proto: onnx.ModelProto) -> None:
        shape = numpy_helper.from_array(np.array([7, -1], np.int64), "impossible")
        proto.graph.initializer.append(shape)
        node = helper.make_node("Reshape", ["image", "impossible"], ["reshaped"])
        total = helper.make_node("ReduceSum", ["reshaped"], ["total"], keepdims=0)
        last = proto.graph.node[-1]
        output = last.output[0]
        last.output[0] = "before"
        proto.graph.node.extend([node, total, helper.make_node("Add", ["before", "total"], [output])])

    line = refused([changed(file, break_head), "--image", picture, "--threads", "1"], capsys)
    assert line.startswith(f"{file}: ONNX Runtime cannot run the model: ")


def test_an_engine_that_is_not_installed(file, picture, capsys, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = refused([file, "--image", picture, "--engine", "openvino"], capsys)
    assert "engine openvino is not installed: python -m pip install openvino" in line


@pytest.mark.parametrize(
    "arguments", [[], ["model.onnx"], ["--image", "x.jpg"], ["m", "--image", "x", "--engine", "y"]]
)
def test_arguments_that_are_wrong_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "usage: deployment.py" in capsys.readouterr().err


def test_as_a_program(file, picture):
    """From a shell, in another folder."""
    root = Path(deployment.__file__).parent
    command = [sys.executable, str(root / "deployment.py"), file.name, "--image"]
    for name, status in ((picture.name, 0), ("missing.jpg", 2)):
        result = subprocess.run([*command, name], cwd=file.parent, capture_output=True, text=True)
        assert result.returncode == status
        lines = (result.stderr if status else result.stdout).splitlines()
        assert len(lines) == (1 if status else 2), result.stderr
        assert "Traceback" not in result.stderr
