"""Config: strict, with one line for every mistake."""

import re
from pathlib import Path

import pytest
import yaml

from eepo_fast.config import Config, dump_config, is_file, load_config, make_config
from eepo_fast.config.files import merge, read_override
from eepo_fast.config.schema import READ_WITH, RENAMED, without_unread
from eepo_fast.types import UserError

ROOT = Path(__file__).parents[3]
REQUIRED = ["model.path=m", "data.train=d.jsonl"]


def complaint(*overrides, files=()):
    with pytest.raises(UserError) as error:
        load_config(list(files), [*REQUIRED, *overrides])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_later_files_and_overrides_win(tmp_path):
    (tmp_path / "a.yaml").write_text("eepo: {alpha: 0.5, window: 2}\nrun: {seed: 1}\n")
    (tmp_path / "b.yaml").write_text("eepo: {alpha: 0.4}\n")
    config = load_config([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")], [*REQUIRED, "run.seed=7"])
    assert (config.eepo.alpha, config.eepo.window, config.run.seed) == (0.4, 2, 7)


def test_exponents_without_a_point_are_numbers():
    assert load_config([], [*REQUIRED, "optimizer.learning_rate=5e-7"]).optimizer.learning_rate == 5e-7
    assert load_config([], [*REQUIRED, "train.iterations=1e2"]).train.iterations == 100


def test_dump_reads_back_as_the_same_config(tmp_path):
    config = load_config([], [*REQUIRED, "eepo.alpha=0.123"])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config([str(tmp_path / "c.yaml")], []) == config


@pytest.mark.parametrize(
    "override, words",
    [
        ("eepo.alfa=1", "eepo.alfa: unknown; did you mean eepo.alpha?"),
        ("rolout.group_size=4", "rolout: unknown; did you mean rollout?"),
        ("rollout.kl_coef=1", "did you mean grpo.kl_coef?"),
        ("rollout.group_size=7", "expected an even number, found 7"),
        ("rollout.top_p=0.9", "biases the probability ratio"),
        ("rollout.engine=x", "expected 'hf' or 'vllm'"),
        ("train.iterations=abc", "expected a valid integer, found 'abc'"),
        ("train.iterations=2.5", "expected a valid integer, found 2.5"),
        ("train.prompts_per_update=3", "expected a divisor"),
        ("run.name=../x", "expected a folder name"),
        ("eepo.learning_rate=.nan", "finite"),
        ("nonsense", "expected key.sub=value"),
        ("data.columns={questoin: x}", "data.columns.questoin: unknown"),
        ("run.seed=2024-13-45", "not valid YAML"),
        ("optimizer.schedule=exponential", "expected 'constant', 'linear' or 'cosine', found 'exponential'"),
        ("data.max_number=1000000", "less than or equal to 100"),
        ("rollout.group_size=1e30", "less than or equal to 4096"),
        (f"run.seed={'9' * 5000}", "not valid YAML"),
    ],
)
def test_mistakes_are_named(override, words):
    assert words in complaint(override)


@pytest.mark.parametrize(
    "overrides", [["rollout.temperature=0.001"], ["aepo.temperature_low=0.001", "aepo.enabled=true"]]
)
def test_temperatures_that_vllm_does_not_have(overrides):
    key = overrides[0].partition("=")[0]
    assert f"{key}: expected at least 0.01 with rollout.engine=vllm" in complaint("rollout.engine=vllm", *overrides)


@pytest.mark.parametrize(
    "overrides, key, wanted, found",
    [
        (["rollout.sleep=false"], "rollout.sleep", "rollout.engine=vllm", "hf"),
        (["rollout.gpu_memory_utilization=0.5"], "rollout.gpu_memory_utilization", "rollout.engine=vllm", "hf"),
        (["train.zero_stage=2", "train.engine=torch"], "train.zero_stage", "train.engine=deepspeed", "torch"),
        (["eepo.enabled=false", "eepo.alpha=0.2"], "eepo.alpha", "eepo.enabled=true", "false"),
        (["aepo.coef=0.3"], "aepo.coef", "aepo.enabled=true", "false"),
        (["optimizer.min_learning_rate=1e-7"], "optimizer.min_learning_rate", "optimizer.schedule=linear", "constant"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(tmp_path, overrides, key, wanted, found):
    """On the command line, also at its default, and in a file beside the choice."""
    line = f"config key {key}: expected {wanted} with it, found {found}; remove the key, or set {wanted}"
    assert complaint(*overrides) == line
    values = {}
    for text in overrides:
        values = merge(values, read_override(text))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    section, name = key.split(".")
    if values[section][name] == getattr(Config.model_fields[section].default, name):  # as older versions wrote them
        assert load_config([str(tmp_path / "a.yaml")], REQUIRED)
        return
    assert complaint(files=[str(tmp_path / "a.yaml")]) == line
    section, _, chooser = wanted.partition("=")[0].partition(".")
    if chooser in values[section]:  # a later choice does not mend a file that is wrong in itself
        assert complaint(wanted, files=[str(tmp_path / "a.yaml")]) == line
    else:
        assert load_config([str(tmp_path / "a.yaml")], [*REQUIRED, wanted])


def stack(tmp_path, *texts, overrides=()):
    """(config, what was said) of files with these texts."""
    said, files = [], []
    for i, text in enumerate(texts):
        files.append(str(tmp_path / f"{i}.yaml"))
        (tmp_path / f"{i}.yaml").write_text(text)
    return load_config(files, [*REQUIRED, *overrides], said.append), said


def test_a_later_choice_leaves_out_the_keys_of_another(tmp_path):
    base = "rollout: {engine: vllm, sleep: true, tensor_parallel: 2}\ntrain: {engine: deepspeed, zero_stage: 3}\n"
    line = "rollout.engine=hf: rollout.sleep, rollout.tensor_parallel of an earlier file left out"
    config, said = stack(tmp_path, base, overrides=["rollout.engine=hf"])
    assert said == [line] and config.train.zero_stage == 3
    assert (config.rollout.sleep, config.rollout.tensor_parallel) == (False, 1)
    config, said = stack(tmp_path, base, "rollout: {engine: hf}\ntrain: {engine: torch}\n")
    assert said == [line, "train.engine=torch: train.zero_stage of an earlier file left out"]
    assert config.train.zero_stage == 2 and config.train.engine == "torch"
    (tmp_path / "own.yaml").write_text(dump_config(config))
    assert load_config([str(tmp_path / "own.yaml")], []) == config
    config, said = stack(tmp_path, base, "rollout: {engine: hf}", "rollout: {engine: vllm}")
    assert config.rollout.sleep and config.rollout.tensor_parallel == 2 and said == []
    with pytest.raises(UserError, match=r"rollout.sleep: expected rollout.engine=vllm with it, found hf"):
        stack(tmp_path, base, "rollout: {engine: hf}", "rollout: {sleep: true}")


def test_the_keys_of_a_method_go_with_it(tmp_path):
    base, off = "eepo: {learning_rate: 0.02}\n", "eepo: {enabled: false}\n"
    config, said = stack(tmp_path, base, off)
    assert not config.eepo.enabled and said == []
    assert config.model_dump()["eepo"] == {"enabled": False} and config.model_dump()["aepo"] == {"enabled": False}
    assert stack(tmp_path, base, off, "eepo: {enabled: true}\n")[0].eepo.learning_rate == 0.02
    with pytest.raises(UserError, match=r"eepo.alpha: expected eepo.enabled=true with it, found false"):
        stack(tmp_path, base, off, overrides=["eepo.alpha=0.2"])


def test_an_older_version_s_config_is_read_without_unread_keys(tmp_path):
    config = load_config([], REQUIRED)
    written = {name: section.model_dump() for name, section in config}  # every key
    assert make_config(without_unread(written)) == config == stack(tmp_path, yaml.safe_dump(written))[0]
    written["rollout"]["sleep"] = True
    with pytest.raises(UserError, match=r"rollout\.sleep: expected rollout\.engine=vllm"):
        stack(tmp_path, yaml.safe_dump(written))


def test_what_is_left_out_has_to_be_right_all_the_same(tmp_path):
    with pytest.raises(UserError, match=r"eepo.alpha: expected a valid number, found 'banana'"):
        stack(tmp_path, "eepo: {alpha: banana}\n", "eepo: {enabled: false}\n")
    with pytest.raises(UserError, match=r"rollout.engine: expected 'hf' or 'vllm', found 'vlm'"):
        stack(tmp_path, "rollout: {engine: vlm, sleep: true}\n")


def test_the_old_name_of_a_key_names_the_new(monkeypatch):
    monkeypatch.setitem(RENAMED, "eepo.eta", "eepo.learning_rate")
    assert complaint("eepo.eta=1") == "config key eepo.eta: is eepo.learning_rate now, found the old name; rename it"
    known = {f"{name}.{key}" for name, field in Config.model_fields.items() for key in field.annotation.model_fields}
    for section, chooser, _, keys in READ_WITH:
        assert {f"{section}.{key}" for key in (chooser, *keys)} <= known


def test_a_floor_above_the_learning_rate_is_refused():
    overrides = ("optimizer.schedule=cosine", "optimizer.learning_rate=1e-6")
    found = complaint(*overrides, "optimizer.min_learning_rate=2e-6")
    assert "optimizer.min_learning_rate: expected at most optimizer.learning_rate (1e-06)" in found
    assert "found 2e-06" in found and "finite" in complaint(*overrides, "optimizer.min_learning_rate=.nan")
    assert "greater than or equal to 0" in complaint(*overrides, "optimizer.min_learning_rate=-1e-9")
    config = load_config([], [*REQUIRED, *overrides, "optimizer.min_learning_rate=1e-6"])
    assert config.optimizer.min_learning_rate == config.optimizer.learning_rate


def test_odd_groups_are_fine_without_eepo():
    assert load_config([], [*REQUIRED, "rollout.group_size=7", "eepo.enabled=false"]).rollout.group_size == 7


def test_bad_files_are_named(tmp_path):
    bad = tmp_path / "bad.yaml"
    assert "cannot be read" in complaint(files=[str(tmp_path / "none.yaml")])
    bad.write_text("run:\n  seed: [1\n")
    assert "bad.yaml, line" in complaint(files=[str(bad)])
    bad.write_text("run: {seed: 1}\nrun: {seed: 2}\n")
    assert "given twice" in complaint(files=[str(bad)])
    bad.write_bytes(b"run: {name: \xff}\n")
    assert "not UTF-8" in complaint(files=[str(bad)])
    bad.write_text("just text\n")
    assert "expected sections" in complaint(files=[str(bad)])


def test_a_missing_model_is_named():
    with pytest.raises(UserError, match=r"model\.path: missing"):
        make_config({"data": {"train": "x"}})


def test_every_key_is_read_somewhere():
    """A key that nothing reads is a promise the program does not keep."""
    sources = [p.read_text() for p in (ROOT / "eepo_fast").rglob("*.py") if p.name != "schema.py"]
    own = re.split(r"class Config\(", (ROOT / "eepo_fast/config/schema.py").read_text())[1]
    text = "\n".join([*sources, own])
    for section, field in Config.model_fields.items():
        for key in field.annotation.model_fields:
            reader = rf"\b(?:{section}|config|settings|self)\.{key}\b"
            assert re.search(reader, text), f"{section}.{key} is read nowhere"


def test_config_stays_small():
    assert sum(len(f.annotation.model_fields) for f in Config.model_fields.values()) <= 130


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid(path, tmp_path):
    """Alone and under each method's overlay; and what a run then keeps is read as it was written."""
    load_config([str(path)], [])
    for overlay in sorted((ROOT / "configs/methods").glob("*.yaml")):
        said = []
        text = overlay.read_text().replace("\n# ", " ")
        one_device = ["train.engine=torch"] if "Needs train.engine=torch" in text else []
        if "Needs more updates than one" in text:
            one_device += ["train.prompts_per_iteration=8", "train.prompts_per_update=4"]
        temperature = ["rollout.temperature=1"] if "aepo" in overlay.stem else []
        config = load_config([str(path), str(overlay)], [*one_device, *temperature], said.append)
        assert not said or one_device or overlay.stem == "eepo_hotter", "that forgets nothing"
        (tmp_path / "own.yaml").write_text(dump_config(config))
        assert load_config([str(tmp_path / "own.yaml")], []) == config


@pytest.mark.parametrize("name", ["qwen2.5-3b", "llama-3.2-3b-instruct", "qwen3-8b-base"])
def test_paper_settings(name):
    config = load_config([str(ROOT / f"configs/{name}.yaml")], [])
    assert (config.eepo.alpha, config.eepo.window, config.eepo.learning_rate) == (0.3, 3, 3e-3)
    assert (config.train.prompts_per_iteration, config.train.prompts_per_update, config.train.epochs) == (128, 64, 2)
    assert (config.rollout.group_size, config.rollout.temperature) == (8, 1.0)
    assert (config.grpo.kl_coef, config.grpo.entropy_coef, config.grpo.clip_low) == (1e-4, 1e-5, 0.2)
    assert config.optimizer.learning_rate == 5e-7
    assert config.rollout.max_new_tokens == (4096 if name == "qwen2.5-3b" else 6144)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.answer_marker=####", "####"),
        ("data.answer_marker=#", "#"),
        ("data.answer_marker='####'", "####"),
        ('data.answer_marker="a\\tb"', "a\tb"),
        ("data.answer_marker='it''s'", "it's"),
        ("data.answer_marker='a' and 'b'", "'a' and 'b'"),
        ("data.answer_marker=[x]: {y", "[x]: {y"),
        ("data.answer_marker= x ", " x "),
        ("data.answer_marker=", ""),
        ("run.name=007", "007"),
        ("run.name=1e3", "1e3"),
        ("run.name=2024-01-01", "2024-01-01"),
        ("run.name=2024-13-45", "2024-13-45"),
        ("model.path=on", "on"),
        ("model.path=a b: c #d", "a b: c #d"),
        ("data.columns.problem=null", "null"),
        ("data.files=null", None),
        ("data.files=a #1.jsonl", "a #1.jsonl"),
        ("evaluation.data.t=007", "007"),
        ("eepo.step=kl", "kl"),
        ("run.seed=007", 7),
        ("train.iterations=null", None),
        ("optimizer.betas=[0.9, 0.99]", [0.9, 0.99]),
        ("data.chat_template_kwargs.thinking=no", False),
        ("model.dimensions.hidden_size=8", 8),
    ],
)
def test_a_text_is_what_was_typed_all_else_yaml(override, value):
    found = read_override(override)
    for part in override.partition("=")[0].split("."):
        found = found[part]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "override",
    ["run.seed=!!int ''", "run.seed=!!timestamp x", "run.seed=!!float ''", "run.seed=!!bool x", "run.seed={[a]: b}",
     "run.seed=&a {b: *a}", "model.path=a\0b", "model.path=\udcff", "run=&a [*a]", "run.seed=" + "[" * 3000,
     "run.seed=@"],
)  # fmt: skip
def test_no_override_is_more_than_a_mistake(override):
    assert complaint(override)


def test_a_file_is_one_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b.yaml", "train.epochs=2", "a #1: x.yaml"):
        (tmp_path / name).write_text("run: {seed: 3}")
        assert is_file(name)
        assert load_config([name], ["model.path=m", "data.train=d=1.jsonl"]).run.seed == 3
    assert is_file("nowhere.yaml") and not is_file("train.epochs=3") and not is_file("nowhere=.yaml")
