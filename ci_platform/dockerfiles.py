"""Dockerfiles of tenants: what they may say, and which images they start from."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from ci_platform.errors import InvalidInputError

_LONGEST = 200_000
_FROM = re.compile(r"FROM\s+(?:--platform=\S+\s+)?(\S+)(?:\s+AS\s+(\S+))?", re.IGNORECASE)
_SOURCE = re.compile(r"--from=(\S+)", re.IGNORECASE)

Pin = Callable[[str], Awaitable[str]]


async def checked(text: str, pin: Pin) -> str:
    """Return a Dockerfile whose images are exact. Raises InvalidInputError with the line that may not be.

    The engine itself carries out ADD of a URL, from where it stands in the network, so ADD is refused: COPY does the
    rest of it. Images are named plainly, so that they can be looked at before.
    """
    if len(text) > _LONGEST:
        raise InvalidInputError(f"the Dockerfile is longer than {_LONGEST:,} characters")
    stages: set[str] = set()
    lines = []
    for line in _lines(text):
        word = line.split(maxsplit=1)[0].upper()
        if word in {"ADD", "ONBUILD"}:
            raise InvalidInputError(f"Dockerfile: {word} is not allowed, COPY is: {line:.200}")
        if word == "FROM":
            lines.append(await _exact(line, stages, pin))
            continue
        if word == "COPY":
            for source in _SOURCE.findall(line):
                if source.lower() not in stages and not source.isdecimal():
                    raise InvalidInputError(f"Dockerfile: --from names no stage of this file: {line:.200}")
        lines.append(line)
    if not stages:
        raise InvalidInputError("the Dockerfile has no FROM")
    return "\n".join(lines) + "\n"


async def _exact(line: str, stages: set[str], pin: Pin) -> str:
    match = _FROM.fullmatch(line)
    if match is None or "$" in line:
        raise InvalidInputError(f"Dockerfile: FROM takes the plain name of an image: {line:.200}")
    image, stage = match[1], match[2]
    exact = image if image.lower() in stages or image == "scratch" else await pin(image)
    stages.add((stage or f"#{len(stages)}").lower())
    return f"FROM {exact}" + (f" AS {stage}" if stage else "")


def _lines(text: str) -> list[str]:
    """Return the instructions, each as one line. Directives, which could change how lines go on, are refused."""
    found, line, begun = [], "", False
    for raw in text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n"):
        piece = raw.strip()
        if not line and re.match(r"#\s*(escape|syntax|check)\s*=", piece, re.IGNORECASE) and not begun:
            raise InvalidInputError(f"Dockerfile: directives are not allowed: {piece:.200}")
        if not piece or piece.startswith("#"):
            continue
        begun = True
        # As Docker does: what follows stands right behind what went before.
        line += (raw.rstrip() if line else piece).removesuffix("\\")
        if not piece.endswith("\\"):
            found.append(line.strip())
            line = ""
    return [each for each in [*found, line.strip()] if each]
