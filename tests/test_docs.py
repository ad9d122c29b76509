"""The documentation: built strictly, its links kept, its commands run, its examples run."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from eepo_fast.cli import main, make_parser
from eepo_fast.config import Config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "bench").rglob("*.md"))]
SMALL = [
    "data.num_rows=64", "rollout.engine=hf", "rollout.group_size=4", "rollout.max_new_tokens=4",
    "train.prompts_per_iteration=4", "train.prompts_per_update=2", "train.iterations=1", "model.dtype=float32",
    "rollout.dtype=float32", "data.template=plain",
]  # fmt: skip


def blocks(language, pages=PAGES):
    for page in pages:
        for block in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            yield page, block


def commands():
    """Every line of a bash block, without its comment, continued lines joined; each once."""
    found = {}
    for _, block in blocks("bash", TEXTS):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found[" ".join(words)] = words
    return found


COMMANDS = commands()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder where what the commands name lies: data, configs, and runs of a tiny model."""
    from eepo_fast.config import load_config
    from eepo_fast.data.base_model import train_base

    folder = tmp_path_factory.mktemp("docs")
    model, tokenizer = train_base(load_config([str(ROOT / "configs/demo.yaml")], []).data, steps=25, batch=32)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "base")
    for name in ("configs", "bench"):
        (folder / name).symlink_to(ROOT / name)
    rows = [{"id": str(i), "problem": f"{i}+{i}=", "answer": str(2 * i)} for i in range(8)]
    for name in ("gsm8k", "math500", "amc23"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answers = [{"id": "a", "gold": "1/2", "answer": "0.5"}]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    responses = [{"id": str(i), "response": f"\\boxed{{{2 * i}}}"} for i in range(8)]
    (folder / "completions.jsonl").write_text("\n".join(map(json.dumps, responses)))
    extending = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    (folder / "my_rewards.py").write_text(re.search(r"^# my_rewards.py\n(.*?)^```", extending, re.M | re.S).group(1))
    methods = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    (folder / "mine.py").write_text(re.search(r"^# mine.py\n(.*?)^```", methods, re.M | re.S).group(1))
    evaluation = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    plan = yaml.safe_load(re.search(r"^# plan.yaml\n(.*?)^```", evaluation, re.M | re.S).group(1))
    plan["overrides"] += [*SMALL, f"model.path={folder / 'base'}"]
    plan |= {"seeds": plan["seeds"][:1], "sets": {"test": "arithmetic:3:9:4"}}
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    before = os.getcwd()
    os.chdir(folder)
    for name, enabled in (("my-run", True), ("demo-eepo", True), ("demo-grpo", False)):
        settings = [*SMALL, f"run.name={name}", f"model.path={folder / 'base'}"]
        settings.append("eepo.alpha=3.0" if enabled else "eepo.enabled=false")
        assert main(["train", "configs/demo.yaml", *settings]) == 0
    graded = ["eval", "--completions", "completions.jsonl", "--data", "math500=math500.jsonl"]
    for name in ("results-grpo", "results-eepo"):
        assert main([*graded, "--out", name]) == 0
    yield folder
    os.chdir(before)


def smaller(words, place, number):
    """A documented `train` or `profile`, on the tiny model, in a run folder of its own. What it names is kept."""
    root = place / f"runs-{number}"
    shape = json.loads((place / "base/config.json").read_text())
    names = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads")
    dimensions = [f"model.dimensions.{n}={shape[n]}" for n in (*names, "num_key_value_heads")]
    dimensions.append(f"model.dimensions.tie_word_embeddings={str(shape['tie_word_embeddings']).lower()}")
    extra = [*SMALL, *dimensions, f"model.path={place / 'base'}", f"run.root={root}", "reward.step_seconds=60"]
    if not any(w.startswith("data.train=") for w in words):
        extra += ["data.train=arithmetic"]
    if "eepo.enabled=false" not in words and not any(w.startswith("configs/methods/") for w in words):
        extra += ["eepo.alpha=3.0"]
    return [*words, *extra]


def runs_in_process(words, place, number):
    """`eepo-fast …` through main()."""
    kind = words[1]
    if kind == "demo":  # minutes: tests/eepo_fast/run/test_demo.py runs it
        make_parser().parse_args(words[1:])
        return
    if kind == "data":  # there is no hub here: tests/eepo_fast/run/test_evaluate.py runs it
        make_parser().parse_args(words[1:])
        return
    arguments = words[1:]
    if kind in ("train", "profile"):
        if "--dry-run" not in words:
            arguments = smaller(arguments, place, number)
            if any("qwen" in w for w in words):  # DeepSpeed: once a process
                command = [sys.executable, "-m", "eepo_fast.cli", *arguments]
                done = subprocess.run(command, capture_output=True, text=True, timeout=400)
                assert done.returncode == 0, done.stderr[-3000:]
                return
    elif kind == "eval" and "--model" in words:
        arguments += ["data.template=plain", "rollout.max_new_tokens=4"]
    assert main(arguments) == 0


def runs_under_torchrun(words, place, number):
    """On two ranks; the configs' own engine and ZeRO stage."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    words[words.index("--nproc-per-node") + 1] = "2"
    command = [sys.executable, "-m", "torch.distributed.run", *smaller(words[1:], place, number)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (place / f"runs-{number}").iterdir()
    assert (run / "ended.json").is_file()


def is_asked_of_a_launcher(words, place, number):
    """torchrun and Slurm stand-ins that write down what they were asked for."""
    tools = place / f"tools-{number}"
    tools.mkdir()
    for name in ("torchrun", "srun", "sbatch"):
        (tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{tools}/asked"\n')
        (tools / name).chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    environment = os.environ | {
        "PATH": path,
        "NODES": "2",
        "HEAD": "node0",
        "SLURM_NNODES": "4",
        "SLURM_SUBMIT_DIR": str(place),
    }
    script = next(w for w in words if w.startswith("configs/launch/"))
    arguments = words[words.index(script) + 1 :]
    if words[0] == "sbatch":
        environment |= {"SLURM_JOB_NODELIST": "node0", "SLURMD_NODENAME": "node0", "SLURM_JOB_ID": "1"}
        (tools / "scontrol").write_text("#!/bin/sh\necho node0\n")
        (tools / "scontrol").chmod(0o755)
    done = subprocess.run(["bash", script, *arguments], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    asked = (tools / "asked").read_text()
    assert all(argument in asked for argument in arguments), asked


def is_a_target(words, place, number):
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def is_a_bench(words, place, number):
    """Minutes long: that it starts and takes these options."""
    script = next(w for w in words if w.endswith(".py"))
    help_text = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert help_text.returncode == 0, help_text.stderr
    assert all(w in help_text.stdout for w in words if w.startswith("--"))


def is_an_installation(words, place, number):
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        for group in re.findall(r"^(?:\.|eepo-fast)\[(.*)\]$", word):
            assert set(group.split(",")) <= set(extras)


def is_pytest(words, place, number):
    options = ["--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, "-m", *words, *options], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout[-1000:]


def how(words):
    first = next(w for w in words if "=" not in w or w.startswith("-"))
    if any(w.startswith("configs/launch/") for w in words):
        return is_asked_of_a_launcher
    known = {
        "eepo-fast": runs_in_process, "torchrun": runs_under_torchrun, "make": is_a_target, "python": is_a_bench,
        "pip": is_an_installation, "pytest": is_pytest,
    }  # fmt: skip
    return known[first]


def takes_long(command):
    """Ranks of torchrun, an import of DeepSpeed, every test imported, or a comparison's runs; the first of each of the
    first two is quick enough."""
    kinds = ("torchrun", "configs/qwen2.5-3b.yaml", "pytest")
    return (
        any(k in command and command != next(c for c in COMMANDS if k in c) for k in kinds)
        or "pytest" in command
        or "compare" in command
    )


@pytest.mark.parametrize("command", [pytest.param(c, marks=[pytest.mark.slow] * takes_long(c)) for c in COMMANDS])
def test_every_documented_command_runs(command, place):
    words = list(COMMANDS[command])
    if words[0] == "torchrun" or "torchrun" in words:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    how(words)(words, place, list(COMMANDS).index(command))


@pytest.mark.slow
def test_examples_run(place):
    found = [block for _, block in blocks("python")]
    assert len(found) >= 3
    for number, block in enumerate(found):
        path = place / f"example_{number}.py"
        path.write_text(block)
        done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120, cwd=place)
        assert done.returncode == 0, done.stderr


def parsers(parser, words=()):
    yield words, parser
    for action in parser._subparsers._group_actions if parser._subparsers else []:
        for name, child in action.choices.items():
            yield from parsers(child, (*words, name))


def test_every_help_has_an_example_that_is_right():
    for words, parser in parsers(make_parser()):
        assert parser.epilog and parser.epilog.startswith("example: eepo-fast "), f"{words} has no example"
        example = shlex.split(parser.epilog.removeprefix("example: eepo-fast "))
        assert tuple(example[: len(words)]) == words
        arguments, rest = make_parser().parse_known_args(example)
        assert callable(arguments.run) and not any(r.startswith("-") for r in rest)


def test_every_key_says_what_it_is():
    def keys(section, prefix):
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                yield from keys(field.annotation, f"{prefix}{name}.")
            else:
                yield prefix + name, field

    silent = [key for key, field in keys(Config, "") if not field.description]
    assert not silent


def test_the_page_of_the_configuration_is_the_schemas():
    spec = importlib.util.spec_from_file_location("configuration_page", ROOT / "docs/configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert module.configuration() == written, "run `python docs/configuration.py`"


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*TEXTS, ROOT / "CHANGELOG.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), f"{page}: {target}"


@pytest.mark.slow
def test_the_pages_are_built_strictly(tmp_path):
    source = tmp_path / "project"
    shutil.copytree(ROOT / "docs", source / "docs")
    (source / "bench").mkdir()
    (source / "bench/results").symlink_to(ROOT / "bench/results")
    shutil.copyfile(ROOT / "CHANGELOG.md", source / "CHANGELOG.md")

    def build(folder):
        command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(source / "docs"), str(folder)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = build(tmp_path / "site")
    assert done.returncode == 0, done.stderr
    pages = {p.name: p.read_text(encoding="utf-8") for p in (tmp_path / "site").rglob("*.html")}
    assert "eepo.learning_rate" in pages["configuration.html"] and "fused_linear_loss" in pages["kernels.html"]
    for name, text in pages.items():
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]*)"', text)
        assert not loaded, f"{name} loads from elsewhere"
    with (source / "docs/faq.md").open("a") as file:
        file.write("\n[nowhere](not-there.md)\n")
    assert build(tmp_path / "broken").returncode != 0, "and a broken link is an error"


def test_overlays_and_workflow_files_are_yaml():
    for path in [*ROOT.glob(".pre-commit-config.yaml"), *(ROOT / "configs").rglob("*.yaml")]:
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


NAMED = r"`((?:eepo_fast|kernels|csrc|configs|bench|tests|docs)/[\w./-]*)`"
SYMBOL = r"`(\w+(?:\.\w+)?)`[^|`]*? in `([\w/]+\.py)`|`([\w/]+\.py)`: `(\w+(?:\.\w+)?)`"


def missing_places(text):
    """Yields what a page names and the tree has not: files, folders, and names said to be in a file."""
    yield from (path for path in re.findall(NAMED, text) if not (ROOT / path).exists())
    for before, first, second, after in re.findall(SYMBOL, text):
        name, path = (before or after).split(".")[-1], ROOT / (first or second)
        if path.exists() and not re.search(rf"^\s*(?:def |class )?{name}\b", path.read_text("utf-8"), re.M):
            yield f"{path.relative_to(ROOT)}: {name}"


def test_contributing_names_places_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(re.findall(NAMED, text)) > 40 and len(re.findall(SYMBOL, text)) > 8
    assert not list(missing_places(text))
    gone = "`eepo_fast/algorithm/gone.py`, `Nobody` in `eepo_fast/types.py`, `eepo_fast/types.py`: `nothing`"
    assert len(list(missing_places(gone))) == 3, "the control"
