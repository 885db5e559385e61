"""The networks and their checkpoints: published sizes, any image size, and nothing half loaded."""

import json
import pickle
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import models
from config import ConfigError
from models import (
    CHECKPOINT_FORMAT,
    CheckpointError,
    build_model,
    check_architecture,
    checkpoint_description,
    checkpoint_matches,
    classifier_name,
    count_parameters,
    has_depthwise_convolution,
    load_checkpoint,
    patch_size_for,
    save_checkpoint,
)
from quantizers.ptq import ptq_static
from quantizers.qat import learnable
from sections.base import MODELS
from store import StoreError

PUBLISHED = {  # torchvision's and timm's tables give 25.6, 3.5, 1.24, 5.29 and 22.05 million
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_504_872,
    "squeezenet1_1": 1_235_496,
    "efficientnet_b0": 5_288_548,
    "vit_small_patch16_224": 22_050_664,
}
SMALL = "squeezenet1_1"


def images(n: int, size: int) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def refused(call, *arguments, **keys) -> str:
    """The one line of the CheckpointError that the call raises."""
    with pytest.raises(CheckpointError) as caught:
        call(*arguments, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------- architectures


def test_the_study_has_the_five_published_architectures():
    assert set(MODELS) == set(PUBLISHED)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):  # shapes alone
        model = build_model(name, 1000, 224)
    assert count_parameters(model) == PUBLISHED[name]


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", MODELS)
def test_logits_at_small_image_sizes(name, size):
    model = build_model(name, 5, size).eval()
    with torch.inference_mode():
        logits = model(images(2, size))
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits[0], logits[1])  # the image matters


@pytest.mark.parametrize("name", [SMALL, "mobilenet_v2"])
def test_logits_at_224_pixels(name):
    with torch.inference_mode():
        logits = build_model(name, 2, 224).eval()(images(1, 224))
    assert logits.shape == (1, 2) and torch.isfinite(logits).all()


def test_a_model_comes_in_training_mode():
    assert all(module.training for module in build_model(SMALL, 2, 32).modules())


def test_patch_sizes():
    assert {size: patch_size_for(size) for size in (32, 48, 64, 96, 112, 128, 160, 224)} == {
        32: 16, 48: 16, 64: 16, 96: 16, 112: 16, 128: 16, 160: 16, 224: 16,
    }  # fmt: skip
    assert (patch_size_for(40), patch_size_for(36), patch_size_for(28)) == (8, 4, 4)
    for size in (33, 62, 225):
        with pytest.raises(ConfigError, match=f"image_size {size}: a vision transformer needs a multiple of 4"):
            patch_size_for(size)


@pytest.mark.parametrize("size, patch", [(32, 16), (40, 8)])
def test_the_vit_has_the_image_and_patch_size_it_is_given(size, patch):
    with torch.device("meta"):
        model = build_model("vit_small_patch16_224", 2, size)
    assert model.patch_embed.proj.kernel_size == (patch, patch)
    assert model.pos_embed.shape == (1, (size // patch) ** 2 + 1, 384)  # and the class token


def test_a_patch_size_of_the_users_own():
    with torch.device("meta"):
        model = build_model("vit_small_patch16_224", 2, 35, options={"patch_size": 7})  # 35 is no multiple of 4
    assert model.patch_embed.proj.kernel_size == (7, 7)


def test_depthwise_models():
    assert [name for name in MODELS if has_depthwise_convolution(build_model(name, 2, 32))] == [
        "mobilenet_v2",
        "efficientnet_b0",
    ]
    assert not has_depthwise_convolution(nn.Conv2d(1, 4, 3))  # a single input channel is no depthwise convolution
    assert not has_depthwise_convolution(nn.Conv2d(4, 4, 3, groups=2))


def test_a_depthwise_convolution_is_seen_inside_a_quantized_layer_that_is_being_trained():
    """Training in bf16, which halves its speed on a CPU, is chosen by it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4))
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3))
    for network, expected in ((model, True), (plain, False)):
        quantized = ptq_static(network, torch.rand(4, 3, 8, 8), weight_bits=4, activation_bits=4, keep_float=True)
        assert has_depthwise_convolution(quantized) == expected
        with learnable(quantized):
            assert has_depthwise_convolution(quantized) == expected


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "test_convnext"])
def test_any_other_timm_model_works(name):
    check_architecture(name)
    model = build_model(name, 3, 32).eval()
    with torch.inference_mode():
        assert model(images(2, 32)).shape == (2, 3)
    head = model.get_submodule(classifier_name(model, name))
    assert isinstance(head, nn.Linear) and head.out_features == 3


def test_an_unknown_name_gets_the_nearest():
    for name, near in (("resnet5", "resnet50"), ("mobilenetv2", "mobilenet_v2"), ("vit_small_patch16_244", MODELS[4])):
        for call in (check_architecture, lambda name: build_model(name, 2, 32)):
            with pytest.raises(ConfigError) as caught:
                call(name)
            assert str(caught.value) == f"models.architectures: unknown model {name!r} (did you mean {near}?)"
    with pytest.raises(ConfigError) as caught:
        check_architecture("qqqqqqqq")
    assert all(name in str(caught.value) for name in (*MODELS, "timm.list_models()"))
    assert len(str(caught.value)) < 300  # not timm's thousand names


@pytest.mark.parametrize("name", [SMALL, "efficientnet_b0"])
def test_an_unknown_option_is_named(name):
    with pytest.raises(ConfigError, match=rf"models\.options\.{name}: .*colour"):
        build_model(name, 2, 32, options={"colour": "red"})


def test_options_reach_the_constructor():
    options = {"dropout": 0.125}
    dropouts = [m.p for m in build_model(SMALL, 2, 32, options=options).modules() if isinstance(m, nn.Dropout)]
    assert dropouts == [0.125]
    assert options == {"dropout": 0.125}


# ---------------------------------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize("name", [SMALL, "efficientnet_b0", "test_vit"])
def test_the_seed_alone_determines_the_weights(name):
    torch.manual_seed(1)
    first = state(build_model(name, 2, 32, seed=7))
    torch.manual_seed(2)
    torch.rand(3)
    assert same(first, state(build_model(name, 2, 32, seed=7)))
    assert not same(first, state(build_model(name, 2, 32, seed=8)))


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build_model(SMALL, 2, 32, seed=7)
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------------------------- checkpoints

DESCRIPTION = {
    "model": SMALL,
    "cell": "synthetic-squeezenet1_1-s0-fp32-0123456789",
    "n_classes": 2,
    "names": ["a", "b"],
}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path = tmp_path / "checkpoints" / "one.safetensors"
    save_checkpoint(path, build_model(SMALL, 2, 32, seed=1), DESCRIPTION)
    return path


def test_a_checkpoint_survives_with_its_description(checkpoint):
    model = build_model(SMALL, 2, 32, seed=2)
    load_checkpoint(checkpoint, model, {"model": SMALL, "n_classes": 2})
    assert same(state(model), state(build_model(SMALL, 2, 32, seed=1)))
    assert checkpoint_description(checkpoint) == DESCRIPTION
    assert [path.name for path in checkpoint.parent.iterdir()] == ["one.safetensors"]


def test_the_same_model_is_the_same_bytes_and_the_older_metadata_are_read(checkpoint):
    whole, model = checkpoint.read_bytes(), build_model(SMALL, 2, 32, seed=1)
    for _ in range(8):  # several metadata keys would be in either order by chance
        save_checkpoint(checkpoint, model, DESCRIPTION)
        assert checkpoint.read_bytes() == whole
    older = {"format": CHECKPOINT_FORMAT, "description": json.dumps(DESCRIPTION)}
    save_file(model.state_dict(), checkpoint, metadata=older)
    assert checkpoint_description(checkpoint) == DESCRIPTION


def test_the_state_of_batch_norm_is_kept(tmp_path):
    model = build_model("test_resnet", 2, 32)
    model(images(4, 32))  # running statistics
    save_checkpoint(tmp_path / "c.safetensors", model.to(memory_format=torch.channels_last), {})
    other = build_model("test_resnet", 2, 32, seed=9)
    load_checkpoint(tmp_path / "c.safetensors", other, {})
    assert same(state(other), state(model))
    with torch.inference_mode():
        assert torch.equal(
            other.eval()(images(2, 32)), model.to(memory_format=torch.contiguous_format).eval()(images(2, 32))
        )


def test_whether_a_checkpoint_is_that_of_a_cell(checkpoint):
    assert checkpoint_matches(checkpoint, DESCRIPTION["cell"])
    assert not checkpoint_matches(checkpoint, "another")
    assert not checkpoint_matches(checkpoint.with_name("none.safetensors"), DESCRIPTION["cell"])
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    assert not checkpoint_matches(checkpoint, DESCRIPTION["cell"])


def damaged(path: Path, kind: str) -> Path:
    content = path.read_bytes()
    other = build_model("mobilenet_v2", 2, 32)
    if kind == "truncated":
        path.write_bytes(content[:-1])
    elif kind == "truncated header":
        path.write_bytes(content[:100])
    elif kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "html":
        path.write_text("<!DOCTYPE html><html><body>Not found</body></html>\n" * 40)
    elif kind == "pickle":
        torch.save(other.state_dict(), path)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "missing":
        path.unlink()
    elif kind == "another program":
        save_file(build_model(SMALL, 2, 32).state_dict(), path, metadata={"format": "pt"})
    elif kind == "another architecture":
        save_checkpoint(path, other, {**DESCRIPTION, "model": "mobilenet_v2"})
    elif kind == "lying description":
        save_checkpoint(path, other, DESCRIPTION)
    elif kind == "other classes":
        save_checkpoint(path, build_model(SMALL, 3, 32), {**DESCRIPTION, "n_classes": 3})
    elif kind == "one tensor less":
        tensors = state(build_model(SMALL, 2, 32))
        del tensors["features.0.bias"]
        wrapper = nn.Module()
        wrapper.state_dict = lambda: tensors
        save_checkpoint(path, wrapper, DESCRIPTION)
    return path


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("truncated", "truncated or not a safetensors file"),
        ("truncated header", "truncated or not a safetensors file"),
        ("zero bytes", "truncated or not a safetensors file"),
        ("html", "truncated or not a safetensors file"),
        ("pickle", "truncated or not a safetensors file"),
        ("folder", "truncated or not a safetensors file"),
        ("missing", "no such checkpoint; make it with python main.py --phase baseline"),
        ("another program", "not a checkpoint of this program (format 'pt')"),
        ("another architecture", "its model is 'mobilenet_v2', expected 'squeezenet1_1'"),
        ("lying description", "a checkpoint of another architecture: "),
        ("other classes", "its n_classes is 3, expected 2"),
        ("one tensor less", "a checkpoint of another architecture: 1 missing tensors (such as features.0.bias)"),
    ],
)
def test_a_bad_checkpoint_is_refused_by_name_and_nothing_is_loaded(checkpoint, kind, reason):
    damaged(checkpoint, kind)
    model = build_model(SMALL, 2, 32, seed=5)
    before = state(model)
    message = refused(load_checkpoint, checkpoint, model, {"model": SMALL, "n_classes": 2})
    assert message.startswith(f"{checkpoint}: {reason}")
    assert same(state(model), before)


def test_other_shapes_are_refused_before_the_first_tensor_is_copied(checkpoint):
    model = build_model(SMALL, 3, 32, seed=5)
    before = state(model)
    message = refused(load_checkpoint, checkpoint, model, {})
    assert "2 other shapes (such as classifier.1.bias)" in message
    assert same(state(model), before)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_checkpoint_that_cannot_be_written_is_a_store_error_and_the_old_one_stays(checkpoint):
    import resource

    before = checkpoint.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StoreError) as caught:
            save_checkpoint(checkpoint, build_model(SMALL, 2, 32), DESCRIPTION)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value).startswith(f"{checkpoint}: cannot be written (")
    assert "\n" not in str(caught.value)
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


# ------------------------------------------------------------------------------------------------- weights of the user


@pytest.mark.parametrize("form", ["safetensors", "ours", "pt", "pth", "state_dict", "model", "data parallel"])
def test_weights_from_a_file(tmp_path, form):
    source = build_model(SMALL, 2, 32, seed=1)
    path = tmp_path / ("w.safetensors" if form in ("safetensors", "ours") else "w.pth" if form == "pth" else "w.pt")
    if form == "safetensors":
        save_file(source.state_dict(), path, metadata={"description": "my best model"})  # another program's metadata
    elif form == "ours":
        save_checkpoint(path, source, DESCRIPTION)
    elif form in ("pt", "pth"):
        torch.save(source.state_dict(), path)
    elif form == "data parallel":
        torch.save({f"module.{key}": value for key, value in source.state_dict().items()}, path)
    else:
        torch.save({"epoch": 3, form: source.state_dict()}, path)
    assert same(state(build_model(SMALL, 2, 32, seed=2, weights=path)), state(source))
    assert same(state(build_model(SMALL, 2, 32, seed=2, weights=str(path), pretrained=True)), state(source))


@pytest.mark.parametrize("name", [SMALL, "test_resnet"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_with_another_number_of_classes_give_the_backbone(tmp_path, name, suffix):
    source = build_model(name, 7, 32, seed=1)
    path = tmp_path / f"w.{suffix}"
    if suffix == "pt":
        torch.save(source.state_dict(), path)
    else:
        save_checkpoint(path, source, {"model": name})
    model, fresh = build_model(name, 2, 32, seed=2, weights=path), build_model(name, 2, 32, seed=2)
    head = classifier_name(model, name)
    for key, value in model.state_dict().items():
        assert torch.equal(value, (fresh if key.startswith(f"{head}.") else source).state_dict()[key]), key
    assert not same(state(model), state(fresh))


class RunsCode:
    """Unpickling this writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    path, proof = tmp_path / "w.pt", tmp_path / "code was run"
    torch.save({"state_dict": RunsCode(proof)}, path)
    assert refused(build_model, SMALL, 2, 32, weights=path).startswith(f"{path}: not a weights-only checkpoint: ")
    path.write_bytes(pickle.dumps(RunsCode(proof)))
    assert refused(build_model, SMALL, 2, 32, weights=path).startswith(f"{path}: ")
    assert not proof.exists()
    pickle.loads(path.read_bytes())  # it would have been
    assert proof.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_bad_weights_are_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    build = (build_model, SMALL, 2, 32)
    assert refused(*build, weights=path) == f"models.weights.{SMALL}: {path}: no such file"
    good = build_model(SMALL, 2, 32).state_dict()
    save_file(good, path) if suffix == "safetensors" else torch.save(good, path)
    content = path.read_bytes()
    for bad in (b"", content[: len(content) // 2], content[:-200], b"<!DOCTYPE html><html></html>" * 20):
        path.write_bytes(bad)
        assert refused(*build, weights=path).startswith(f"{path}: ")
    foreign = build_model("mobilenet_v2", 2, 32).state_dict()
    save_file(foreign, path) if suffix == "safetensors" else torch.save(foreign, path)
    assert "a checkpoint of another architecture: " in refused(*build, weights=path)


def test_weights_that_are_no_state_dict(tmp_path):
    path = tmp_path / "w.pt"
    for value in ([1, 2], {"epoch": 3, "weights": {}}, torch.zeros(3)):
        torch.save(value, path)
        assert refused(build_model, SMALL, 2, 32, weights=path) == f"{path}: does not hold a state dict of tensors"


def test_our_checkpoint_of_another_architecture_is_refused_as_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    save_checkpoint(path, build_model("mobilenet_v2", 2, 32), {"model": "mobilenet_v2"})
    assert refused(build_model, SMALL, 2, 32, weights=path) == f"{path}: a checkpoint of mobilenet_v2, not of {SMALL}"


# ---------------------------------------------------------------------------------------------------------- pretrained


def offline(*arguments, **keys):
    raise urllib.error.URLError("[Errno -2] Name or service not known")


def test_pretrained_without_network_says_what_to_do(monkeypatch, tmp_path):
    import timm.models._builder

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing downloaded before
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for download in ("load_state_dict_from_hf", "load_state_dict_from_url", "load_custom_from_hf"):
        monkeypatch.setattr(timm.models._builder, download, offline)
    for name in (SMALL, "efficientnet_b0"):
        with pytest.raises(ConfigError) as caught:
            build_model(name, 2, 32, pretrained=True)
        message = str(caught.value)
        assert message.startswith(f"models.pretrained: the ImageNet weights of {name} cannot be downloaded (")
        assert "Name or service not known" in message
        assert "models.pretrained=false" in message and f"models.weights.{name}=FILE" in message
        assert "\n" not in message


def test_pretrained_weights_are_the_backbone(monkeypatch):
    import torchvision

    source = build_model(SMALL, 1000, 224, seed=1)
    weights = torchvision.models.get_model_weights(SMALL)
    monkeypatch.setattr(weights, "get_state_dict", lambda self, check_hash: source.state_dict())
    model, fresh = build_model(SMALL, 2, 32, pretrained=True, seed=2), build_model(SMALL, 2, 32, seed=2)
    head = models.CLASSIFIERS[SMALL]
    for key, value in model.state_dict().items():
        assert torch.equal(value, (fresh if key.startswith(f"{head}.") else source).state_dict()[key]), key


def test_an_error_without_pretrained_is_not_taken_for_a_missing_network(monkeypatch):
    import timm

    def broken(*arguments, **keys):
        raise RuntimeError("a bug")

    monkeypatch.setattr(timm, "create_model", broken)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        build_model("efficientnet_b0", 2, 32)


def test_counting_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    assert count_parameters(model) == (4 * 3 * 9 + 4) + (4 + 4) + (4 * 2 + 2)
    assert np.isscalar(count_parameters(model))
