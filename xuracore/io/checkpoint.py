"""Checkpoint folders: several files that change together, or not at all.

::

    checkpoints/
      step-00000100/          one generation; it appears whole, by a rename
        config.json  model.safetensors  optimizer.safetensors  trainer.json
        manifest.json         size and SHA-256 of each file above
      step-00000200/ …
      latest.json             the generation to resume from, with size and SHA-256 of its manifest

A generation is written into a hidden folder, flushed, renamed, and only then named in
``latest.json``; older ones are removed last.  A writer killed at any moment therefore leaves at least
the previous generation.  Reading compares every hash first and falls back to the newest generation
that is whole.
"""

import errno
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

from xuracore.errors import ConfigError, FormatError
from xuracore.io.atomic import (
    Written,
    digest_file,
    sweep_stale,
    sync_folder,
    temporary_path,
)
from xuracore.io.safetensors import load_safetensors, save_safetensors
from xuracore.io.strict_json import load_json, save_json

FORMAT = "xura-checkpoint-1"

_GENERATION = re.compile(r"step-(\d{8,15})(?:-\d{1,9})?")
_FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "trainer.json")


class Checkpoint(NamedTuple):
    """What one generation holds; a part that was not saved is None."""

    step: int
    model: dict  # name → ndarray
    optimizer: dict | None  # name → ndarray
    trainer: dict | None
    config: dict | None
    path: Path


class CheckpointDirectory:
    """The generations of one training run under ``path``; the ``keep`` last saved ones stay.

    One process writes; any number may read meanwhile.
    """

    def __init__(self, path, keep=3):
        if type(keep) is not int or keep < 1:
            raise ConfigError(f"keep is {keep!r}; expected a whole number of at least 1")
        self.path, self.keep = Path(path), keep

    def save(self, step, model, optimizer=None, trainer=None, config=None):
        """Add a generation and return its folder.

        step : whole number ≥ 0.  Saving a step again replaces its generation once the new one is whole.
        model, optimizer : dict name → ndarray.  trainer, config : what JSON can hold.

        Raises as :func:`~xuracore.io.save_safetensors` and :func:`~xuracore.io.save_json`, and OSError
        when the disk refuses; earlier generations then stay as they were.
        """
        if type(step) is not int or not 0 <= step < 10**15:
            raise ConfigError(f"step is {step!r}; expected a whole number of at least 0")
        self.path.mkdir(parents=True, exist_ok=True)
        sweep_stale(self.path)
        earlier = self._generations()
        name = f"step-{step:08d}"
        temporary = Path(temporary_path(str(self.path / name)))
        temporary.mkdir()
        try:
            files = _write_parts(temporary, model, optimizer, trainer, config)
            manifest = {
                "format": FORMAT,
                "step": step,
                "serial": 1 + max((serial for serial, _, _ in earlier), default=0),
                "files": {file: written._asdict() for file, written in files.items()},
            }
            written = save_json(temporary / "manifest.json", manifest)
            folder = self._rename_to_free_name(temporary, name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(self.path)
        latest = {"format": FORMAT, "generation": folder.name, "step": step, "manifest": written._asdict()}
        save_json(self.path / "latest.json", latest)
        self._remove_old(earlier, step)
        return folder

    def load(self, step=None):
        """The :class:`Checkpoint` of ``step``, or the latest one that is whole.

        A damaged generation is passed over with a RuntimeWarning that says what is wrong with it.
        Raises FormatError when nothing whole is left, or nothing of this ``step``.
        """
        problems = []
        for folder, manifest_digest in self._newest_first(step):
            try:
                checkpoint = _load_generation(folder, manifest_digest)
            except (OSError, FormatError) as error:
                problems.append(str(error))
                continue
            for problem in problems:
                message = f"damaged checkpoint, going back to {folder.name}: {problem}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            return checkpoint
        reason = "holds no checkpoint" if step is None else f"holds no checkpoint of step {step}"
        if problems:
            reason = "; ".join([f"{reason} that is whole", *problems])
        elif step is not None:
            reason += f"; there are steps {self.steps()}"
        raise FormatError(reason, str(self.path))

    def steps(self):
        """Steps that have a generation, in ascending order; only the manifests are looked at."""
        return sorted({step for serial, step, _ in self._generations() if serial})

    def _generations(self):
        """``(serial, step, folder)`` of each generation, oldest save first; serial 0: no manifest."""
        generations = []
        for folder in self.path.iterdir() if self.path.is_dir() else ():
            match = _GENERATION.fullmatch(folder.name)
            if match:
                try:
                    manifest = _load_manifest(folder)
                except (OSError, FormatError):
                    manifest = {"serial": 0, "step": int(match.group(1))}
                generations.append((manifest["serial"], manifest["step"], folder))
        return sorted(generations)

    def _newest_first(self, step):
        """``(folder, digest of its manifest or None)`` to try in turn: first what latest.json names."""
        try:
            latest = load_json(self.path / "latest.json", maximum_bytes=65536)
        except (OSError, FormatError):
            latest = None  # the generations speak for themselves
        named, digest = None, None
        if isinstance(latest, dict):
            named, digest = latest.get("generation"), latest.get("manifest")
        candidates = [(folder, at) for _, at, folder in reversed(self._generations())]
        candidates.sort(key=lambda candidate: candidate[0].name != named)  # stable
        return [
            (folder, digest if folder.name == named else None)
            for folder, at in candidates
            if step is None or at == step
        ]

    def _rename_to_free_name(self, temporary, name):
        """Rename to ``name``, or ``name-2`` … where this step was saved before."""
        for suffix in ("", *(f"-{again}" for again in range(2, 10_000))):
            folder = self.path / (name + suffix)
            if os.path.lexists(folder):
                continue
            try:
                os.replace(temporary, folder)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                continue  # another process took the name since
            return folder
        raise FormatError(f"has no free folder name left for {name}", str(self.path))

    def _remove_old(self, earlier, step):
        """Keep the last ``keep`` generations, counting the new one; of its step, only the new one."""
        superseded = [folder for serial, at, folder in earlier if serial and at == step]
        others = [folder for serial, at, folder in earlier if serial and at != step]
        for folder in superseded + others[: max(0, len(others) - self.keep + 1)]:
            doomed = temporary_path(str(folder))  # a kill half-way must not leave half a generation
            try:
                os.replace(folder, doomed)
            except OSError:
                continue  # what cannot be removed does no harm
            shutil.rmtree(doomed, ignore_errors=True)


def _write_parts(folder, model, optimizer, trainer, config):
    files = {}
    if config is not None:
        files["config.json"] = save_json(folder / "config.json", config)
    files["model.safetensors"] = save_safetensors(folder / "model.safetensors", model)
    if optimizer is not None:
        files["optimizer.safetensors"] = save_safetensors(folder / "optimizer.safetensors", optimizer)
    if trainer is not None:
        files["trainer.json"] = save_json(folder / "trainer.json", trainer)
    return files


def _load_manifest(folder):
    path = folder / "manifest.json"
    manifest = load_json(path, maximum_bytes=65536, maximum_depth=3)

    def require(condition, reason):
        if not condition:
            raise FormatError(reason, str(path))

    expected = {"format", "step", "serial", "files"}
    require(
        isinstance(manifest, dict) and manifest.keys() == expected, f"expected the keys {sorted(expected)}"
    )
    require(manifest["format"] == FORMAT, f"format is {manifest['format']!r:.40}; expected {FORMAT!r}")
    for key in ("step", "serial"):
        require(type(manifest[key]) is int and manifest[key] >= 0, f"{key} is not a whole number")
    files = manifest["files"]
    require(isinstance(files, dict) and files.keys() <= set(_FILES), f"files are not among {_FILES}")
    require("model.safetensors" in files, "names no model.safetensors")
    for written in files.values():
        require(
            isinstance(written, dict) and written.keys() == set(Written._fields), "a file lacks its digest"
        )
    return manifest


def _load_generation(folder, manifest_digest=None):
    manifest = _load_manifest(folder)
    if manifest_digest is not None and digest_file(folder / "manifest.json")._asdict() != manifest_digest:
        raise FormatError("size or SHA-256 differs from latest.json", str(folder), "manifest.json")
    for file, written in manifest["files"].items():
        if digest_file(folder / file)._asdict() != written:
            raise FormatError("size or SHA-256 differs from the manifest", str(folder), file)

    def part(file, load):
        return load(folder / file) if file in manifest["files"] else None

    return Checkpoint(
        step=manifest["step"],
        model=part("model.safetensors", load_safetensors),
        optimizer=part("optimizer.safetensors", load_safetensors),
        trainer=part("trainer.json", load_json),
        config=part("config.json", load_json),
        path=folder,
    )
