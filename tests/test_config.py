"""The configuration: closed, typed, documented by configs/config.yaml; every refusal is one line that helps."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from config import Config, ConfigError, dump_config, load_config
from sections.base import parse_width, suggest
from sections.quantization import SHORTHANDS, MethodEntry
from sections.training import TrainingOverrides

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
MAPPINGS = {"training.per_model", "models.weights", "models.options", "evaluation.mappings"}  # the user's keys


@pytest.fixture
def refusal(tmp_path):
    """refusal(yaml text, *overrides) -> the one line with which load_config refuses it, without the file's folder."""

    def refuse(text: str, *overrides: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides)
        message = str(caught.value)
        assert "\n" not in message
        return message.replace(f"{tmp_path}/", "")

    return refuse


def load(tmp_path, text: str, *overrides: str) -> Config:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def key_paths(values: dict, prefix: str = "") -> set[str]:
    found = set()
    for key, value in values.items():
        path = f"{prefix}{key}"
        found.add(path)
        if isinstance(value, dict) and path not in MAPPINGS:
            found |= key_paths(value, f"{path}.")
    return found


# --------------------------------------------------------------------------------------------------- files and defaults


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_yaml_loads_and_survives_dump_and_load(path, tmp_path):
    config = load_config(path)
    assert load(tmp_path, dump_config(config)) == config


def test_config_yaml_holds_every_key_with_its_default():
    default = next(path for path in CONFIGS if path.name == "config.yaml")
    written = yaml.safe_load(default.read_text(encoding="utf-8"))
    assert key_paths(written) == key_paths(Config().model_dump())
    assert load_config(default) == Config()


def test_an_empty_file_and_no_file_are_the_defaults(tmp_path):
    assert load(tmp_path, "") == load(tmp_path, "# nothing\n") == load_config(None) == Config()


def test_file_then_overrides_in_order(tmp_path):
    config = load(tmp_path, "training: {epochs: 2, batch_size: 8}", "training.epochs=3", " training.epochs = 4")
    assert (config.training.epochs, config.training.batch_size) == (4, 8)
    assert config.training.learning_rate == Config().training.learning_rate


def test_a_scalar_stands_for_a_list_of_one(tmp_path):
    text = "data: {dataset: fairface}\nrun: {seeds: 3}\nquantization: {bit_widths: 4, methods: dynamic}"
    sets = ("quantization.backend=arm", "deployment.engines=openvino", "deployment.export=vit*:qat")
    config = load(tmp_path, text, "models.architectures=resnet50", "quantization.ptq_static.observer=entropy", *sets)
    assert config.data.dataset == ["fairface"]
    assert config.run.seeds == [3]
    assert (config.quantization.bit_widths, config.quantization.methods) == ([4], ["dynamic"])
    assert (config.models.architectures, config.quantization.ptq_static.observer) == (["resnet50"], ["entropy"])
    assert (config.quantization.backend, config.deployment.engines) == (["arm"], ["openvino"])
    assert config.deployment.export == ["vit*:qat"]


@pytest.mark.parametrize(
    "text, value", [("1e-3", 0.001), ("2E4", 20000.0), ("1.e-2", 0.01), (".5e1", 5.0), ("+1e0", 1.0), ("3", 3.0)]
)
def test_exponents_are_numbers_in_files_and_overrides(tmp_path, text, value):
    assert load(tmp_path, f"training: {{learning_rate: {text}}}").training.learning_rate == value
    assert load_config(None, [f"training.learning_rate={text}"]).training.learning_rate == value


@settings(max_examples=30, deadline=None)
@given(
    text=st.one_of(
        st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=12),
        st.from_regex(r"[-+.]?\d{1,3}\.?e\d", fullmatch=True),
    )
)
def test_any_string_survives_dump_and_load(text, tmp_path_factory):
    config = Config(results_dir=text)
    assert load(tmp_path_factory.mktemp("dump"), dump_config(config)) == config


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Config().training.epochs = 3


def test_yaml_anchors_and_merge_keys_work(tmp_path):
    text = "data:\n  fairface: &small {max_train: 7, max_test: 8}\n  utkface: {<<: *small, max_test: 9}\n"
    data = load(tmp_path, text).data
    assert (data.fairface.max_train, data.fairface.max_test) == (7, 8)
    assert (data.utkface.max_train, data.utkface.max_test) == (7, 9)


# ------------------------------------------------------------------------------------------------------------- refusals

REFUSALS = [  # (YAML, the message after the file's name)
    ("traning: {epochs: 2}", "traning: unknown key (did you mean training?)"),
    ("training: {epoch: 2}", "training.epoch: unknown key (did you mean epochs?)"),
    ("data: {fairface: {rooot: x}}", "data.fairface.rooot: unknown key (did you mean root?)"),
    (
        "training: {per_model: {resnet50: {epoch: 3}}}",
        "training.per_model.resnet50.epoch: unknown key (did you mean epochs?)",
    ),
    (
        "quantization: {methods: [dynamic, {method: ptq_static, observr: mse}]}",
        "quantization.methods[1].observr: unknown key (did you mean observer?)",
    ),
    (
        "deployment: {qqq: 1}",
        "deployment.qqq: unknown key; choose from cells, export, engines, provider, float_precision, latency,",
    ),
    ("training: {epochs: 0}", "training.epochs: input should be greater than 0, got 0"),
    ("training: {epochs: two}", "training.epochs: input should be a valid integer, got 'two'"),
    ("training: {epochs: 2.5}", "training.epochs: input should be a valid integer, got 2.5"),
    ("training: {epochs: true}", "training.epochs: input should be a valid integer, got True"),
    ("training: {flip: 1}", "training.flip: input should be a valid boolean, got 1"),
    ("training: {learning_rate: .nan}", "training.learning_rate: input should be a finite number, got nan"),
    ("training: {label_smoothing: 1.0}", "training.label_smoothing: input should be less than 1, got 1.0"),
    (
        "training: {per_model: {resnet50: {epochs: 0}}}",
        "training.per_model.resnet50.epochs: input should be greater than 0, got 0",
    ),
    ("training: {precision: fp31}", "training.precision: unknown value 'fp31' (did you mean fp32?)"),
    ("data: {dataset: celeb}", "data.dataset[0]: unknown value 'celeb' (did you mean celeba?)"),
    ("data: {dataset: [celeba, celeba]}", "data.dataset: 'celeba' is there twice"),
    (
        "data: {synthetic: {image_size: 31}}",
        "data.synthetic.image_size: input should be greater than or equal to 32, got 31",
    ),
    ("data: {fairface: {target: gendr}}", "data.fairface.target: unknown value 'gendr' (did you mean gender?)"),
    ("data: {synthetic: {sensitive: []}}", "data.synthetic.sensitive: list should have at least 1 item"),
    ("data: {synthetic: {sensitive: [skin, skin]}}", "data.synthetic.sensitive: 'skin' is there twice"),
    (
        "data: {synthetic: {target: smile, sensitive: [gender, smile]}}",
        "data.synthetic.sensitive: the target 'smile' cannot be a sensitive attribute too",
    ),
    (
        "analysis: {attribute: skins}",
        "analysis.attribute: 'skins' is not a sensitive attribute of synthetic (did you mean skin?)",
    ),
    ("run: {seeds: [0, 0]}", "run.seeds: 0 is there twice"),
    ("run: {seeds: [-1]}", "run.seeds[0]: input should be greater than or equal to 0, got -1"),
    ("models: {architectures: []}", "models.architectures: list should have at least 1 item"),
    ("models: {options: {resnet50: {x: 2001-01-01}}}", "models.options.resnet50.x: input was not a valid JSON value"),
    (
        "quantization: {methods: [ptq_statik]}",
        "quantization.methods[0]: unknown method 'ptq_statik' (did you mean ptq_static?)",
    ),
    (
        "quantization: {methods: [{method: dynamik}]}",
        "quantization.methods[0].method: unknown method 'dynamik' (did you mean dynamic?)",
    ),
    ("quantization: {methods: [{}]}", "quantization.methods[0].method: field required"),
    ("quantization: {methods: [5]}", "quantization.methods[0]: input should be a valid string, got 5"),
    (
        "quantization: {methods: bias_aware}",
        "quantization.methods[0]: unknown method 'bias_aware'; choose from ptq_static,",
    ),
    (
        "quantization: {methods: [{method: ptq_dynamic, observer: mse}]}",
        "quantization.methods[0]: observer = ['mse'] does not apply to ptq_dynamic; it has weight_observer,",
    ),
    (
        "quantization: {methods: [{method: PTQ_INT8, bit_widths: 4}]}",
        "quantization.methods[0]: bit_widths does not apply to PTQ_INT8, whose width is fixed",
    ),
    (
        "quantization: {methods: [{method: ptq_static, observer: [mse, msee]}]}",
        "quantization.methods[0].observer[1]: unknown value 'msee' (did you mean mse?)",
    ),
    (
        "quantization: {ptq_static: {observer: minmx}}",
        "quantization.ptq_static.observer[0]: unknown value 'minmx' (did you mean minmax?)",
    ),
    ("quantization: {bit_widths: [8, 9]}", "quantization.bit_widths: bit width 9: expected 2 to 8"),
    ("quantization: {bit_widths: [W4A9]}", "quantization.bit_widths: bit width 'W4A9': expected 2 to 8"),
    ("quantization: {bit_widths: [4, 4]}", "quantization.bit_widths: 4 is there twice"),
    ("quantization: {bit_widths: [4.0]}", "quantization.bit_widths[0]: input should be a valid integer, got 4.0"),
    (
        "quantization: {ptq_static: {first_last_bits: 1}}",
        "quantization.ptq_static.first_last_bits: input should be greater than or equal to 2",
    ),
    ("quantization: {backend: [x86, am]}", "quantization.backend[1]: unknown value 'am' (did you mean arm?)"),
    ("quantization: {backend: tensort}", "quantization.backend[0]: unknown value 'tensort' (did you mean tensorrt?)"),
    ("quantization: {backend: gpu}", "quantization.backend[0]: unknown value 'gpu'; choose from x86, arm, tensorrt"),
    ("quantization: {backend: [arm, x86, arm]}", "quantization.backend: 'arm' is there twice"),
    ("quantization: {backend: []}", "quantization.backend: list should have at least 1 item"),
    (
        "quantization: {backend: [arm, tensorrt], reduce_range: true}",
        "quantization.reduce_range: for x86 CPUs; it does nothing with backend arm, tensorrt",
    ),
    ("quantization: {reduce_range: 1}", "quantization.reduce_range: input should be a valid boolean, got 1"),
    (
        "quantization: {backend: tensorrt, qat: {activation_scheme: affine}}",
        "quantization.qat.activation_scheme: affine needs zero points, which backend tensorrt has not; leave it out",
    ),
    (
        "quantization: {backend: [x86, tensorrt], methods: [ptq_static, {method: qat, activation_scheme: affine}]}",
        "quantization.methods[1].activation_scheme: affine needs zero points, which backend tensorrt has not; leave it",
    ),
    ("quantization: {methods: [{method: qat, backend: arm}]}", "quantization.methods[0].backend: unknown key"),
    (
        "mitigation: {strategies: [{strategy: group_dro, stat: minimax_ranges}]}",
        "mitigation.strategies[0]: group_dro has no key 'stat' (did you mean start?)",
    ),
    (
        "mitigation: {strategies: [{strategy: group_dro, start_options: {layers: 1}}]}",
        "mitigation.strategies[0]: group_dro: start_options: ptq_static has no key 'layers'; choose from observer,",
    ),
    (
        "mitigation: {strategies: [{strategy: distillation, epochs: 0}]}",
        "mitigation.strategies[0]: distillation: epochs: input should be greater than 0, got 0",
    ),
    (
        "mitigation: {strategies: [{strategy: distillation, architectures: [resnet5]}]}",
        "mitigation.strategies[0].architectures: 'resnet5' is none of the models (did you mean resnet50?)",
    ),
    (
        "mitigation: {strategies: [{strategy: minimax_ranges, reconstruction_iterations: 9}]}",
        "mitigation.strategies[0]: minimax_ranges: reconstruction_iterations does nothing with rounding nearest;",
    ),
    (
        "mitigation: {strategies: [fair_mixed_precision], fair_mixed_precision: {bit_operations_budget: 9}}",
        "mitigation.strategies[0]: fair_mixed_precision: its budget is one of bytes; leave out bit_operations_budget",
    ),
    (
        "mitigation: {diagnostics: {cells: 'a:b:c:d'}}",
        "mitigation.diagnostics.cells: pattern 'a:b:c:d': expected MODEL:METHOD:BITS, such as *:ptq_static:W8A8",
    ),
    (
        "mitigation: {strategies: bias_aware_calibratio}",
        "mitigation.strategies[0]: unknown strategy 'bias_aware_calibratio' (did you mean bias_aware_calibration?)",
    ),
    (
        'deployment: {cells: "a:b:c:d"}',
        "deployment.cells: pattern 'a:b:c:d': expected MODEL:METHOD:BITS, such as *:ptq_static:W8A8",
    ),
    ('deployment: {cells: ["*", ""]}', "deployment.cells: pattern '': expected MODEL:METHOD:BITS, such as"),
    ('deployment: {export: ":x"}', "deployment.export: pattern ':x': expected MODEL:METHOD:BITS, such as"),
    ('deployment: {export: ["a::W8A8"]}', "deployment.export: pattern 'a::W8A8': expected MODEL:METHOD:BITS, such as"),
    ("deployment: {cells: [5]}", "deployment.cells[0]: input should be a valid string, got 5"),
    ("deployment: {engines: openvin}", "deployment.engines[0]: unknown value 'openvin' (did you mean openvino?)"),
    ("deployment: {engines: [openvino, openvino]}", "deployment.engines: 'openvino' is there twice"),
    ("deployment: {engines: []}", "deployment.engines: list should have at least 1 item"),
    ("deployment: {provider: cud}", "deployment.provider: unknown value 'cud' (did you mean cuda?)"),
    ("deployment: {float_precision: bf15}", "deployment.float_precision: unknown value 'bf15' (did you mean bf16?)"),
    (
        "analysis: {hypotheses: [H1]}",
        "analysis.hypotheses[0]: unknown hypothesis 'H1'; choose from default, H1-larger-models, H2-qat-gain",
    ),
    ("analysis: {hypotheses: [H5-int]}", "analysis.hypotheses[0]: unknown hypothesis 'H5-int' (did you mean H5-int8?)"),
    ("analysis: {hypotheses: [default, H5-int8]}", "analysis.hypotheses: 'H5-int8' is there twice"),
    (
        "analysis: {hypotheses: [{id: a, statement: b, metric: acuracy, cells: {bits: 4}, above: 0}]}",
        "analysis.hypotheses[0].metric: unknown value 'acuracy' (did you mean accuracy?)",
    ),
    (
        "analysis: {hypotheses: [{id: a b, statement: b, metric: accuracy, cells: {bits: 4}, above: 0}]}",
        "analysis.hypotheses[0].id: string should match pattern",
    ),
    (
        "analysis: {hypotheses: [{id: a, statement: b, metric: accuracy, cells: {bit: 4}, above: 0}]}",
        "analysis.hypotheses[0].cells.bit: unknown key (did you mean bits?)",
    ),
    (
        "analysis: {hypotheses: [{id: a, statement: b, metric: accuracy, cells: {bits: 9}, above: 0}]}",
        "analysis.hypotheses[0].cells.bits: bit width 9: expected 2 to 8 or a string such as W4A8",
    ),
    (
        "analysis: {hypotheses: [{id: a, statement: b, metric: accuracy, cells: {strategy: distill}, above: 0}]}",
        "analysis.hypotheses[0].cells.strategy[0]: unknown value 'distill' (did you mean distillation?)",
    ),
    (
        "analysis: {hypotheses: [{id: a, statement: b, metric: accuracy, cells: {model: resnet5}, above: 0}]}",
        "analysis.hypotheses[0]: a: 'resnet5' is none of the models (did you mean resnet50?)",
    ),
    (
        "analysis: {hypotheses: [{id: a, statement: b, metric: accuracy, cells: {}, against: {methd: qat}, above: 0}]}",
        "analysis.hypotheses[0].against.methd: unknown key (did you mean method?)",
    ),
    (
        "analysis: {hypotheses: [{id: a, statement: b, metric: accuracy, cells: {}, against: fp16, above: 0}]}",
        "analysis.hypotheses[0].against: unknown value 'fp16'; choose from fp32, plain, or cells such as",
    ),
    (
        "analysis: {hypotheses: [{id: a, statement: b, metric: accuracy, cells: {}}]}",
        "analysis.hypotheses[0]: give above, below or both: the bounds between which the effect shall lie",
    ),
    (
        "analysis: {hypotheses: [{id: a, statement: b, metric: accuracy, cells: {}, above: 1, below: 1}]}",
        "analysis.hypotheses[0]: above = 1 must be less than below = 1",
    ),
    (
        "analysis: {hypotheses: [{id: a, statement: b, metric: accuracy, cells: {}, above: 0, test: permutation}]}",
        "analysis.hypotheses[0]: test permutation needs `by`, or a gap between groups with 0 as its only bound;",
    ),
    (
        "analysis: {hypotheses: [{id: a, statement: b, metric: predictive_parity_difference, cells: {}, below: 1}]}",
        "analysis.hypotheses[0]: metric predictive_parity_difference can only be tested by permutation, with 0 as its",
    ),
    (
        "analysis: {hypotheses: [{id: a, statement: b, metric: accuracy_gap, cells: {}, by: group_size, below: 0}]}",
        "analysis.hypotheses[0]: by group_size needs metric accuracy or accuracy_loss, not accuracy_gap",
    ),
    (
        "analysis: {hypotheses: [{id: a, statement: b, metric: seconds_ratio, cells: {}, against: plain, above: 2}]}",
        "analysis.hypotheses[0]: metric seconds_ratio stands in `also` only: times are not the same twice",
    ),
    ("training:", "training: input should be a valid dictionary"),
    ("1: 2", "[1]: keys should be strings"),
]


@pytest.mark.parametrize("text, expected", REFUSALS, ids=[text for text, _ in REFUSALS])
def test_a_refusal_names_file_key_and_nearest_choice(refusal, text, expected):
    assert refusal(text).startswith(f"mine.yaml: {expected}")


@pytest.mark.parametrize("text, expected", REFUSALS[:-2], ids=[text for text, _ in REFUSALS[:-2]])
def test_an_override_has_the_same_checks(refusal, text, expected):
    """Each refusal again, as --set SECTION=VALUE."""
    ((section, value),) = yaml.load(text, Loader=yaml.BaseLoader).items()
    override = f"{section}={text.partition(':')[2].strip()}"
    assert value  # else the text has another form and the override says nothing
    assert refusal("", override).startswith(f"--set {override}: {expected}")


@pytest.mark.parametrize(
    "text, problem",
    [
        ("training: {epochs: 2, epochs: 3}", "not valid YAML: key 'epochs' is there twice, line 1"),
        ("run: {jobs: 1}\ndata: {}\nrun: {jobs: 2}", "not valid YAML: key 'run' is there twice, line 3"),
        ("a: [", "not valid YAML: "),
        ("\tx: 1", "not valid YAML: "),
        ("? [a]\n: 3", "not valid YAML: "),
        ("results_dir: 2001-13-45", "not valid YAML: month must be in 1..12"),
        ("results_dir: !!int abc", "not valid YAML: invalid literal for int()"),
        ("x: !!python/object/apply:os.getcwd []", "not valid YAML: could not determine a constructor"),
        ("[" * 3000, "not valid YAML: "),
        ("- 1\n- 2", "expected a mapping of sections, got list"),
        ("[]", "expected a mapping of sections, got list"),
        ("false", "expected a mapping of sections, got bool"),
        ("just text", "expected a mapping of sections, got str"),
        ("<!DOCTYPE html><html><body>404</body></html>", "expected a mapping of sections, got str"),
    ],
)
def test_what_is_not_a_mapping_in_yaml_is_refused(refusal, text, problem):
    assert refusal(text).startswith(f"mine.yaml: {problem}")


@pytest.mark.parametrize(
    "override, problem",
    [
        ("training.epochs", "expected KEY=VALUE, such as training.epochs=2"),
        ("=3", "expected KEY=VALUE, such as training.epochs=2"),
        ("training.epochs=", "training.epochs: input should be a valid integer, got None"),
        ("training.epochs=[", "the value is not valid YAML: "),
        ("results_dir=2001-13-45", "the value is not valid YAML: month must be in 1..12"),
        ("training.epochs.x=3", "training.epochs: input should be a valid integer, got {'x': 3}"),
        ("training..epochs=3", "training.: unknown key; choose from epochs, "),
        ("results_dir.x=3", "results_dir is a value, not a section"),
    ],
)
def test_a_malformed_override_is_refused(refusal, override, problem):
    assert refusal("results_dir: here", override).startswith(f"--set {override}: {problem}")


def test_a_bad_file_is_blamed_before_the_override(refusal):
    assert refusal("training: {epochs: 0}", "training.epochs=1").startswith("mine.yaml: training.epochs: ")


def test_a_missing_file_a_folder_and_a_binary_file(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for path, problem in (
        (tmp_path / "none.yaml", "no such config file"),
        (tmp_path, "cannot be read: "),
        (tmp_path / "binary.yaml", "cannot be read: "),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert str(caught.value).startswith(f"{path}: {problem}")
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ widths, methods


def test_parse_width():
    assert [parse_width(width) for width in range(2, 9)] == [(bits, bits) for bits in range(2, 9)]
    assert {parse_width(f"W{w}A{a}") for w in range(2, 9) for a in range(2, 9)} == {
        (w, a) for w in range(2, 9) for a in range(2, 9)
    }
    for bad in (1, 9, 0, -4, True, False, 4.0, None, "", "8", "W4", "w4a8", "W1A8", "W4A9", "W4A8 ", "W44A8", "W4A8\n"):
        with pytest.raises(ValueError, match="expected 2 to 8 or a string such as W4A8"):
            parse_width(bad)


def test_an_entry_keeps_only_what_it_says():
    entry = MethodEntry(method="ptq_static", bit_widths=4, observer="mse", calibration_samples=64)
    assert (entry.bit_widths, entry.observer) == ([4], ["mse"])
    assert entry.options() == {"observer": ["mse"], "calibration_samples": 64}
    assert MethodEntry(method="PTQ_W4A8").options() == {}


@pytest.mark.parametrize("key", ["observer", "calibration_samples", "calibration_split"])
def test_a_dynamic_method_has_no_calibration_keys(key):
    value = {"observer": ["mse"], "calibration_samples": 8, "calibration_split": "train"}[key]
    for method in ("ptq_dynamic", "dynamic"):
        with pytest.raises(ValueError, match=f"{key} = .* does not apply to {method}"):
            MethodEntry(method=method, **{key: value})
    assert MethodEntry(method="ptq_static", **{key: value}).options() == {key: value}


def test_shorthands_have_the_widths_of_their_names():
    for name, (_, _, weight_bits, activation_bits) in SHORTHANDS.items():
        if name.startswith(("PTQ_INT", "QAT_INT")):
            assert (weight_bits, activation_bits) == (int(name[-1]), int(name[-1]))
        elif name.startswith("PTQ_W"):
            assert (weight_bits, activation_bits) == parse_width(name.removeprefix("PTQ_"))
        else:
            assert (weight_bits, activation_bits) == (None, None)


def test_suggest_gives_the_nearest_or_all():
    assert suggest("resnet5", ["resnet50", "vit"]) == " (did you mean resnet50?)"
    assert suggest("qqqq", ["a", 2]) == "; choose from a, 2"


# ------------------------------------------------------------------------------------------- per model, group attribute


def test_per_model_overrides_the_common_settings(tmp_path):
    text = "training: {epochs: 9, batch_size: 16, per_model: {resnet50: {epochs: 2, gradient_clip: 0.5}}}"
    training = load(tmp_path, text).training
    settings = training.for_model("resnet50")
    assert (settings.epochs, settings.gradient_clip, settings.batch_size) == (2, 0.5, 16)
    other = training.for_model("mobilenet_v2")
    assert (other.epochs, other.gradient_clip, other.batch_size) == (9, 1.0, 16)
    assert training.epochs == 9
    assert other.per_model == {} == settings.per_model  # the entries of other models determine nothing


def test_per_model_knows_only_keys_of_training():
    common = Config().training
    for key in TrainingOverrides.model_fields:
        assert hasattr(common, key)
        assert TrainingOverrides().model_dump()[key] is None


def test_group_attribute_is_the_first_sensitive_unless_named(tmp_path):
    synthetic = "{target: smile, sensitive: [gender, skin]}"
    text = f"data: {{dataset: [synthetic, fairface], synthetic: {synthetic}, fairface: {{target: age}}}}"
    config = load(tmp_path, text, "data.fairface.sensitive=[race, gender]")
    assert (config.group_attribute("synthetic"), config.group_attribute("fairface")) == ("gender", "race")
    config = load(tmp_path, text, "data.fairface.sensitive=[race, gender]", "analysis.attribute=gender")
    assert (config.group_attribute("synthetic"), config.group_attribute("fairface")) == ("gender", "gender")


def test_only_data_sets_in_use_have_to_fit(tmp_path, refusal):
    text = "data: {dataset: synthetic, fairface: {sensitive: [gender]}}"  # fairface's target
    assert load(tmp_path, text).data.fairface.sensitive == ["gender"]
    assert "data.fairface.sensitive" in refusal(text, "data.dataset=[synthetic, fairface]")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{method: qat, bias_correction: true}", "bias_correction = True does not apply to qat; it has observer"),
        ("{method: QAT_INT4, rounding: adaround}", "rounding = 'adaround' does not apply to QAT_INT4"),
        ("{method: QAT_INT4, bit_widths: 8}", "bit_widths does not apply to QAT_INT4, whose width is fixed"),
        ("{method: ptq_dynamic, rounding: adaround}", "does not apply to ptq_dynamic"),
        ("{method: mixed_precision, first_last_bits: 8}", "does not apply to mixed_precision"),
        ("{method: ptq_static, size_budget_bytes: 1000}", "size_budget_bytes = 1000 does not apply to ptq_static"),
        (
            "{method: ptq_static, reconstruction_iterations: 9}",
            "reconstruction_iterations does nothing with rounding near",
        ),
        ("{method: ptq_static, weight_observer: moving_average}", "weight_observer"),
        ("{method: mixed_precision, widths: [4, 9]}", "widths"),
        ("{method: mixed_precision, size_budget_bytes: 0}", "size_budget_bytes"),
        ("{method: qat, epochs: 0}", "epochs"),
        (
            "{method: qat, architectures: [resnet5]}",
            "[0].architectures: 'resnet5' is none of the models (did",
        ),
    ],
)
def test_combinations_that_make_no_sense_are_refused(refusal, entry, message):
    assert message in refusal(f"quantization: {{methods: [{entry}]}}")


def test_combinations_that_make_sense_are_not(tmp_path):
    entry = (
        "{method: ptq_static, equalize: true, bias_correction: true, rounding: adaround, reconstruction_unit: layer}"
    )
    config = load(tmp_path, f"quantization: {{methods: [{entry}]}}")
    assert config.quantization.settings(config.quantization.methods[0])["equalize"] is True
    # the section says adaround, so that an entry may say how
    methods = "[{method: ptq_static, reconstruction_iterations: 9}]"
    text = f"quantization: {{ptq_static: {{rounding: adaround}}, methods: {methods}}}"
    assert load(tmp_path, text).quantization.ptq_static.rounding == "adaround"


def test_schemes_that_a_backend_has_are_not(tmp_path):
    for quantization in (
        "{backend: [arm, x86], reduce_range: true}",
        "{backend: [x86, arm], ptq_static: {activation_scheme: affine}}",
        "{backend: [tensorrt, arm], ptq_static: {activation_scheme: symmetric}}",
        "{backend: tensorrt, methods: [{method: qat, activation_scheme: symmetric}]}",
    ):
        assert load(tmp_path, f"quantization: {quantization}") != Config()


def test_deployment_may_be_of_no_cell_or_of_any(tmp_path):
    deployment = load(tmp_path, 'deployment: {cells: [], export: ["*", "*:*", "*:*:*", "vit*:q?t:W[48]A8"]}').deployment
    assert deployment.cells == [] and len(deployment.export) == 4


def test_hypotheses_are_named_written_or_both(tmp_path):
    every = Config().analysis.hypotheses
    mine = "{id: mine, statement: s, metric: accuracy, cells: {bits: W4A8}, against: {method: qat}, above: 0}"
    assert load(tmp_path, f"analysis: {{hypotheses: [default, {mine}]}}").analysis.hypotheses[:-1] == every
    named = load(tmp_path, f"analysis: {{hypotheses: [{mine}, H5-int8]}}")
    assert [hypothesis.id for hypothesis in named.analysis.hypotheses] == ["mine", "H5-int8"]
    assert named.analysis.hypotheses[0].against.method == ["qat"]
    assert load(tmp_path, dump_config(named)) == named
    assert load(tmp_path, "analysis: {hypotheses: []}").analysis.hypotheses == []
