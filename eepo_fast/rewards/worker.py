"""One grading process reads [mode, gold, answer] as JSON lines and writes {"reward", "status"} lines. Its parent kills
it when an answer takes too long, so math-verify's own alarms, which hostile input can outlast, are off.

The program never imports it; it is run as `python -m eepo_fast.rewards.worker MEMORY_BYTES`.
"""

import json
import logging
import sys


def verify_answer(mode: str, gold: str, answer: str) -> dict[str, object]:
    from eepo_fast.rewards import paper
    from eepo_fast.rewards.answers import symbolic
    from eepo_fast.rewards.answers.compare import compare

    try:
        right = paper.verify_answer(gold, answer) if mode == "paper" else compare(gold, answer, symbolic.ask)
    except symbolic.NotMathematicsError:  # the gold is no mathematics
        return {"reward": 0.0, "status": "error"}
    return {"reward": float(bool(right)), "status": "ok"}


def self_test() -> None:
    """Checks that right is right and wrong is wrong, in both modes; it must hold outside the sandbox and inside."""
    for gold, answer, reward in (
        ("\\frac{1}{2}", "\\frac{2}{4}\\cdot 1", 1.0), ("2\\sqrt{3}", "\\sqrt{12}", 1.0), ("x+1", "x+2", 0.0),
        ("(x+1)^2", "x^2+2x+1", 1.0), ("\\sin(2x)", "2\\sin(x)\\cos(x)", 1.0), ("1+2i", "1-2i", 0.0),
        ("8n^2+4n+1", "1+4n+8n^2", 1.0),
    ):  # fmt: skip
        for mode in ("strict", "paper"):
            found = verify_answer(mode, gold, answer)
            assert found == {"reward": reward, "status": "ok"}, f"self-test: {mode} {gold} {answer} gave {found}"
    for gold, answer, reward in (("12", "3(4)", 1.0), ("7", "3(4)", 0.0), ("7", "3 4", 0.0), ("n+5", "n+2(3)", 0.0)):
        found = verify_answer("strict", gold, answer)  # the parser by itself adds neighbouring numbers
        assert found == {"reward": reward, "status": "ok"}, f"self-test: {gold} {answer} gave {found}"


def main() -> None:
    from eepo_fast.rewards import sandbox

    logging.disable(logging.CRITICAL)
    out = sys.stdout
    sys.stdout = sys.stderr  # nothing a library prints may look like an answer
    self_test()  # also makes sympy import what it imports late
    sandbox.close_parsers()
    sandbox.enter(int(sys.argv[1]))
    self_test()
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        try:
            result = verify_answer(*json.loads(line))
        except MemoryError:
            result = {"reward": 0.0, "status": "too_large"}
        except Exception:  # whatever the text did, this row gets its status and the next one its turn
            result = {"reward": 0.0, "status": "error"}
        print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
