"""The report of a large run: seconds to write it, its size, and how fast the page opens and changes iteration.

    python bench/bench_report.py [--iterations 200] [--completions 1024] [--details 2] [--out FILE]

`--details`: how many of the iterations have numbers of every token, 512 a completion (10 MB and half a second each).
Every panel has a curve. again_s: the report written once more, when nothing has changed. The page is opened in headless
Chromium where that is installed; without it those figures are left out, by name. No other trainer writes such a page,
so there is nobody to compare with.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

from common import record

from eepo_fast.config import dump_config, load_config
from eepo_fast.report.command import write_report
from eepo_fast.report.panels import PANELS, TROUBLE

GROUP_SIZE, TOKENS = 8, 512
WORDS = ["the", "sum", "of", "seven", "and", "five", "is", "twelve", "so", "we", "divide", "by", "two", "x", "=", "12"]


def write_run(folder: Path, iterations: int, completions: int, details: int) -> None:
    folder.mkdir()
    config = load_config([], ["model.path=m", "data.train=d", "run.name=large", "log.token_details=true"])
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "rollouts").mkdir()
    rng = random.Random(0)
    keys = dict.fromkeys(line.key for panel in PANELS for line in panel.lines)
    keys |= dict.fromkeys([*TROUBLE, *(f"time/phase{i}_s" for i in range(10)), *(f"other/{i}" for i in range(10))])
    with (folder / "metrics.jsonl").open("w") as metrics:
        for step in range(1, iterations + 1):
            row = {key: rng.random() for key in keys} | {"step": step, "time/iteration_s": 9.0}
            metrics.write(json.dumps(row) + "\n")
            with (folder / "rollouts" / f"step_{step:06d}.jsonl").open("w") as file:
                for i in range(completions):
                    file.write(json.dumps(completion(rng, i, step, step > iterations - details)) + "\n")


def completion(rng: random.Random, i: int, step: int, details: bool) -> dict:
    tokens = [f" {word}" for word in rng.choices(WORDS, k=TOKENS if details else 100)]
    stage = 1 if i % GROUP_SIZE < GROUP_SIZE // 2 else 2
    row = {
        "prompt_id": f"p{i // GROUP_SIZE}", "prompt": f"What is {i // GROUP_SIZE} plus {step}?", "stage": stage,
        "weights_version": [step, stage == 2], "completion": "".join(tokens), "reward": float(rng.random() < 0.5),
        "status": "ok", "advantage": rng.random() - 0.5, "num_tokens": len(tokens), "finished": True,
    }  # fmt: skip
    if details:
        numbers = [-rng.random() for _ in tokens]
        row |= {"tokens": tokens, "rollout_logprobs": numbers, "policy_logprobs": numbers, "entropy": numbers}
        row |= {"gate": [1.0] * len(tokens), "forget_change": numbers} if stage == 1 else {}
    return row


def in_browser(page: Path) -> dict[str, float]:
    """Returns the seconds until the first curves are drawn, and until another iteration's first group is there."""
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))

    def until(script: str) -> float:
        started = time.perf_counter()
        WebDriverWait(browser, 60, poll_frequency=0.01).until(lambda b: b.execute_script(f"return {script}"))
        return time.perf_counter() - started

    try:
        browser.get("about:blank")
        started = time.perf_counter()
        browser.get(page.as_uri())
        until("document.querySelectorAll('.plot[data-drawn]').length > 1")
        found = {"first_view_s": time.perf_counter() - started}
        browser.execute_script("byId('rollouts').scrollIntoView()")
        found["last_iteration_s"] = until("document.querySelectorAll('.tokens span').length > 1000")
        browser.execute_script("byId('earlier').click()")
        step = "byId('step').value === byId('step').options[byId('step').options.length - 2].value"
        found["earlier_iteration_s"] = until(f"{step} && document.querySelectorAll('.card').length === {GROUP_SIZE}")
        spent = "const t = performance.now(); document.querySelector('[data-colour=entropy]').click(); "
        spent += "document.body.offsetHeight; return performance.now() - t"  # laid out, too
        found["colour_s"] = browser.execute_script(spent) / 1000
        return found
    finally:
        browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--completions", type=int, default=1024)
    parser.add_argument("--details", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        run = Path(root) / "large"
        write_run(run, args.iterations, args.completions, args.details)
        started = time.perf_counter()
        page = write_report([run], None)
        report_s = time.perf_counter() - started
        started = time.perf_counter()
        write_report([run], None)
        scripts = [path.stat().st_size for path in page.parent.rglob("step_*.js")]
        found = {
            "iterations": args.iterations, "completions": args.completions, "report_s": report_s,
            "again_s": time.perf_counter() - started,
            "index_mb": page.stat().st_size / 1e6, "largest_script_mb": max(scripts) / 1e6,
            "all_mb": sum(scripts) / 1e6,
        }  # fmt: skip
        if shutil.which("chromium") and shutil.which("chromedriver"):
            found |= in_browser(page)
        else:
            print("no chromium and chromedriver: the page is not opened")
        record([found], args.out)


if __name__ == "__main__":
    main()
