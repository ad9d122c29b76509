"""Saving: killed, short of disk, corrupted, crafted, and while training goes on."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from eepo_fast import checkpoint
from eepo_fast.checkpoint import folder as folders
from eepo_fast.checkpoint import writer as writers
from eepo_fast.checkpoint.command import export_checkpoint
from eepo_fast.types import UserError


@pytest.fixture
def saved(make_trainer, save_checkpoint, tmp_path):
    """Two checkpoints of a run whose folder is tmp_path / "run"."""
    trainer = make_trainer()
    run_dir = tmp_path / "run"
    for _ in range(2):
        trainer.iteration()
        save_checkpoint(run_dir, trainer)
    return run_dir


def killed_while_saving(save, seconds):
    """Fork, save for ever, and kill."""
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                save()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def is_resumable(run_dir):
    """Is the newest checkpoint whole, and all of it of one step? Weights are filled with their step."""
    folder, _ = checkpoint.newest_valid(run_dir)
    state = checkpoint.read_state(folder)
    values = {float(v) for t in load_file(folder / "model" / "model.safetensors").values() for v in t.unique()}
    moments = load_file(folder / "optimizer.safetensors")
    return values == {float(state["step"])} and len(moments) > 0 and folder.name == f"step_{state['step']:06d}"


@pytest.fixture
def kills(make_trainer, save_checkpoint, tmp_path):
    """How many of n runs, killed at random moments of saving, can go on."""

    def count(n):
        trainer = make_trainer()
        trainer.iteration()
        run_dir, generator = tmp_path / "run", random.Random(3)

        def save():
            trainer.state.step = 1 + max(map(folders.step_of, folders.folders(run_dir)), default=0)
            with torch.no_grad():
                for weight in trainer.policy.model.parameters():
                    weight.fill_(trainer.state.step)
            save_checkpoint(run_dir, trainer)

        save()
        resumable = 0
        for _ in range(n):
            killed_while_saving(save, generator.uniform(0.01, 0.25))
            try:
                resumable += is_resumable(run_dir)
            except Exception:
                shutil.rmtree(folders.checkpoint_root(run_dir))
                save()
            folders.clean(run_dir)
        saved = folders.step_of(folders.folders(run_dir)[-1])
        assert saved > n // 12 or resumable < n, "the children did save"
        return resumable

    return count


@pytest.mark.fault(1)
def test_a_kill_at_any_moment_of_saving_leaves_a_checkpoint(kills, times, figure):
    n = times(15, 100)
    found = kills(n)
    figure("resumable after kill -9 at random moments of saving", found, n)
    assert found == n


def test_without_temporary_folder_and_manifest_kills_lose_runs(kills, monkeypatch):
    """Negative control: written in place, the newest folder taken."""
    monkeypatch.setattr(writers, "temporary_of", lambda final: final)

    def commit(final, digests):
        (final / folders.MANIFEST).write_text(json.dumps(digests))

    monkeypatch.setattr(writers, "commit", commit)
    monkeypatch.setattr(folders, "verify", lambda folder: None)
    assert kills(15) < 15


@pytest.mark.fault(4)
def test_a_full_disk_leaves_the_old_checkpoint_and_is_said(make_run, go, monkeypatch):
    """While it trains: said, counted, and training goes on. At the end of the run: an error."""
    real, full = writers.save_file, {"from": 3}

    def save_file(tensors, path, **options):
        if int(re.search(r"step_(\d+)", str(path)).group(1)) >= full["from"]:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, **options)

    monkeypatch.setattr(writers, "save_file", save_file)
    config = make_run("train.iterations=4")
    with pytest.raises(UserError, match=r"step_000004 could not be written.*No space left on device.*make room"):
        go(config)
    found, complaints = checkpoint.newest_valid(config.run_dir)
    assert found.name == "step_000002" and not complaints
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[3])["checkpoint/failures"] == 1
    assert json.loads((config.run_dir / "ended.json").read_text())["reason"] == "error"
    assert not list(folders.checkpoint_root(config.run_dir).glob(".*")), "what was half written is gone"
    full["from"] = 99
    go(config, resume=True)
    assert checkpoint.newest_valid(config.run_dir)[0].name == "step_000004"


def flip(path, generator):
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def truncate(path, generator):
    content = path.read_bytes()
    path.write_bytes(content[: generator.randrange(len(content))])


def swap(path, generator):
    """With the same file of the other checkpoint."""
    other = path.parents[0 if path.parent.name.startswith("step_") else 1]
    twin = next(p for p in other.parent.iterdir() if p.name != other.name) / path.relative_to(other)
    content = twin.read_bytes()
    if content == path.read_bytes():  # of the same content in both: with another file of its own
        content = (other / "state.json").read_bytes() + b" "
    path.write_bytes(content)


CORRUPTIONS = {"flip": flip, "truncate": truncate, "delete": lambda path, generator: path.unlink(), "swap": swap}


def corrupted(run_dir, copy, kind, generator):
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run_dir, copy)
    newest = folders.folders(copy)[-1]
    CORRUPTIONS[kind](generator.choice(folders.files(newest)), generator)
    return newest


@pytest.mark.fault(5)
@pytest.mark.fault(6)
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_are_named_and_the_one_before_is_used(saved, tmp_path, kind, times, figure):
    generator, refused, n = random.Random(kind), 0, times(12, 50)
    for _ in range(n):
        newest = corrupted(saved, tmp_path / "copy", kind, generator)
        found, complaints = checkpoint.newest_valid(tmp_path / "copy")
        refused += found != newest and found.name == "step_000001" and str(newest) in complaints[0]
    figure("corruptions (flip, truncate, delete, swap) refused", refused, n)
    assert refused == n


def test_without_the_checksums_flips_would_load(saved, tmp_path, monkeypatch, make_policy):
    """Negative control: safetensors loads most of them."""
    generator, loaded = random.Random(1), 0
    monkeypatch.setattr(folders, "sha256", lambda path: json.loads((path.parents[
        0 if path.parent.name.startswith("step_") else 1] / folders.MANIFEST).read_text()).get(
        "model/" + path.name if path.parent.name == "model" else path.name))  # fmt: skip
    for _ in range(12):
        newest = corrupted(saved, tmp_path / "copy", "flip", generator)
        try:
            loaded += checkpoint.newest_valid(tmp_path / "copy")[0] == newest
        except (UserError, ValueError, KeyError):
            continue
    assert loaded > 6


def test_folders_that_change_places_are_refused(saved):
    first, second = folders.folders(saved)
    first.rename(saved / "x")
    second.rename(first)
    (saved / "x").rename(second)
    assert "iteration 2" in checkpoint.verify(first) and "iteration 1" in checkpoint.verify(second)


def test_training_on_while_saving_changes_nothing_written(make_trainer, save_checkpoint, tmp_path, monkeypatch):
    trainer = make_trainer()
    trainer.iteration()
    config = trainer.config.model_copy(
        update={"run": trainer.config.run.model_copy(update={"root": str(tmp_path), "name": "run"})}
    )
    writer = checkpoint.CheckpointWriter(config, trainer.policy, trainer.tokenizer, {}, 9)
    write, may_write = writers.CheckpointWriter._write_files, threading.Event()
    monkeypatch.setattr(
        writers.CheckpointWriter, "_write_files", lambda self, *args: may_write.wait(60) and write(self, *args)
    )
    expected = {name: w.clone() for name, w in trainer.policy.named_weights().items()}
    writer.start(trainer.state)
    trainer.iteration()
    assert writer.outcome is None, "it went on meanwhile"
    assert checkpoint.newest_valid(tmp_path / "run")[0] is None, "not a checkpoint before all of it is on disk"
    may_write.set()
    writer.finish()
    folder = checkpoint.newest_valid(tmp_path / "run")[0]
    saved = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], w) for name, w in expected.items())
    assert not all(torch.equal(saved[name], w) for name, w in trainer.policy.named_weights().items())
    assert checkpoint.read_state(folder)["step"] == 1


def test_the_best_and_the_last_are_kept(make_run, go):
    config = make_run("checkpoint.keep=1", "checkpoint.best=eval/held/pass@1", "evaluation.every=1",
                      "evaluation.data.held=arithmetic:3:9:8", "evaluation.k=[1,2]")  # fmt: skip
    go(config)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    scores = [line["eval/held/pass@1"] for line in lines]
    kept = [folders.step_of(f) for f in folders.folders(config.run_dir)]
    assert kept == sorted({1 + scores.index(max(scores)), 6})
    with pytest.raises(UserError, match=r"checkpoint\.best: expected eval/held/greedy, found 'reward/mean'"):
        make_run("checkpoint.best=reward/mean", "evaluation.every=1", "evaluation.data.held=arithmetic:3:9:8")


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "ran"


def crafted(folder, kind, canary):
    """A checkpoint with a manifest that holds, made to run code, or to reach outside of itself."""
    code = f"open({str(canary)!r}, 'w').write('x')\n"
    model = folder / "model"
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "evil.py").write_text(code + "class Evil: pass\n")
    if kind == "config auto_map":
        config |= {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    elif kind == "unknown model_type":
        config |= {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    elif kind == "tokenizer auto_map":
        tokenizer |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    elif kind == "chat template":
        tokenizer |= {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}{% include '/etc/passwd' %}"}
    elif kind in ("pickle weights", "pickle beside", "pickle optimizer", "pickle random state"):
        pickle_code = f"import os\nclass P:\n def __reduce__(self):\n  return (exec, ({code!r},))\n"
        scope = {}
        exec(pickle_code, scope)  # noqa: S102
        targets = {"pickle weights": model / "pytorch_model.bin", "pickle beside": model / "training_args.bin",
                  "pickle optimizer": folder / "optimizer.pt", "pickle random state": folder / "rng.json"}  # fmt: skip
        target = targets[kind]
        torch.save(scope["P"](), target)
        if kind == "pickle weights":
            (model / "model.safetensors").unlink()
        if kind == "pickle optimizer":
            (folder / "optimizer.safetensors").unlink()
    elif kind == "yaml":
        (folder / "config.yaml").write_text(f"run: !!python/object/apply:os.system ['touch {canary}']\n")
    elif kind == "link":
        (model / "model.safetensors").rename(canary.with_name("outside.safetensors"))
        (model / "model.safetensors").symlink_to(canary.with_name("outside.safetensors"))
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    manifest = {str(p.relative_to(folder)): folders.sha256(p) for p in folders.files(folder)}
    manifest.pop(folders.MANIFEST)
    (folder / folders.MANIFEST).write_text(json.dumps(manifest))


CRAFTED = ("config auto_map", "unknown model_type", "tokenizer auto_map", "chat template", "pickle weights",
           "pickle beside", "pickle optimizer", "pickle random state", "yaml", "link")  # fmt: skip


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_crafted_checkpoint_runs_nothing(make_run, go, tmp_path, canary, kind, capsys, figure):
    from eepo_fast.cli import main

    config = make_run("train.iterations=2")
    go(config)
    crafted(folders.folders(config.run_dir)[-1], kind, canary)
    folders.folders(config.run_dir)[0].rename(tmp_path / "older")
    for attempt in (
        ["checkpoint", "list", str(config.run_dir)],
        ["checkpoint", "verify", str(config.run_dir)],
        ["checkpoint", "export", str(config.run_dir), "--out", str(tmp_path / "out")],
        ["eval", "--model", str(config.run_dir), "--data", "t=arithmetic:3:9:4", "--out", str(tmp_path / "eval")],
    ):
        try:
            code = main(attempt)
        except (SystemExit, Exception):
            code = "raised"
        assert not canary.exists(), (attempt, code)
    with contextlib.suppress(Exception):
        go(make_run("train.iterations=3"), resume=True)
    figure("crafted checkpoints that ran code", int(canary.exists()), 1)
    assert not canary.exists()
    if kind == "link":
        assert "link" in capsys.readouterr().out


def test_the_same_pickle_does_run_where_it_is_loaded(canary):
    """Negative control: the payload works."""
    scope = {}
    exec(  # noqa: S102
        f"class P:\n def __reduce__(self):\n  return (exec, (\"open({str(canary)!r}, 'w').write('x')\",))\n", scope
    )
    torch.save(scope["P"](), canary.with_suffix(".bin"))
    torch.load(canary.with_suffix(".bin"), weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("name", ["../out", "/etc/x", "a/b", "..", ""])
def test_names_cannot_leave_their_root(make_run, name):
    with pytest.raises(UserError, match=r"run\.name"):
        make_run(f"run.name={name}")


def test_export_gives_a_plain_folder_and_refuses_what_is_damaged(saved, tmp_path, make_policy):
    from rich.console import Console
    from transformers import AutoModelForCausalLM

    export_checkpoint(saved, tmp_path / "plain", "bfloat16", Console(quiet=True))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert next(model.parameters()).dtype == torch.bfloat16
    newest = folders.folders(saved)[-1]
    flip(newest / "state.json", random.Random(0))
    with pytest.raises(UserError, match="damaged"):
        export_checkpoint(newest, tmp_path / "other", None, Console(quiet=True))
    with pytest.raises(UserError, match="expected an empty or new folder"):
        export_checkpoint(saved, tmp_path / "plain", None, Console(quiet=True))


def test_a_folder_that_ranks_do_not_share_makes_no_checkpoint(saved):
    """What another rank says that it has written must be there."""
    last = folders.folders(saved)[-1]
    shutil.copytree(last, folders.temporary_of(last))
    digests = json.loads((last / folders.MANIFEST).read_text()) | {"model/model-00002-of-00002.safetensors": "0" * 64}
    with pytest.raises(OSError, match=r"model-00002.*run\.root must be one folder for all ranks"):
        folders.commit(last, digests)
    assert checkpoint.verify(last) is None


def test_a_file_that_cannot_be_read_is_damage(saved, monkeypatch):
    newest, real = folders.folders(saved)[-1], folders.sha256

    def sha256(path):
        if newest in path.parents:
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(folders, "sha256", sha256)
    found, complaints = checkpoint.newest_valid(saved)
    assert found.name == "step_000001" and "cannot be read: Input/output error" in complaints[0]


def test_an_old_one_that_cannot_be_removed_spoils_no_new_one(make_run, go, monkeypatch):
    def prune(*args):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(writers, "prune", prune)
    config = make_run("train.iterations=3", "checkpoint.keep=1")
    go(config)
    assert [folders.step_of(f) for f in folders.folders(config.run_dir)] == [1, 2, 3]


def test_what_is_on_disk_is_kept_when_the_run_is_broken_off(make_run, go, monkeypatch):
    from eepo_fast.algorithm.iteration import Iteration

    original = Iteration.generate

    def broken_off(self, *args, **kwargs):
        if self.setup.state.step == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Iteration, "generate", broken_off)
    config = make_run()
    with pytest.raises(KeyboardInterrupt):
        go(config)
    assert checkpoint.newest_valid(config.run_dir)[0].name == "step_000002"


def test_the_best_is_kept_over_an_interruption(make_run, go, monkeypatch):
    """Its evaluation was interrupted, and done by the resumed run."""
    from eepo_fast.evaluation import periodic
    from eepo_fast.types import Interrupted

    scores = {2: 0.9, 4: 0.1, 6: 0.2}
    interrupted = []

    def run(self, policy, engine, version, step, *, progress=None):
        if step == 2 and not interrupted:
            interrupted.append(1)
            raise Interrupted
        folder = periodic.evaluation_folder(self.config.run_dir, step)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text("{}")
        return {"eval/held/greedy": scores[step]}

    monkeypatch.setattr(periodic.PeriodicEvaluation, "run", run)
    monkeypatch.setattr("eepo_fast.run.loop.Meeting.who_asked", lambda self: "SIGTERM")
    settings = ("checkpoint.keep=1", "checkpoint.best=eval/held/greedy", "evaluation.every=2",
                "evaluation.data.held=arithmetic:3:9:8")  # fmt: skip
    config = make_run(*settings)
    with pytest.raises(Interrupted):
        go(config)
    go(config, resume=True)
    assert [folders.step_of(f) for f in folders.folders(config.run_dir)] == [2, 6]


def test_the_last_evaluation_is_owed_by_a_run_that_is_done(make_run, go, outcome):
    settings = ("train.iterations=2", "evaluation.every=2", "evaluation.data.held=arithmetic:3:9:8")
    config = make_run(*settings)
    whole = outcome(go(config))
    assert "eval/held/greedy" in whole[0][-1]
    shutil.rmtree(config.run_dir / "evaluations")
    rows = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in whole[0]]
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert outcome(go(config, resume=True)) == whole
    assert json.loads((config.run_dir / "ended.json").read_text())["reason"] == "finished"


def test_a_disk_that_is_full_for_the_log_is_one_line(make_run, go, monkeypatch):
    from eepo_fast.run import log_files

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log_files, "append_metrics", full)
    config = make_run()
    with pytest.raises(UserError, match=r"run folder .*: cannot be written: No space left on device; make room"):
        go(config)


def test_a_model_with_fused_experts_resumes(tokenizer, tmp_path, make_run, go, outcome):
    """transformers keeps their weights under other names than it writes."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        eos_token_id=1, pad_token_id=0, max_position_embeddings=128,
    )  # fmt: skip
    folder = tmp_path / "moe"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = (f"model.path={folder}", "train.iterations=2", "train.packing=false")
    run = make_run(*settings)
    whole = outcome(go(run))
    folders.remove_newer(run.run_dir, 1)
    (run.run_dir / "ended.json").unlink()
    assert outcome(go(run, resume=True)) == whole
    from rich.console import Console

    export_checkpoint(run.run_dir, tmp_path / "plain", "float32", Console(quiet=True))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    saved = load_file(checkpoint.newest_valid(run.run_dir)[0] / "model" / "model.safetensors")
    assert saved and all(torch.equal(exported[name], w) for name, w in saved.items())
