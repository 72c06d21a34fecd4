"""Visual tokens on disk, so that a frozen X-Encoder reads each picture once.

An entry is found by the SHA-256 of the picture's bytes, in a folder named after the encoder's weights and the
preprocessing: another encoder, size or crop is another folder, and renamed or copied pictures are the same.

    <folder>/<encoder and preprocessing>/tokens.f16    entries of n · d float16, one after the other, memory-mapped
                                         index.bin     for each: SHA-256 of the picture, BLAKE2b of picture and tokens
                                         about.json    what the numbers are, for people

Entries are only appended, tokens first, so a run that is killed keeps what it had; the next goes on from there.
An entry is checked against its digest when it is first used, and computed again if it is damaged.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from xuracore import io
from xuracore.errors import ConfigError, DTypeError, ShapeError

VERSION = 1
_PICTURE, _CHECK = 32, 16  # bytes of the two digests of an index entry
_ENTRY = _PICTURE + _CHECK


def fingerprint(encoder, recipe):
    """SHA-256 in hex of an encoder's configuration and weights and of a Preprocessing."""
    digest = hashlib.sha256(json.dumps([VERSION, encoder.config.to_dict(), asdict(recipe)], sort_keys=True).encode())
    for name, array in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def picture_digest(source):
    """SHA-256 of a picture: of a file's bytes, or of an array's numbers, shape and type."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    if not isinstance(source, np.ndarray):
        raise DTypeError(f"a cached picture is bytes, a path or an array, got {type(source).__name__}")
    digest = hashlib.sha256(f"{source.dtype} {source.shape}".encode())
    digest.update(np.ascontiguousarray(source).reshape(-1).view(np.uint8))
    return digest.digest()


class FeatureCache:
    """Tokens of one encoder under one preprocessing.

    ``cache.missing(digests)`` → the digests to compute; ``cache.add(digests, tokens)`` keeps them;
    ``cache.tokens(digests)`` → a CachedTokens, which reads from the map.  Several processes may share a folder.
    """

    def __init__(self, folder, encoder, recipe):
        self.shape = encoder.config.n_tokens, encoder.config.d_model
        name = fingerprint(encoder, recipe)
        self.path = Path(folder) / name[:32]
        self.path.mkdir(parents=True, exist_ok=True)
        about = {"version": VERSION, "fingerprint": name, "tokens": list(self.shape),
                 "encoder": encoder.config.to_dict(), "preprocessing": asdict(recipe)}
        if not (self.path / "about.json").exists():
            io.save_json(self.path / "about.json", about)
        self._bytes = 2 * self.shape[0] * self.shape[1]
        self._places, self._checks, self._trusted, self._read = {}, [], set(), 0
        self._map = np.empty((0, *self.shape), np.float16)
        self._refresh()

    def __len__(self):
        """Entries, damaged ones that were not asked for included."""
        return len(self._places)

    def missing(self, digests):
        """Those of ``digests`` that are not here, or damaged, each once, in order."""
        self._refresh()
        return [digest for digest in dict.fromkeys(digests) if not self._sound(digest)]

    def add(self, digests, tokens):
        """Keep tokens (B, n, d) of B pictures; replaces damaged entries.

        Raises ShapeError for other shapes, DTypeError for numbers that float16 cannot hold.
        """
        if tokens.shape != (len(digests), *self.shape):
            raise ShapeError(f"tokens are {tokens.shape}; expected {(len(digests), *self.shape)}")
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(tokens, "<f2")
        if not np.isfinite(half).all():
            raise DTypeError(f"tokens up to {np.abs(tokens).max():g} do not fit float16 (65504); "
                             f"this encoder cannot be cached")
        with self._locked():
            self._refresh()
            for digest, page in zip(digests, half):
                if not self._sound(digest):
                    self._write(digest, page.tobytes())
        self._refresh()

    def tokens(self, digests):
        """The tokens of these pictures, read when asked for.  Raises ConfigError for one that is not here."""
        self._refresh()
        for digest in digests:
            if not self._sound(digest):
                raise ConfigError(f"the picture {digest.hex()[:16]}… is not in the cache {self.path}")
        return CachedTokens(self._map, np.array([self._places[digest] for digest in digests], np.int64))

    # ------------------------------------------------------------------ files
    def _write(self, digest, data):
        """Tokens first, index entry after; a slot without an entry is written over."""
        slot = self._places.get(digest, len(self._checks))
        check = _check(digest, data)
        for name, at, content in (
            ("tokens.f16", slot * self._bytes, data),
            ("index.bin", slot * _ENTRY, digest + check),
        ):
            descriptor = os.open(self.path / name, os.O_RDWR | os.O_CREAT, 0o644)
            with os.fdopen(descriptor, "r+b") as file:
                file.seek(at)
                file.write(content)
        if slot == len(self._checks):
            self._checks.append(check)
        self._checks[slot] = check
        self._places[digest] = slot
        self._trusted.discard(digest)

    def _refresh(self):
        """Take in what is on disk: whole entries alone."""
        sizes = [(self.path / name).stat().st_size if (self.path / name).exists() else 0
                 for name in ("tokens.f16", "index.bin")]
        count = min(sizes[0] // self._bytes, sizes[1] // _ENTRY)
        if count > self._read:
            with open(self.path / "index.bin", "rb") as file:
                index = file.read(count * _ENTRY)
            entries = [index[i : i + _ENTRY] for i in range(0, len(index), _ENTRY)]
            self._places = {entry[:_PICTURE]: slot for slot, entry in enumerate(entries)}
            self._checks = [entry[_PICTURE:] for entry in entries]
            self._read = count
        if len(self._map) < count:
            self._map = np.memmap(self.path / "tokens.f16", "<f2", "r", shape=(count, *self.shape))

    def _sound(self, digest):
        slot = self._places.get(digest)
        if digest not in self._trusted and slot is not None and slot < len(self._map):
            if _check(digest, self._map[slot].tobytes()) == self._checks[slot]:
                self._trusted.add(digest)
        return digest in self._trusted

    @contextlib.contextmanager
    def _locked(self):
        """One writer at a time, where the system can lock files."""
        with open(self.path / "lock", "wb") as file:
            with contextlib.suppress(ImportError):
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _check(digest, data):
    return hashlib.blake2b(data, key=digest, digest_size=_CHECK).digest()


class CachedTokens:
    """(N, n, d) float16 on disk: a number, slice, or array of numbers gives an array; only that is read."""

    dtype = np.dtype(np.float16)

    def __init__(self, mapped, slots):
        self._map, self._slots = mapped, slots
        self.shape = len(slots), *mapped.shape[1:]

    def __len__(self):
        return len(self._slots)

    def __getitem__(self, key):
        return np.array(self._map[self._slots[key]])
