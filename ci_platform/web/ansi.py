"""Terminal output as runs of text with class names: colours kept, every other control sequence dropped.

The result is data, not markup: the page makes text nodes of it, the template escapes it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

# CSI, OSC (ended by BEL or ST), the other string sequences, two-byte escapes, a lone ESC, other controls.
_CONTROL = re.compile(
    r"\x1b\[(?P<parameters>[0-?]*)[ -/]*(?P<final>[@-~])"
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)"
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0a-\x1f\x7f\u0080-\u009f]"
    # Bidirectional overrides would let a log show other text than it holds.
    r"|[\u202a-\u202e\u2066-\u2069]",
    re.DOTALL,
)
_NAMES = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")
_STYLES = {1: "bold", 2: "dim", 3: "italic", 4: "underline", 7: "inverse", 9: "strike"}
_RESETS = {22: {"bold", "dim"}, 23: {"italic"}, 24: {"underline"}, 27: {"inverse"}, 29: {"strike"}}


@dataclass(frozen=True, slots=True)
class Style:
    """What the next character looks like: colour names of the 16-colour palette, and flags."""

    foreground: str = ""
    background: str = ""
    flags: frozenset[str] = frozenset()

    @property
    def classes(self) -> str:
        """Class names, separated by spaces; empty for plain text."""
        colours = [
            f"fg-{self.foreground}" if self.foreground else "",
            f"bg-{self.background}" if self.background else "",
        ]
        return " ".join([*filter(None, colours), *sorted(self.flags)])


Run = tuple[str, str]
"""Class names and text."""


class Terminal:
    """Renders the lines of one log in order; a colour that one line sets holds for the next."""

    def __init__(self) -> None:
        self._style = Style()

    def render(self, line: str) -> list[Run]:
        """Return one line, without its line end, as runs. Nothing in them is a control character."""
        runs: list[Run] = []
        at = 0
        line = _last_overwrite(line)
        for match in _CONTROL.finditer(line):
            self._put(runs, line[at : match.start()])
            at = match.end()
            if match["final"] == "m":
                self._style = _apply(self._style, match["parameters"])
        self._put(runs, line[at:])
        return runs

    def _put(self, runs: list[Run], text: str) -> None:
        if not text:
            return
        classes = self._style.classes
        if runs and runs[-1][0] == classes:
            runs[-1] = (classes, runs[-1][1] + text)
        else:
            runs.append((classes, text))


def plain(line: str) -> str:
    """Return the line without any control sequence."""
    return "".join(text for _, text in Terminal().render(line))


def clean(text: str) -> str:
    """Return text of several lines without any control sequence."""
    return "\n".join(plain(line) for line in text.split("\n"))


def _last_overwrite(line: str) -> str:
    # A progress bar goes back with carriage returns; what stands at the end is what a terminal shows.
    parts = [part for part in line.rstrip("\r\n").split("\r") if part]
    return parts[-1] if parts else ""


def _apply(style: Style, parameters: str) -> Style:
    # Colons separate sub-parameters in some programs' sequences; they mean the same here.
    codes = [int(part) if part.isdecimal() else 0 for part in parameters.replace(":", ";")[:64].split(";")]
    while codes:
        code = codes.pop(0)
        if code == 0:
            style = Style()
        elif code in _STYLES:
            style = replace(style, flags=style.flags | {_STYLES[code]})
        elif code in _RESETS:
            style = replace(style, flags=style.flags - _RESETS[code])
        elif code in {38, 48}:
            colour = _extended(codes)
            style = replace(style, foreground=colour) if code == 38 else replace(style, background=colour)
        elif code in {39, 49}:
            style = replace(style, foreground="") if code == 39 else replace(style, background="")
        elif 30 <= code <= 37 or 90 <= code <= 97:
            style = replace(style, foreground=_basic(code % 10, bright=code >= 90))
        elif 40 <= code <= 47 or 100 <= code <= 107:
            style = replace(style, background=_basic(code % 10, bright=code >= 100))
    return style


def _basic(index: int, *, bright: bool) -> str:
    return f"bright-{_NAMES[index]}" if bright else _NAMES[index]


def _extended(codes: list[int]) -> str:
    """Take `5;n` or `2;r;g;b` off `codes` and return the nearest of the 16 colours."""
    kind = codes.pop(0) if codes else 0
    if kind == 5 and codes:
        index = codes.pop(0)
        if index < 16:
            return _basic(index % 8, bright=index >= 8)
        if index >= 232:
            level = (index - 232) * 10 + 8
            return _nearest(level, level, level)
        cube = max(index - 16, 0)
        return _nearest(*(51 * (cube // step % 6) for step in (36, 6, 1)))
    if kind == 2 and len(codes) >= 3:
        red, green, blue = (codes.pop(0) for _ in range(3))
        return _nearest(red, green, blue)
    return ""


def _nearest(red: int, green: int, blue: int) -> str:
    brightest = max(red, green, blue)
    if brightest < 48:
        return "black"
    # A channel counts as on when it is more than half as strong as the strongest.
    index = sum(bit for bit, level in ((1, red), (2, green), (4, blue)) if level * 2 > brightest)
    return _basic(index, bright=brightest > 200)
