#!/usr/bin/env python3
"""An agent CLI without a model: it reads its prompt on stdin and answers by a script, as an `agents:` preset of nerve.yaml.

It plays the three agents of develop-workflow in their workspace: a planner; a coder who needs two passes, first writes a
workflow that fails when it is tried, and mends it when told; a reviewer who rejects once."""

import pathlib
import sys

NAME = "add-numbers"
DEFINITION = """\
version: 1
name: add-numbers
description: Add the numbers of the prompt.
max_rounds: 1
timeout: 1min
roles:
  adder:
    exec: [awk, '{PROGRAM}']
    prompt: "{{ start.content }}\\n"
    timeout: 10s
graph:
  $START: adder
  adder: { ok: $END }
"""
WRONG = '{ exit 3 }'
RIGHT = '{ s = 0; for (i = 1; i <= NF; i++) s += $i; print s }'
COMMENTED = "# Adds numbers: nervectl workflow start add-numbers -p '1 2 3'\n"


def answer(text, **meta):
    print("---", *(f"{key}: {value}" for key, value in meta.items()), "---", text, sep="\n")


def main():
    prompt = sys.stdin.read()
    file = pathlib.Path("workflows", f"{NAME}.yaml")
    if "Plan only" in prompt:
        answer("One role, awk, that adds what the prompt has.", status="planned", name=NAME, trial='"1 2 39"')
    elif "Go in small passes" in prompt:
        if "You said before" not in prompt:
            answer("The file is begun.", status="continue")
            return
        text = DEFINITION.replace("{PROGRAM}", RIGHT if "It was tried" in prompt else WRONG)
        if "The reviewer wants" in prompt:
            text = COMMENTED + DEFINITION.replace("{PROGRAM}", RIGHT)
        file.write_text(text)
        answer("The file is written.", status="done")
    elif "Does it do what is wished" in prompt:
        assert "42" in prompt, "the reviewer sees what the real run said"
        if file.read_text().startswith(COMMENTED):
            answer("Good.", status="approved")
        else:
            answer("Say in a comment how it is started.", status="rejected")
    else:
        sys.exit(f"no script for this prompt: {prompt[:200]}")


main()
