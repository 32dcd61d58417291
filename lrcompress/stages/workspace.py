"""The unfinished output: DIR.partial with its scratch files, its lock, and what it was made from."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from lrcompress.calibration.corpus import Source
from lrcompress.checkpoint.cache import file_digest, files_read
from lrcompress.checkpoint.writer import disk_errors
from lrcompress.errors import InputError, ResourceError
from lrcompress.foreign.gguf_parts import parts_of
from lrcompress.foreign.opening import check_model, open_model
from lrcompress.parallel.processes import processes

MARKER, REPLACED = "lrcompress-partial", "lrcompress-replaced"
"""Files of DIR.partial: the lock, and the output folder of before while the new one takes its place."""


class Workspace:
    """Owns DIR.partial; of several processes the first one does.

    Output lies in it, scratch files in its folder `scratch`; DIR appears by rename.

    On a bad input everything is removed again; on an interruption or a lack of resources it stays for --resume.
    `inputs` are the files and folders that are read meanwhile.
    """

    def __init__(self, output: Path, *, overwrite: bool, resume: bool, inputs: Iterable[Path] = ()) -> None:
        self.output, self.partial = _named(output)
        self.inputs = list(inputs)
        self.scratch = self.partial / "scratch"
        self.overwrite, self.resume = overwrite, resume
        self._lock: BinaryIO | None = None
        self.continued = False
        """Whether there is unfinished work of an earlier run, and it was asked for."""

    def check(self) -> None:
        """InputError where the output folder is in use, or holds something that is read; writes nothing."""
        held = held_input(self.output, self.inputs)
        if held is not None:
            raise InputError(f"output {self.output} holds {held}, which is read: choose another -o")
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"output {self.output} is a file: name a folder with -o")
        if os.path.ismount(self.output):
            raise InputError(f"output {self.output} is where a disk is mounted: name a folder in it with -o")
        if self.partial.exists() and not self.partial.is_dir():
            raise InputError(f"{self.partial} is in the way and is not ours: move it, or choose another -o")
        if self.output.is_dir() and any(self.output.iterdir()) and not self.overwrite:
            raise InputError(f"output folder {self.output} is not empty: choose another with -o, or pass --overwrite")
        if self.partial.exists() and not (self.partial / MARKER).exists() and any(self.partial.iterdir()):
            raise InputError(f"{self.partial} is in the way and is not ours: move it, or choose another -o")

    def __enter__(self) -> "Workspace":
        if processes().first:
            self._open()
        self.continued = processes().gather(self.continued)[0]
        return self

    def _open(self) -> None:
        try:
            if not self.resume:
                self._give_back()
            self.check()
            self.continued = self.resume and (self.partial / MARKER).exists()
            with disk_errors(self.partial):
                self.partial.mkdir(parents=True, exist_ok=True)
                self._lock = self._locked()
                if not self.continued:
                    self._clear()
                self.scratch.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.partial} cannot be written ({error.strerror}): choose another -o") from error

    def _locked(self) -> BinaryIO:
        """The marker, held until it is closed; InputError where another run holds it."""
        lock = (self.partial / MARKER).open("a+b")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise InputError(f"another run is writing {self.partial}: wait for it, or choose another -o") from error
        return lock

    def _give_back(self) -> None:
        """Put the folder that a run was about to replace back, where it was killed just then."""
        if (self.partial / REPLACED).is_dir() and (self.partial / MARKER).exists():
            with self._locked():
                self._put_back()

    def _put_back(self) -> None:
        if not self.output.exists() and (self.partial / REPLACED).is_dir():
            (self.partial / REPLACED).rename(self.output)

    def _clear(self) -> None:
        for path in self.partial.iterdir():
            if path.name != MARKER:
                _remove(path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()
        if isinstance(error, InputError) and not self.continued and processes().first:
            shutil.rmtree(self.partial, ignore_errors=True)

    def claim(self, identity: dict[str, Any]) -> None:
        """Remember what this work is made from; InputError where resumed work was made from something else."""
        path = self.scratch / "identity.json"
        if not processes().first:
            return
        if path.exists():
            before = _notes(path)
            changed = [key for key in identity if before.get(key) != json.loads(json.dumps(identity[key]))]
            if changed:
                raise InputError(
                    f"cannot resume {self.partial}: {', '.join(changed)} changed since; "
                    "run without --resume to start afresh"
                )
        else:
            self._put_back()
            self.check()
            self._clear()  # what lies here belongs to nothing that is known
            with disk_errors(self.partial):
                self.scratch.mkdir()
            write_json(path, identity)

    def check_room(self, needed: int) -> None:
        """ResourceError where the disk has less than `needed` bytes free, what lies here already counted as free."""
        free = shutil.disk_usage(self.partial).free
        free += sum(path.stat().st_size for path in self.partial.rglob("*") if path.is_file())
        if free < needed:
            raise ResourceError(
                f"{self.partial} needs about {needed / 1e6:.0f} MB of disk, {free / 1e6:.0f} MB are free: "
                "free some room, or choose another -o"
            )

    def publish(self) -> None:
        """Remove scratch files and let the output folder appear whole, once all processes have come here.

        At any moment a resumed run finds either the marker beside a report, or the output folder itself. A folder that
        is replaced moves into the new one first, where nothing is anybody else's.
        """
        processes().wait()
        if processes().first:
            self._publish()
        processes().wait()

    def _publish(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        try:
            if self.output.exists():
                self.output.rename(self.partial / REPLACED)
            self.partial.rename(self.output)
        except OSError as error:
            self._put_back()
            raise ResourceError(
                f"the result is finished in {self.partial} but cannot be moved to {self.output} ({error.strerror}): "
                "move it there, or make room and run again, with --resume where the command has it"
            ) from error
        self.forget()

    def forget(self) -> None:
        """Remove from the output folder what publishing needs, or a run that ended meanwhile has left behind."""
        if (self.output / MARKER).exists():
            _remove(self.output / REPLACED)
            (self.output / MARKER).unlink(missing_ok=True)  # another process may have been here


def _named(output: Path) -> tuple[Path, Path]:
    """An output folder, where it is a link what that leads to, and its DIR.partial; InputError where none can be."""
    try:
        output = output.resolve() if output.is_symlink() else output
        partial = output.with_name(output.name + ".partial")
        partial.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"output {str(output)[:80]!r} cannot be a folder's name ({error}): choose another -o"
        ) from error
    return output, partial


def _notes(path: Path) -> dict[str, Any]:
    """What identity.json says; InputError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"cannot resume: {path} is damaged; run without --resume to start afresh")
    return found


@contextmanager
def new_folder(inputs: Iterable[Path], output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write into that becomes `output` at the end, or nothing at all where anything fails.

    InputError where `output` is or holds one of the folders `inputs` that are read meanwhile.
    """
    with Workspace(output, overwrite=overwrite, resume=False, inputs=inputs) as workspace:
        try:
            yield workspace.partial
        except BaseException:
            shutil.rmtree(workspace.partial, ignore_errors=True)
            raise
        workspace.publish()


def held_input(output: Path, inputs: Iterable[Path]) -> Path | None:
    """The first of `inputs` that is `output` or lies in it."""
    target = output.resolve()
    return next((path for path in inputs if target in (path.resolve(), *path.resolve().parents)), None)


def _remove(path: Path) -> None:
    """A file, a link or a folder, so far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path.parent):
        with temporary.open("w", encoding="utf8") as file:
            json.dump(data, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)


def refuse_changed(folder: Path, before: Any, now: dict[str, Any]) -> None:
    """InputError where a finished run in `folder` was made from other files, `before`, than it would be `now`."""
    before = before if isinstance(before, dict) else {}
    changed = [key for key, value in now.items() if before.get(key) != value]
    if changed:
        raise InputError(
            f"{folder} holds a finished run, and {', '.join(changed)} changed since: choose another -o, or pass "
            "--overwrite without --resume"
        )


def model_identity(model: str) -> str:
    """`files_identity` of MODEL."""
    return files_identity(check_model(model) or open_model(model).folder)


def texts_identity(sources: Iterable[Source]) -> dict[str, str]:
    """The digest of every file among the sources of text, by its name."""
    texts = {source.name: source.path for source in sources if source.path is not None}
    return {name: file_digest(path) for name, path in sorted(texts.items())}


def files_identity(model: Path) -> str:
    """A digest of a .gguf file and its other parts, or of a folder's files that a model is read from.

    By name, size, time of change and beginning.
    """
    digest = hashlib.sha256()
    try:
        for path in [*files_read(model), *sorted(model.glob("*.gguf"))] if model.is_dir() else parts_of(model):
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 16))
    except OSError as error:
        raise InputError(f"model {model} cannot be read ({error})") from error
    return digest.hexdigest()
