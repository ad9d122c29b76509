"""Resuming: from any iteration, over epochs, and what happens where an item of the state is left out or changed."""

import json
import random
import shutil

import pytest
import torch

from eepo_fast import checkpoint
from eepo_fast.checkpoint import folder as folders
from eepo_fast.checkpoint import state as states
from eepo_fast.policy.schedule import set_schedule
from eepo_fast.rewards import ArithmeticGrader
from eepo_fast.types import Grade, TrainerState, UserError

VARIANTS = {
    "gate open": (),
    "gate closed": ("eepo.alpha=1e-9",),
    "window of iterations": ("eepo.gate=iteration", "eepo.window=3", "eepo.alpha=2.5"),
    "cosine": ("optimizer.schedule=cosine", "optimizer.min_learning_rate=1e-5"),
    "aepo": ("aepo.enabled=true", "aepo.num_samples=8", "aepo.target_entropy=1.5"),
}


class NoisyGrader(ArithmeticGrader):
    """Rewards that draw from every global generator, as a user's own might."""

    def grade(self, problems, completions, *, seconds=None):
        import numpy as np

        draw = lambda: random.random() + np.random.rand() + torch.rand(()).item()  # noqa: E731
        return [Grade(float(len(c) % 2) + 0.01 * draw(), "ok", 0.0) for c in completions]


@pytest.fixture
def noisy(monkeypatch):
    monkeypatch.setattr("eepo_fast.run.build.make_grader", lambda task, settings: NoisyGrader())

    def seed():
        import numpy as np

        random.seed(5), np.random.seed(5), torch.manual_seed(5)

    return seed


def cut(run_dir, step, to):
    """A copy of a run as it was when checkpoint `step` was the newest."""
    target = run_dir.parents[1] / to / run_dir.name
    shutil.copytree(run_dir, target)
    folders.remove_newer(target, step)
    (target / "ended.json").unlink()
    return target


@pytest.mark.fault(23)
@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_anywhere_ends_in_the_same_bits(make_run, go, outcome, noisy, variant, times, figure):
    """Six iterations, four to an epoch; every resume point, the epoch's end among them."""
    noisy()
    config = make_run(*VARIANTS[variant])
    whole = outcome(go(config))
    assert len(whole[0]) == 6
    points = times((1, 4, 5) if variant != "gate open" else range(1, 6), range(1, 6))
    same = 0
    for step in points:
        again = make_run(*VARIANTS[variant], root=f"from{step}")
        cut(config.run_dir, step, f"from{step}")
        same += outcome(go(again, resume=True)) == whole
        ending = json.loads((again.run_dir / "ended.json").read_text())
        assert (ending["reason"], ending["step"], ending["total"]) == ("finished", 6, 6)
    figure("resume points with bitwise equal losses and final hash", same, len(points))
    assert same == len(points)


LEFT_OUT = {
    "weights": lambda policy, state: policy.model.get_input_embeddings().weight.data.mul_(1.0001),
    "optimizer": lambda policy, state: policy.optimizer.state.clear(),
    "schedule": lambda policy, state: set_schedule(policy.scheduler, 0),
    "step": lambda policy, state: setattr(state, "step", state.step - 1),
    "policy_version": lambda policy, state: setattr(state, "policy_version", 0),
    "entropy_window": lambda policy, state: state.entropy_window.clear(),
    "entropy": lambda policy, state: setattr(state, "entropy", 0.0),
    "python": lambda policy, state: random.seed(0),
    "numpy": lambda policy, state: __import__("numpy").random.seed(0),
    "torch": lambda policy, state: torch.manual_seed(0),
}


@pytest.mark.parametrize("item", LEFT_OUT)
def test_every_item_of_the_state_is_needed(make_run, go, outcome, noisy, monkeypatch, item, figure):
    """The negative controls of the test above: without the item the end differs, or the run is refused."""
    settings = (*VARIANTS["window of iterations"], *VARIANTS["aepo"])
    if item == "entropy_window":
        settings = (*settings, "optimizer.learning_rate=0")  # so that alpha moves no later entropy
        pilot = go(make_run(*settings, root="pilot")) / "checkpoints" / "step_000004"
        window = json.loads((pilot / "state.json").read_text())["entropy_window"]
        # between what iteration 4 has alone and what it has with those before
        settings = (*settings, f"eepo.alpha={(sum(window) / 3 + window[-1]) / 2}")
    noisy()
    config = make_run(*settings)
    whole = outcome(go(config))
    cut(config.run_dir, 3, "cut")
    original = checkpoint.load_checkpoint

    def without(folder, policy, prompts):
        state = original(folder, policy, prompts)
        LEFT_OUT[item](policy, state)
        return state

    monkeypatch.setattr("eepo_fast.run.build.load_checkpoint", without)
    try:
        caught = outcome(go(make_run(*settings, root="cut"), resume=True)) != whole
    except (UserError, AssertionError):
        caught = True
    figure("state items left out one by one, caught", int(caught), 1)
    assert caught


@pytest.mark.fault(22)
@pytest.mark.parametrize("overrides", [("train.micro_batch_tokens=64",), ("train.packing=false",)])
def test_another_micro_batch_goes_on_with_the_same_samples(make_run, go, overrides):
    config = make_run("log.rollouts=true")
    whole = go(config)
    sampled = {p.name: [json.loads(line)["prompt_id"] for line in p.read_text().splitlines()]
               for p in (whole / "rollouts").iterdir()}  # fmt: skip
    cut(whole, 3, "cut")
    again = go(make_run("log.rollouts=true", *overrides, root="cut"), resume=True)
    assert sampled == {p.name: [json.loads(line)["prompt_id"] for line in p.read_text().splitlines()]
                       for p in (again / "rollouts").iterdir()}  # fmt: skip
    epoch = [name for step in (1, 2, 3, 4) for name in sampled[f"step_{step:06d}.jsonl"]]
    assert sorted(set(epoch)) == sorted(epoch[::4]) and len(set(epoch)) == 16, "each prompt once an epoch"


def reversed_problems(original):
    def find(*args, **options):
        found = original(*args, **options)
        return found._replace(problems=found.problems[::-1])

    return find


@pytest.mark.parametrize(
    ("what", "words"),
    [("config", r"eepo\.alpha"), ("data", "the data of arithmetic"), ("model", "the model of"),
     ("tokenizer", "the tokenizer of")],
)  # fmt: skip
def test_other_inputs_are_refused_by_name(make_run, go, model_folder, monkeypatch, what, words):
    config = make_run("train.iterations=2")
    go(config)
    cut(config.run_dir, 1, "cut")
    overrides = ["train.iterations=2"]
    if what == "config":
        overrides.append("eepo.alpha=0.3")
    elif what == "data":
        from eepo_fast.run import build

        monkeypatch.setattr(build, "find_problems", reversed_problems(build.find_problems))
    elif what == "model":
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(model_folder)
        model.model.norm.weight.data[0] += 1e-3
        model.save_pretrained(model_folder)
    else:
        path = model_folder / "tokenizer.json"
        path.write_text(path.read_text().replace('"+": ', '"PLUS": '))
    with pytest.raises(UserError, match=f"--resume.*{words}"):
        go(make_run(*overrides, root="cut"), resume=True)


def test_without_the_fingerprint_other_data_would_pass(make_run, go, monkeypatch):
    """Negative control."""
    from eepo_fast.run import build, folder

    config = make_run("train.iterations=2")
    go(config)
    cut(config.run_dir, 1, "cut")
    monkeypatch.setattr(build, "find_problems", reversed_problems(build.find_problems))
    monkeypatch.setattr(folder, "changed_inputs", lambda *args: [])
    go(make_run("train.iterations=2", root="cut"), resume=True)


def test_a_finished_run_does_no_step_and_says_so(make_run, go, outcome):
    config = make_run("train.iterations=2")
    before = outcome(go(config))
    go(config, resume=True)
    assert outcome(config.run_dir) == before
    longer = make_run("train.iterations=3")
    assert len(outcome(go(longer, resume=True))[0]) == 3


@pytest.mark.fault(26)
def test_a_key_that_nobody_reads_is_refused(make_run):
    from eepo_fast.config import load_config

    with pytest.raises(UserError, match=r"eepo\.alhpa.*alpha"):
        make_run("eepo.alhpa=0.3")
    assert load_config([], ["model.path=x", "data.train=y", "eepo.alpha=0.4"]).eepo.alpha == 0.4


def test_the_state_is_what_the_trainer_has():
    """A field that a checkpoint would not bring back."""
    kept = {"step", "policy_version", "entropy_window", "entropy", "bad_updates", "forget_steps", "cursor", "groups"}
    kept |= {"missing"}
    assert set(TrainerState.__dataclass_fields__) == kept
    assert {"python", "numpy", "torch", "cuda"} == set(states.random_state())


@pytest.fixture
def rows_file(tmp_path):
    def write(path, answer="1+2+3"):
        path.parent.mkdir(exist_ok=True)
        rows = [{"id": str(i), "problem": "1,2,3=6:", "answer": answer} for i in range(16)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"data.train={path}"

    return write


@pytest.mark.parametrize("what", ["copies", "links", "a renamed folder"])
def test_the_same_files_elsewhere_are_the_same(make_run, go, model_folder, rows_file, tmp_path, monkeypatch, what):
    train, length = rows_file(tmp_path / "d.jsonl"), ("train.iterations=2", "evaluation.every=1")
    held = rows_file(tmp_path / "held.jsonl").replace("data.train", "evaluation.data.held")
    run_dir = go(make_run(train, held, "train.iterations=1", "evaluation.every=1"))
    other = tmp_path / "other"
    other.mkdir()
    if what == "copies":
        shutil.copytree(model_folder, other / "model"), shutil.copy(tmp_path / "d.jsonl", other / "d.jsonl")
        shutil.copy(tmp_path / "held.jsonl", other)
    else:
        (other / "model").symlink_to(model_folder), (other / "d.jsonl").symlink_to(tmp_path / "d.jsonl")
        (other / "held.jsonl").symlink_to(tmp_path / "held.jsonl")
    name = "tiny"
    if what == "a renamed folder":
        name = "renamed"
        run_dir.rename(run_dir.with_name(name))
    monkeypatch.chdir(other)
    spelt = ["data.train=./d.jsonl", "model.path=../other/model", "evaluation.data.held=held.jsonl", f"run.name={name}"]
    again = go(make_run(*spelt, *length), resume=True)
    assert checkpoint.newest_valid(again)[0].name == "step_000002"
    assert len((again / "metrics.jsonl").read_text().splitlines()) == 2
    assert go(make_run(train, held, f"run.name={name}", *length), resume=True) == again, "it is finished"


def test_other_files_elsewhere_are_refused(make_run, go, model_folder, rows_file, tmp_path):
    """Negative control; of a run that is finished, too, and without the digests of an old checkpoint."""
    train = rows_file(tmp_path / "d.jsonl")
    run_dir = go(make_run(train, "train.iterations=1"))
    other = rows_file(tmp_path / "other" / "d.jsonl", "1*2*3")
    for length in ("train.iterations=1", "train.iterations=2"):
        with pytest.raises(UserError, match=r"--resume: the data of .*other/d.jsonl is not what the run began with"):
            go(make_run(other, length), resume=True)
    folder = checkpoint.newest_valid(run_dir)[0]
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"fingerprint": {}}))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"state.json": folders.sha256(folder / "state.json")}))
    with pytest.raises(UserError, match=r"the config differs from the run's own in data\.train"):
        go(make_run(other, "train.iterations=2"), resume=True)
