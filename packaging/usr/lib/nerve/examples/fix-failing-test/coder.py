"""The coder of fix-failing-test, without a model: it repairs one cause of a failing test.

stdin: a prompt with the output of unittest in it. It takes the first failure from there, tries edits of one token in
the program (a comparison's boundary, an operator, min for max, a number changed by what the failure says was expected),
and runs the tests for each, in a copy. The first edit after which fewer tests fail, and none that passed before, is made
in the program. It knows nothing of the bugs. Exit status 1: no such edit was found.
"""

import difflib
import io
import pathlib
import re
import shutil
import subprocess
import sys
import tokenize

PROGRAM = pathlib.Path("program")
COPY = pathlib.Path("copy")  # a round can be cut off at any time: the program must not be left half tried
SWAPS = {
    "<": ["<="], "<=": ["<"], ">": [">="], ">=": [">"], "==": ["!="], "!=": ["=="],
    "+": ["-"], "-": ["+"], "*": ["//"], "//": ["*", "%"], "%": ["//"],
    "min": ["max"], "max": ["min"], "and": ["or"], "or": ["and"], "True": ["False"], "False": ["True"],
}
FAILURE = re.compile(r"^(?:FAIL|ERROR): (\w+) \((\S+?)\)", re.MULTILINE)
DIFFERENCE = re.compile(r"^AssertionError: (-?\d+) != (-?\d+)", re.MULTILINE)


def failing():
    """The tests that fail in the copy; None when they do not come to an end."""
    command = [sys.executable, "-B", "-m", "unittest", "discover", "--start-directory", str(COPY)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return None
    found = set(FAILURE.findall(done.stderr))
    return found if found or done.returncode == 0 else None


def numbers(text, difference):
    """What a number could have been meant to be."""
    number = int(text)
    meant = [number + 1, number - 1]
    if difference:
        got, expected = map(int, difference.groups())
        meant.insert(0, number + expected - got)
        if got and number * expected % got == 0:
            meant.insert(0, number * expected // got)
    return [str(candidate) for candidate in meant if candidate >= 0 and candidate != number]


def edits(source, difference):
    """The sources that differ from this one in one token."""
    lines = source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        candidates = SWAPS.get(token.string, [])
        if token.type == tokenize.NUMBER and token.string.isdigit():
            candidates = numbers(token.string, difference)
        (row, start), (_, end) = token.start, token.end
        for candidate in candidates:
            line = lines[row - 1]
            yield "".join(lines[: row - 1] + [line[:start] + candidate + line[end:]] + lines[row:])


def main():
    prompt = sys.stdin.read()
    first = FAILURE.search(prompt)
    if not first:
        sys.exit("there is no failing test in the prompt")
    report = prompt[first.end():].split("\n=====")[0]
    difference = DIFFERENCE.search(report)
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(PROGRAM, COPY)
    before = failing()
    if not before:
        sys.exit("the tests do not fail here, or do not come to an end")
    tries = 0
    for path in sorted(PROGRAM.rglob("*.py")):
        if path.name.startswith("test"):
            continue
        source = path.read_text()
        for edited in edits(source, difference):
            tries += 1
            trial = COPY / path.relative_to(PROGRAM)
            trial.write_text(edited)
            after = failing()
            if after is not None and after < before and first.groups() not in after:
                path.write_text(edited)
                reason = re.search(r"^\w*(?:Error|Exception)\b.*", report, re.MULTILINE)
                print(f"{first[1]} failed: {reason[0] if reason else 'no reason given'}")
                print(f"This edit, number {tries} of those tried, mends it and breaks nothing:")
                diff = difflib.unified_diff(source.splitlines(), edited.splitlines(), str(path), str(path), "", "", 0, "")
                print("\n".join(diff))
                return
            trial.write_text(source)
    sys.exit(f"no edit of one token, of {tries}, makes {first[1]} pass")


main()
