"""Keeps what was declared, and when: OUT/stamps.json has a note for each state that the plan was in.

A claim that was declared stays, word for word and with what it measures, from the first run on. All else may change,
and the page says that it did.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eepo_fast.compare.plan import Claim, Plan
from eepo_fast.types import UserError

FILE = "stamps.json"
Stamp = dict[str, Any]
"""declared (UTC), sha256, after_runs (whether there were runs already), plan (what it then said)."""


def read_stamps(out: Path) -> list[Stamp]:
    file = out / FILE
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    except ValueError:
        raise UserError(f"{file}: is cut off, and with it what was declared; give another --out") from None


def content_of(plan: Plan) -> dict[str, Any]:
    """Returns all that a plan says, config files as their content's digests, wherever they lie."""

    def digests(files: Sequence[str]) -> list[str]:
        return [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]

    methods = {name: [digests(m.files), m.overrides, m.about] for name, m in plan.methods.items()}
    whole = {**plan.model_dump(), "base": digests(plan.base), "methods": methods}
    return whole | {"claims": [declared(claim, plan) for claim in plan.claims]}


def declared(claim: Claim, plan: Plan) -> dict[str, Any]:
    """Returns a claim with the definition of what it measures."""
    return {**claim.model_dump(), "definition": plan.all_measures()[claim.measure].model_dump()}


def check(plan: Plan, stamps: Sequence[Stamp], *, runs_exist: bool) -> None:
    """Raises a UserError where a claim that was declared is not there any more as it was, and runs are."""
    now = content_of(plan)["claims"]
    for claim in stamps[-1]["plan"]["claims"] if stamps and runs_exist else ():
        if claim not in now:
            alike = [c for c in now if c["says"] == claim["says"]]
            found = f"the margin {alike[0]['margin']:g} or another measure" if alike else "no such claim"
            raise UserError(
                f"claims: {claim['says']!r}: expected the margin {claim['margin']:g} on {claim['measure']!r}, as "
                f"declared {stamps[-1]['declared']}, before the runs that are there, found {found}; put it back, or "
                "give another --out"
            )


def stamp(plan: Plan, path: Path, out: Path, stamps: Sequence[Stamp], *, runs_exist: bool) -> list[Stamp]:
    """Notes the plan as it is now, if that is new, and keeps its file; returns all notes."""
    content = content_of(plan)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    if stamps and stamps[-1]["sha256"] == digest:
        return list(stamps)
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    stamps = [*stamps, {"declared": now, "sha256": digest, "after_runs": runs_exist, "plan": content}]
    if path.resolve() != (out / "plan.yaml").resolve():
        shutil.copyfile(path, out / "plan.yaml")
    temporary = out / f"{FILE}.tmp"
    temporary.write_text(json.dumps(stamps, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(out / FILE)
    return stamps


def changes(before: Stamp, after: Stamp) -> str:
    """Returns which parts of the plan differ; of seeds, how many there were."""
    old, new = before["plan"], after["plan"]
    keys = [key for key in new if new[key] != old.get(key)]
    counts = {"seeds": f"seeds, {len(old['seeds'])} to {len(new['seeds'])}"}
    return ", ".join(counts.get(key, key) for key in keys)
