"""Who may do what: API keys, and names that may become folders.

Knows key digests and names; knows nothing of requests or the engine. A key itself is kept nowhere: keys are compared by
their SHA-256 digests, in constant time, and every known key is compared with, so an answer's time tells nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

API_KEY_VARIABLE, ADMIN_KEY_VARIABLE = "DVI_API_KEY", "DVI_ADMIN_KEY"
MIN_KEY_CHARS = 16  # shorter ones can be guessed over the network

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_HEX_DIGEST = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)
_ENTRY_KEYS = {"name", "key", "key_sha256", "train", "admin", "adapters"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ApiKey:
    """One client. name is its tenant: fairness, prefix sharing and `forget` go by it. digest: SHA-256 of the key.

    adapters: the names of those that it may ask for; None: of all.
    """

    name: str
    digest: bytes
    may_train: bool = True
    is_admin: bool = False
    adapters: frozenset[str] | None = None

    def may_use(self, adapter: str) -> bool:
        return self.adapters is None or adapter in self.adapters


ANYBODY = ApiKey(name="", digest=b"", is_admin=True)


@dataclass(frozen=True)
class Access:
    """The keys of a server. Without any it is open: everybody is `ANYBODY`, so it must listen on a loopback host."""

    keys: tuple[ApiKey, ...] = ()

    @property
    def is_open(self) -> bool:
        return not self.keys

    @property
    def has_admin(self) -> bool:
        return self.is_open or any(key.is_admin for key in self.keys)

    def identify(self, authorization: str | None) -> ApiKey | None:
        """The key of an Authorization header, `Bearer KEY` or `Basic` with the key as password; None where it has none.

        Basic is for browsers, which can ask for a password and nothing else; the user name does not matter.
        """
        if self.is_open:
            return ANYBODY
        digest = hashlib.sha256(_secret(authorization)).digest()
        matches = [key for key in self.keys if hmac.compare_digest(key.digest, digest)]
        return matches[0] if matches else None

    def check_host(self, host: str) -> None:
        """Raises ValueError where strangers could reach a server without keys."""
        if self.is_open and not is_loopback(host):
            raise ValueError(
                f"serve.host {host} can be reached from other machines and there is no API key; set serve.keys_file "
                f"or {API_KEY_VARIABLE}, or try serve.host=127.0.0.1"
            )


def load_access(keys_file: str | Path | None, environment: Mapping[str, str] = os.environ) -> Access:
    """The keys of a YAML (or JSON) file, or those of the environment where there is no file.

    The file holds a list of {name, key or key_sha256 (hex), train: true, admin: false, adapters: list of names}.
    Raises ValueError for a file that cannot be read or understood, naming the entry and never the key.
    """
    if keys_file is not None:
        return Access(_read_keys(Path(keys_file)))
    keys = []
    for name, variable, is_admin in (("default", API_KEY_VARIABLE, False), ("admin", ADMIN_KEY_VARIABLE, True)):
        if variable in environment:
            keys.append(ApiKey(name, _digest(environment[variable], source=variable), is_admin=is_admin))
    return Access(tuple(keys))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`, a name or an address without a port."""
    host = host.strip("[]")
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_name(name: str, *, what: str = "name") -> str:
    """`name`, when it can be a file name that stays where it is put. Raises ValueError for every other."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            f"{what} must be 1 to 64 letters, digits, '.', '_' or '-', begin with a letter or digit and not hold '..', "
            f"got {name[:64]!r}"
        )
    return name


def adapter_folder(root: str | Path, name: str) -> Path:
    """The folder of adapter `name` below `root`. Raises ValueError for names and links that lead out of `root`."""
    root = Path(root).resolve()
    folder = root / check_name(name, what="adapter name")
    if folder.resolve() != folder:
        raise ValueError(f"adapter {name!r} is a link; adapters must be folders in {root}")
    return folder


def _secret(authorization: str | None) -> bytes:
    """What the header gives as the key; empty, which no key is, where it gives none."""
    scheme, _, value = (authorization or "").partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value.encode("utf-8", "surrogateescape")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _digest(key: Any, *, source: str) -> bytes:
    if not isinstance(key, str) or len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable():
        raise ValueError(f"the key of {source} must be at least {MIN_KEY_CHARS} printable ASCII characters")
    return hashlib.sha256(key.encode()).digest()


def _read_keys(path: Path) -> tuple[ApiKey, ...]:
    try:
        text = path.read_text(encoding="utf-8")
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"serve.keys_file must be a readable file, got {path}: {error.strerror}") from error
    if mode & 0o077:
        log.warning("%s can be read by other users of this machine; try chmod 600", path)
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError:
        # Not the error's own text: it quotes the lines, and they hold keys.
        raise ValueError(f"serve.keys_file must be valid YAML, got {path}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a list of keys such as [{{name: alice, key: ...}}]")
    keys = tuple(_entry(entry, source=f"{path}, entry {number}") for number, entry in enumerate(entries, start=1))
    for kind, values in (("names", [key.name for key in keys]), ("keys", [key.digest for key in keys])):
        if len(set(values)) < len(values):
            raise ValueError(f"{path} must not hold two equal {kind}")
    return keys


def _entry(entry: Any, *, source: str) -> ApiKey:
    if not isinstance(entry, dict) or not {"name"} <= set(entry) <= _ENTRY_KEYS:
        raise ValueError(f"{source} must hold name, key or key_sha256, and train, admin or adapters if wanted")
    if ("key" in entry) == ("key_sha256" in entry):
        raise ValueError(f"{source} must hold one of key and key_sha256")
    if not isinstance(entry["name"], str):
        raise ValueError(f"the name in {source} must be text")
    flags = {name: entry.get(name, default) for name, default in (("train", True), ("admin", False))}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} in {source} must be true or false")
    if "key" in entry:
        digest = _digest(entry["key"], source=source)
    else:
        hexadecimal = entry["key_sha256"]
        if not isinstance(hexadecimal, str) or not _HEX_DIGEST.fullmatch(hexadecimal):
            raise ValueError(f"key_sha256 in {source} must be 64 hexadecimal digits")
        digest = bytes.fromhex(hexadecimal)
    name = check_name(entry["name"], what=f"the name in {source}")
    adapters = _adapters(entry["adapters"], source=source) if "adapters" in entry else None
    return ApiKey(name, digest, may_train=flags["train"], is_admin=flags["admin"], adapters=adapters)


def _adapters(names: Any, *, source: str) -> frozenset[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"adapters in {source} must be a list of names; [] allows none, without it all are allowed")
    return frozenset(check_name(name, what=f"an adapter in {source}") for name in names)
