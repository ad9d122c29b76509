"""One grading process: reads [gold, answer] as JSON lines, writes {"reward", "status"} lines. Its parent kills it when
an answer takes too long, so math-verify's own alarms, which hostile input can outlast, are off.

Never imported by the program; run as `python -m eepo_fast.rewards.worker`.
"""

from __future__ import annotations

import json
import logging
import sys


def verify_answer(gold: str, answer: str) -> dict[str, object]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    configs = [LatexExtractionConfig(), ExprExtractionConfig()]
    parsed_gold = parse(f"${gold}$", configs, parsing_timeout=None)
    if all(isinstance(part, str) for part in parsed_gold):  # nothing but text: no mathematics was found in the gold
        return {"reward": 0.0, "status": "error"}
    parsed = parse(f"${answer}$", configs, parsing_timeout=None)
    right = bool(parsed) and verify(parsed_gold, parsed, timeout_seconds=None)
    return {"reward": float(right), "status": "ok"}


def main() -> None:
    logging.disable(logging.CRITICAL)
    out = sys.stdout
    sys.stdout = sys.stderr  # nothing a library prints may look like an answer
    assert verify_answer("\\frac{1}{2}", "0.5")["reward"] == 1.0, "self-test: 1/2 is not 0.5"
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        try:
            result = verify_answer(*json.loads(line))
        except Exception:  # whatever the text did to the parser, this row gets its status and the next one its turn
            result = {"reward": 0.0, "status": "error"}
        print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
