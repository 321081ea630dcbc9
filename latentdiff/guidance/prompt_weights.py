"""Weights inside a prompt, in the syntax that the Stable Diffusion web UI (A1111) made common."""

import re

_TOKEN = re.compile(
    r"\\[()\[\]\\]"  # an escaped bracket or backslash
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"  # the end of (text:weight)
    r"|[()\[\]]"
    r"|[^\\()\[\]:]+"
    r"|.",  # a colon or a backslash of the text itself
    re.DOTALL,
)
_ROUND, _SQUARE = 1.1, 1 / 1.1


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    r"""The pieces of a prompt and their weights.

    `(x)` weighs 1.1, `((x))` 1.21, `[x]` 1 / 1.1 and `(x:1.3)` 1.3; they nest by multiplication.
    `\(`, `\)`, `\[`, `\]` and `\\` are the characters themselves. A bracket that is never closed
    reaches to the end; one that was never opened is text.

    Returns:
        (text, weight) pairs, neighbours of one weight joined; [("", 1.0)] for no text.
    """
    pieces: list[tuple[str, float]] = []
    rounds: list[int] = []
    squares: list[int] = []

    def multiply(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for match in _TOKEN.finditer(prompt):
        token = match.group()
        if token == "(":
            rounds.append(len(pieces))
        elif token == "[":
            squares.append(len(pieces))
        elif match.group("weight") is not None and rounds:
            multiply(rounds.pop(), float(match.group("weight")))
        elif token == ")" and rounds:
            multiply(rounds.pop(), _ROUND)
        elif token == "]" and squares:
            multiply(squares.pop(), _SQUARE)
        else:
            escaped = len(token) == 2 and token[0] == "\\"
            pieces.append((token[1] if escaped else token, 1.0))
    for opened, factor in ((rounds, _ROUND), (squares, _SQUARE)):
        for start in opened:
            multiply(start, factor)
    return _joined(pieces)


def _joined(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined or [("", 1.0)]
