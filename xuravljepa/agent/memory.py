"""Visual memory: what was seen, when, and what was said about it, in files that survive a crash.

A memory is a folder of segments ``memory_<number of the first record>.log``, each a row of records
(``memory_record``): JSON that says what and when, the key as float32 (width,), the picture as PNG.  A frame
that was seen before is a record without key and picture, which names the first one.

A record is appended and never changed.  A process that is killed leaves at most one torn record, at the end
of the last segment: it is cut off when the memory is opened again.  A record damaged elsewhere is skipped;
those behind it are found by their marks.  One process writes at a time; any number may read.
"""

import dataclasses
import fcntl
import io as streams
import math
import os
import re
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from xuracore.config import Config
from xuracore.errors import ConfigError, FormatError, ShapeError
from xuravljepa import image as images
from xuravljepa.agent import memory_record as records
from xuravljepa.agent.errors import MemoryBusyError

VERSION = 1
MAX_SEGMENT = 2**26  # bytes of a file
MAX_WIDTH = 2**14  # numbers of a key
MAX_TEXT = 2000  # characters of each text in a record
_NAME = re.compile(r"memory_(\d{12})\.log")


@dataclasses.dataclass(frozen=True)
class MemoryConfig(Config):
    """How much is kept.

    Retention removes whole segments, oldest first, so a record may outlive ``max_age`` by a tenth.
    """

    same: float = 0.03  # cosine distance of keys under which a frame is one that was seen before
    segment_bytes: int = 2**23
    max_bytes: int = 2**28  # of all segments
    max_age: float = 30 * 86400.0  # seconds
    max_index: int = 100_000  # records that can be searched, the newest
    sync: bool = True  # flush each record to the disk: it then survives a power cut as well

    def __post_init__(self):
        if not 0 <= self.same < 2 or not self.max_age > 0 or self.max_index < 1:
            raise ConfigError("MemoryConfig needs 0 ≤ same < 2, max_age > 0 and max_index ≥ 1")
        if not 1 <= self.segment_bytes <= MAX_SEGMENT or self.max_bytes < self.segment_bytes:
            raise ConfigError(f"MemoryConfig needs 1 ≤ segment_bytes ≤ {MAX_SEGMENT} and segment_bytes ≤ "
                              f"max_bytes, got {self.segment_bytes} and {self.max_bytes}")


@dataclasses.dataclass
class Memory:
    """One thing that was seen.  ``time`` and ``last`` are seconds since 1970, of the first and last sight."""

    number: int
    time: float
    source: str  # where the frame came from, such as its file
    question: str  # what was asked of it then
    answer: str
    confidence: float | None
    last: float
    seen: int = 1
    place: tuple = dataclasses.field(default=(), repr=False, compare=False)  # (segment, offset) on the disk


class VisualMemory:
    """See the module's text.

    Args:
        directory: folder of the memory; made where it is missing, unless ``read_only``.
        width: numbers of a key.
        config: ``MemoryConfig``.
        eyes: what made the keys, such as a digest of an encoder: keys of another cannot be compared.
        read_only: look without the lock, while another process may write; nothing on the disk changes.
        clock: gives seconds since 1970.

    Raises:
        MemoryBusyError: another process (or object) writes to it.
        FormatError: it belongs to other eyes, has keys of another width, or is no memory.
        OSError: the folder cannot be made, read or written.

    Damage is a warning (UserWarning), never an error: what is whole is kept.
    """

    def __init__(self, directory, width, config=MemoryConfig(), eyes="", read_only=False, clock=time.time):
        if not 1 <= width <= MAX_WIDTH:
            raise ShapeError(f"keys have 1 to {MAX_WIDTH} numbers, not {width}")
        self.directory, self.width, self.config, self.eyes = Path(directory), width, config, eyes
        self.read_only, self._clock = read_only, clock
        self._file = self._lock = None
        self._keys, self._entries, self._by_number = np.zeros((16, width), np.float32), [], {}
        self._segments = {}  # first number → [path, bytes, oldest time, newest time]
        self._next, self._spoilt = 0, False  # spoilt: nothing can be appended to the last segment
        if read_only:
            if not self.directory.is_dir():
                raise FormatError("there is no such memory", self.directory)
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.directory)
        try:
            self._load()
            if not read_only:
                self.enforce_retention()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ writing
    def add(self, key, picture, source="", question="", answer="", confidence=None, time=None):
        """Remember a frame, or that a known one was seen again; returns its ``Memory``.

        Args:
            key: (width,), of any length but zero.
            picture: uint8 (H, W, 3) or a PIL image; kept as it is.
            time: seconds since 1970; now by default.
        """
        key, now = self._unit(key), self._clock() if time is None else float(time)
        if not abs(now) < 1e15:
            raise ShapeError(f"time is seconds since 1970, not {now}")
        if confidence is not None and not 0 <= confidence <= 1:
            raise ShapeError(f"confidence is a probability, not {confidence}")
        about = {"time": now, "source": _short(source)}
        near = self.search(key, 1)
        if near and 1 - near[0][1] <= self.config.same:
            known = near[0][0]
            self._append({**about, "again": known.number}, b"", now)
            if known.number in self._by_number:  # retention may just have removed it
                known.last, known.seen = max(known.last, now), known.seen + 1
                return known
        about |= {"question": _short(question), "answer": _short(answer),
                  "confidence": None if confidence is None else float(confidence)}
        place = self._append(about, key.astype("<f4").tobytes() + _png(picture), now)
        return self._index(self._next - 1, about, key, place)

    def touch(self, entry, time):
        """Note that a sight lasted until ``time``; ``seen`` stays as it is."""
        self._append({"time": time, "source": "", "again": entry.number, "stays": True}, b"", time)
        entry.last = max(entry.last, time)

    def _append(self, about, data, now):
        """Write a record; (segment, offset) of it."""
        if self._lock is None:
            raise MemoryBusyError(f"{self.directory}: is closed, or open for reading only")
        if self._next >= records.MAX_NUMBER:
            raise FormatError("has no numbers left: begin another one", self.directory)
        about = {"version": VERSION, "eyes": self.eyes, "width": self.width, "number": self._next, **about}
        record = records.encode(about, data)
        segment = self._writable(len(record), now)
        self._next += 1
        offset = os.fstat(self._file).st_size
        try:
            _write(self._file, record)
            if self.config.sync:
                os.fsync(self._file)
        except BaseException:
            try:
                os.ftruncate(self._file, offset)
            except OSError:
                self.close()  # what is torn must stay the end: the next opening cuts it off
            raise
        segment[1:] = offset + len(record), min(segment[2], now), max(segment[3], now)
        return segment[0], offset

    def _writable(self, size, now):
        """The segment to append ``size`` bytes to: the last one, or a new one."""
        last = self._segments.get(max(self._segments, default=None))
        full = self._spoilt or last is not None and last[1] and (
            last[1] + size > self.config.segment_bytes or now - last[2] > self.config.max_age / 10)
        if self._file is not None and not full:
            return last
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if last is None or full:
            path = self.directory / f"memory_{self._next:012d}.log"
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o644)
            last = self._segments[self._next] = [path, 0, math.inf, -math.inf]
            self._spoilt = False
            self.enforce_retention()
        else:
            self._file = os.open(last[0], os.O_WRONLY | os.O_APPEND)
        return last

    def enforce_retention(self, now=None):
        """Remove the segments that are too old or too much, but not the one in use; returns how many."""
        now, removed, firsts, reserved = self._clock() if now is None else now, 0, sorted(self._segments), 0
        if self._file is not None:
            reserved = max(self.config.segment_bytes - self._segments[firsts.pop()][1], 0)
        for first in firsts:
            path, _, _, newest = self._segments[first]
            if self.bytes + reserved <= self.config.max_bytes and newest >= now - self.config.max_age:
                continue
            path.unlink(missing_ok=True)
            del self._segments[first]
            self._keep(entry.place[0] != path for entry in self._entries)
            removed += 1
        return removed

    def close(self):
        """Let another process write; what was remembered can still be searched."""
        for file in (self._file, self._lock):
            if file is not None:
                os.close(file)
        self._file = self._lock = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    # ------------------------------------------------------------------ looking
    def __len__(self):
        return len(self._entries)

    def __iter__(self):
        """Memories, oldest first."""
        return iter(list(self._entries))

    @property
    def bytes(self):
        """On the disk."""
        return sum(segment[1] for segment in self._segments.values())

    def newest(self, k=5, since=-math.inf, until=math.inf):
        """The k memories seen last between two times, newest first."""
        found = [entry for entry in self._entries if entry.last >= since and entry.time <= until]
        return sorted(found, key=lambda entry: (-entry.last, -entry.number))[:k]

    def search(self, key, k=5, since=-math.inf, until=math.inf):
        """The k memories whose keys are nearest: ``[(Memory, cosine)]``, nearest first."""
        cosines = self._keys[: len(self._entries)] @ self._unit(key)
        order = (int(i) for i in np.argsort(-cosines, kind="stable"))
        fits = (i for i in order if self._entries[i].last >= since and self._entries[i].time <= until)
        return [(self._entries[i], float(cosines[i])) for i, _ in zip(fits, range(k))]

    def picture(self, number):
        """The picture of a memory, uint8 (H, W, 3); FormatError if it is not there or was damaged."""
        if number not in self._by_number:
            raise FormatError(f"there is no memory number {number}", self.directory)
        path, offset = self._by_number[number].place
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                content = file.read(records.HEAD.size + records.MAX_RECORD)
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror}", path) from None
        record = records.decode(content)
        if record is None or record[0]["number"] != number:
            raise FormatError(f"memory number {number} was damaged", path)
        try:
            picture = Image.open(streams.BytesIO(record[1][4 * self.width :]), formats=("PNG",))
        except OSError:
            raise FormatError(f"memory number {number} has no picture", path) from None
        return np.asarray(images.read_rgb(picture))

    def _unit(self, key):
        key = np.asarray(key, np.float32)
        if key.shape != (self.width,):
            raise ShapeError(f"a key has shape ({self.width},), got {key.shape}")
        length = np.linalg.norm(key)
        if not np.isfinite(length) or length == 0:
            raise ShapeError("a key that is zero or not finite has no direction")
        return key / length

    # ------------------------------------------------------------------ index and files
    def _index(self, number, about, key, place):
        entry = Memory(number, about["time"], about["source"], about["question"], about["answer"],
                       about["confidence"], about["time"], place=place)
        if len(self._entries) >= self.config.max_index:
            drop = 1 + self.config.max_index // 8  # many at a time: moving the keys is what costs
            self._keep(i >= drop for i in range(len(self._entries)))
        if len(self._entries) == len(self._keys):
            self._keys = np.concatenate([self._keys, np.zeros_like(self._keys)])
        self._keys[len(self._entries)] = key
        self._entries.append(entry)
        self._by_number[entry.number] = entry
        return entry

    def _keep(self, chosen):
        chosen = np.fromiter(chosen, bool)
        self._keys[: chosen.sum()] = self._keys[: len(chosen)][chosen]
        self._entries = [entry for entry, keep in zip(self._entries, chosen) if keep]
        self._by_number = {entry.number: entry for entry in self._entries}

    def _load(self):
        names = ((_NAME.fullmatch(path.name), path) for path in self.directory.iterdir())
        files = sorted((int(match[1]), path) for match, path in names if match)
        for first, path in files:
            try:
                self._load_segment(first, path, last=path == files[-1][1])
            except FileNotFoundError:
                if not self.read_only:  # its writer may remove a segment while this one reads
                    raise

    def _load_segment(self, first, path, last):
        size = path.stat().st_size
        if size > MAX_SEGMENT + records.MAX_RECORD:
            raise FormatError(f"has {size} bytes; a segment has at most {MAX_SEGMENT}", path)
        content, end, lost, self._spoilt = path.read_bytes(), 0, 0, False
        segment = [path, len(content), math.inf, -math.inf]
        try:
            for offset, about, data, behind in records.scan(content):
                lost += offset != end
                end = behind
                if self._take(about, data, (path, offset)):
                    segment[2:] = min(segment[2], about["time"]), max(segment[3], about["time"])
                else:
                    lost += 1
        except records.TooDamaged:
            lost, self._spoilt = lost + 1, True
        torn, cut = len(content) - end, last and not self.read_only and not self._spoilt
        self._next = max(self._next, first + self._spoilt)
        if lost:
            warnings.warn(f"{path}: {lost} damaged part(s) skipped", stacklevel=4)
        if torn and (cut or not last):  # nothing whole is behind it: a writer was stopped
            done = "cut off" if cut else "passed over"
            warnings.warn(f"{path}: an unfinished record of {torn} bytes was {done}", stacklevel=4)
        if cut and not end:
            path.unlink()
            return
        if cut and torn:
            os.truncate(path, end)
            segment[1] = end
        self._segments[first] = segment

    def _take(self, about, data, place):
        """Take a record into the index; False if it makes no sense here, FormatError if it is foreign."""
        if about["version"] != VERSION:
            raise FormatError(f"version {about['version']}; this program reads {VERSION}", place[0])
        if (about["width"], about["eyes"]) != (self.width, self.eyes):
            raise FormatError(f"was made by another model: its keys have {about['width']} numbers, here "
                              f"{self.width}; its eyes are {about['eyes']!r:.40}, here {self.eyes!r:.40}",
                              place[0])
        if about["number"] < self._next:
            return False
        self._next = about["number"] + 1
        if "again" in about:
            known = self._by_number.get(about["again"])  # it may be gone by now
            if known is not None:
                known.last = max(known.last, about["time"])
                known.seen += about.get("stays") is not True
            return True
        if len(data) < 4 * self.width:
            return False
        key = np.frombuffer(data[: 4 * self.width], "<f4").astype(np.float32)
        if not 0.99 < np.linalg.norm(key) < 1.01:  # so neither NaN nor Infinity
            return False
        self._index(about["number"], about, key, place)
        return True


def _short(text):
    """A text as it is kept: of bounded length, and such that it can be written as UTF-8."""
    return str(text)[:MAX_TEXT].encode("utf-8", "replace").decode()


def _png(picture):
    buffer = streams.BytesIO()
    images.read_rgb(picture).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _write(file, data):
    rest = memoryview(data)
    while rest:  # the system may take less than it is offered
        rest = rest[os.write(file, rest) :]


def _locked(directory):
    """A file descriptor that holds the lock, which the system lets go of however the process ends."""
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise MemoryBusyError(f"{directory}: another process writes to this memory; "
                              "open it with read_only=True, or wait until it is done") from None
    return lock
