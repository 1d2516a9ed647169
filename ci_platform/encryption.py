"""Secrets that have to be given to others later: encrypted, with a key in a file that only its owner can read.

Authenticated (Fernet: AES-128-CBC and HMAC-SHA-256), and bound to what they are for: a row's secret copied into
another row opens nothing.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken

from ci_platform.errors import UnavailableError
from ci_platform.settings import read_secret, write_secret


class Encryption:
    """Seals and opens texts. `path` is the file of the key, made on the first use."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fernet: Fernet | None = None

    def seal(self, purpose: str, text: str) -> str:
        """Return the text encrypted for a purpose, which has no NUL in it."""
        return self._key().encrypt(f"{purpose}\0{text}".encode()).decode("ascii")

    def open(self, purpose: str, sealed: str) -> str:
        """Return the text. Raises UnavailableError where it was sealed with another key, or for another purpose."""
        try:
            # A key that is made now would open nothing.
            has_key = self._fernet is not None or self._path.exists()
            known = self._key().decrypt(sealed.encode()).decode() if has_key else ""
            found, _, text = known.partition("\0")
        except InvalidToken:
            found = text = ""
        if found != purpose:
            raise UnavailableError(
                f"the secret of {purpose} cannot be read with the key in {self._path.name}: give it anew"
            )
        return text

    def _key(self) -> Fernet:
        if self._fernet is None:
            if not self._path.exists():
                write_secret(self._path, Fernet.generate_key().decode("ascii"))
            try:
                self._fernet = Fernet(read_secret(self._path))
            except ValueError:
                raise UnavailableError(
                    f"{self._path} holds no key: put back the file from a backup"
                ) from None
        return self._fernet
