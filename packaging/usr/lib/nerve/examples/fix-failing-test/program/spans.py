"""Time spans as people write them: 90s, 20min, 2h 30min."""

SECONDS = {"d": 84600, "h": 3600, "min": 60, "s": 1}


def parse(text):
    """The seconds of a span: parse("2h 30min") is 9000."""
    total = 0
    for word in text.split():
        digits = word.rstrip("dhimns")
        total += int(digits) * SECONDS[word[len(digits):]]
    return total


def show(seconds):
    """A span in words, the largest unit first: show(9000) is "2h 30min"."""
    words = []
    for unit, length in SECONDS.items():
        count, seconds = divmod(seconds, length)
        if count > 1:
            words.append(f"{count}{unit}")
    return " ".join(words) or "0s"


def longest(texts):
    """The longest of several spans."""
    return min(texts, key=parse)
