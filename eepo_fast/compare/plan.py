"""Reads and checks the plan of a comparison; says how each of its runs is configured.

    name: progressions
    base: [configs/smollm2-progressions.yaml]        # config files of all runs, later ones win
    overrides: [train.iterations=16]                 # keys of all runs
    methods:
      grpo: {files: [configs/methods/grpo.yaml]}
      eepo: {files: [configs/methods/eepo.yaml], overrides: [eepo.step=kl]}
    baseline: grpo
    seeds: [0, 1, 2, 3]
    sets: {test: "progressions:test:64"}             # what is evaluated on, as in evaluation.data
    k: [1, 8]
    claims:
      - {says: solves no less, measure: test pass@1, method: eepo, against: grpo, margin: -1.0}

Files are looked for beside the plan, then here. A claim holds where the whole 95% interval of method − against, paired
by seed, lies above its margin.
"""

import json
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eepo_fast.config import Config, load_config
from eepo_fast.config.files import read_yaml
from eepo_fast.types import UserError


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Method(_Part):
    files: list[str] = Field([], description="config files over those of all runs, such as an overlay")
    overrides: list[str] = Field([], description="key.sub=value")
    about: str = Field("", description="what it is, for the page")


class Measure(_Part):
    """A number of a run: the mean of a metric over its last rows that have it, or the share of a set's last samples
    that begin with a text."""

    metric: str = Field("", description="a key of metrics.jsonl, such as eval/test/greedy")
    last: int = Field(1, ge=1, description="how many of the last rows with that key are averaged")
    set: str = Field("", description="in place of a metric: an evaluation set, of whose samples")
    begins_with: str = Field("", description="this is the beginning")
    percent: bool = Field(False, description="a share, which is shown in percent")

    @property
    def key(self) -> str:
        """Is where a row has it."""
        return self.metric or f"eval/{self.set}/begins_with/{self.begins_with}"


class Claim(_Part):
    says: str = Field(description="in words")
    measure: str
    method: str
    against: str
    margin: float = Field(
        0.0, allow_inf_nan=False, description="in the measure's unit (points, where it is in percent)"
    )


class Plan(_Part):
    name: str
    about: str = Field("", description="what is asked, for the page")
    base: list[str] = Field(min_length=1)
    overrides: list[str] = []
    methods: dict[str, Method] = Field(min_length=2)
    baseline: str
    seeds: list[int] = Field(min_length=1)
    sets: dict[str, str] = Field(min_length=1)
    k: list[int] = [1]
    num_samples: int | None = Field(None, ge=1, description="samples a problem; default the largest k")
    every: int | None = Field(None, ge=1, description="iterations between evaluations; default: after the last alone")
    measures: dict[str, Measure] = {}
    curves: list[str] = ["reward/stage1", "entropy/stage1"]
    claims: list[Claim] = []
    keep_checkpoints: bool = False

    def all_measures(self) -> dict[str, Measure]:
        """Returns the plan's own measures, or every score of every set and the policy's entropy."""
        if self.measures:
            return self.measures
        scores = ["greedy", *(f"pass@{k}" for k in self.k if self.num_samples or max(self.k) > 1)]
        found = {f"{s} {m}": Measure(metric=f"eval/{s}/{m}", percent=True) for s in self.sets for m in scores}
        return found | {"entropy": Measure(metric="entropy/policy", last=3)}


def read_plan(path: Path) -> Plan:
    """Reads a plan; UserError, one line, where it cannot be carried out."""
    where = f"plan {path}"
    try:
        plan = Plan.model_validate(read_yaml(path, "plan", "keys like `methods:` and `seeds:`"))
    except ValidationError as error:
        first = error.errors()[0]
        key, message = ".".join(map(str, first["loc"])), first["msg"].replace("Input should be ", "expected ")
        if first["type"] == "extra_forbidden":
            raise UserError(f"{where}: {key}: unknown; known at the top: {', '.join(Plan.model_fields)}") from None
        found = "nothing" if first["type"] == "missing" else repr(first["input"])[:100]
        raise UserError(f"{where}: {key}: {message}, found {found}") from None
    _check(plan, where)
    return plan.model_copy(
        update={
            "base": [str(_find(file, path)) for file in plan.base],
            "methods": {
                name: m.model_copy(update={"files": [str(_find(file, path)) for file in m.files]})
                for name, m in plan.methods.items()
            },
        }
    )


def _find(file: str, plan: Path) -> Path:
    """Returns a config file, which is named from where the plan lies or from here."""
    places = [plan.parent / file, Path(file).expanduser()]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(f"plan {plan}: no file {file}, neither in {plan.parent} nor here; name a config file")
    return found.resolve()


def _check(plan: Plan, where: str) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(f"{where}: {message}")

    known = ", ".join(plan.methods)
    require(plan.baseline in plan.methods, f"baseline: unknown method {plan.baseline!r}; known: {known}")
    twice = next((s for i, s in enumerate(plan.seeds) if s in plan.seeds[:i]), None)
    require(twice is None, f"seeds: {twice} is given twice: a pair would count double; give different ones")
    for name in plan.methods:
        fits = re.fullmatch(r"[\w-]{1,100}", name) is not None
        require(fits, f"methods: expected names of letters, digits, _ and -, found {name[:100]!r}")
    for text in [*plan.overrides, *(text for m in plan.methods.values() for text in m.overrides)]:
        owned = text.partition(".")[0] in ("run", "evaluation")
        require(not owned, f"overrides: found {text!r}: seeds, sets, k, num_samples and every say that; remove it")
    measures = plan.all_measures()
    for label, measure in measures.items():
        require(
            bool(measure.metric) != bool(measure.set and measure.begins_with),
            f"measures: {label}: expected either `metric`, or `set` with `begins_with`",
        )
        require(not measure.set or measure.set in plan.sets, f"measures: {label}: unknown set {measure.set!r}")
    for claim in plan.claims:
        require(claim.measure in measures, f"claims: unknown measure {claim.measure!r}; known: {', '.join(measures)}")
        for name in (claim.method, claim.against):
            require(name in plan.methods, f"claims: unknown method {name!r}; known: {known}")


def run_config(plan: Plan, method: str, seed: int, out: Path) -> tuple[Config, list[str]]:
    """Returns the config of one run, and what `eepo-fast train` takes for it."""
    own = plan.methods[method]
    fixed = [f"run.root={out / 'runs'}", f"run.name={method}-{seed}", f"run.seed={seed}"]
    fixed += [f"evaluation.data={json.dumps(plan.sets)}", f"evaluation.k={plan.k}"]
    fixed += [f"evaluation.num_samples={plan.num_samples or 'null'}"]
    files, overrides = [*plan.base, *own.files], [*plan.overrides, *own.overrides, *fixed]
    every = plan.every or load_config(files, overrides).train.iterations
    if not every:
        raise UserError(f"plan {plan.name}: expected train.iterations, found none; a comparison has a fixed length")
    overrides.append(f"evaluation.every={every}")
    config = load_config(files, overrides)
    if others := config.evaluation.data.keys() - plan.sets.keys():
        raise UserError(
            f"plan {plan.name}: a config file has evaluation.data.{min(others)}, too; `sets` says all of them"
        )
    return config, [*files, *overrides]
