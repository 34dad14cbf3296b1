"""Compiled engines of a bundle: found by what they were built from and for, and never run anywhere else.

    engines/<key>/engine.json   what the engine is: its key in full, files with sha256 and size, measured error
    engines/<key>/...           the backend's own files

The key names the stage, the hash of its graph and weights, the backend and its version, the architecture of GPU or
processor, the precision, the profile and the exporter. An engine that does not fit is refused with the command that
rebuilds it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from lada_rt.bundle import Bundle, FileEntry, demo_bundle_path, file_sha256, parse_proof, read_json
from lada_rt.errors import EngineError

__all__ = [
    "DISTRIBUTIONS",
    "ENGINE_FORMAT",
    "EngineEntry",
    "EngineKey",
    "Machine",
    "engine_report",
    "find_engine",
    "list_engines",
    "misfit",
    "rebuild_command",
    "remedy",
    "this_machine",
    "write_engine",
]

ENTRY_FILE: Final = "engine.json"
ENTRY_LIMIT_BYTES: Final = 1 << 20
#: of engine.json. Engines of format 1, which has no such field, could be too particular for their key: code for the one
#: processor or model of GPU that had built them.
ENGINE_FORMAT: Final = 2
#: backend -> the distributions it may come in
DISTRIBUTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "tensorrt": ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"),
    "torch": ("torch",),
}
Profile = Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class EngineKey:
    """What an engine was built from and for.

    Attributes:
        stage: name.
        network_sha256: `StageEntry.sha256` of the stage in the manifest: graph and weights.
        backend, backend_version: such as "tensorrt" and "11.4.0.106".
        arch: "sm_90"; "sm_80+" for this architecture and later ones; "cpu-x86_64-avx512".
        precision: of the stage.
        profile: axis -> (min, opt, max).
        any_later_version: a later release of the backend runs it too.
        exporter: what built it, for build-engine to see whether it would build the same again.
    """

    stage: str
    network_sha256: str
    backend: str
    backend_version: str
    arch: str
    precision: str
    profile: Profile
    any_later_version: bool = False
    exporter: str = ""

    @property
    def folder_name(self) -> str:
        text = json.dumps({axis: list(sizes) for axis, sizes in self.profile.items()}, sort_keys=True)
        rest = hashlib.sha256((text + self.exporter).encode()).hexdigest()[:8]
        later = "plus" if self.any_later_version else ""
        parts = (
            self.stage, self.network_sha256[:12], self.backend, self.backend_version + later,
            self.arch.replace("+", "plus"), self.precision, rest,
        )  # fmt: skip
        return "-".join(re.sub(r"[^A-Za-z0-9._]", "_", part) for part in parts)

    def to_json(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return data | {"profile": {axis: list(sizes) for axis, sizes in self.profile.items()}}


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """One engine on disk. `description` is what its backend needs to load it."""

    key: EngineKey
    folder: Path
    files: tuple[FileEntry, ...]
    proof: Mapping[str, Any]
    description: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = ENGINE_FORMAT

    def verify(self) -> None:
        """Compare every file with its hash.

        Raises:
            EngineError: one is missing or altered.
        """
        for file in self.files:
            path = self.folder / file.path
            try:
                intact = path.stat().st_size == file.bytes and file_sha256(path) == file.sha256
            except OSError:
                intact = False
            if not intact:
                command = rebuild_command(self.folder.parents[1], self.key)
                raise EngineError(
                    f"{path}: expected {file.bytes} bytes of sha256 {file.sha256[:12]}…, the file is missing or "
                    f"altered; remove {self.folder} and rebuild it with: {command}"
                )


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides whether an engine fits: version of its backend (None: not installed) and architecture."""

    backend_version: str | None
    arch: str


def this_machine(backend: str, device: str = "auto") -> Machine:
    """What this machine offers to a backend.

    Args:
        backend: "tensorrt" or "torch".
        device: "cpu" or "cuda"; "auto" is the GPU where there is one.
    """
    gpu = None if device == "cpu" else _gpu_arch()
    return Machine(_version(backend), gpu or _torch_arch("cpu") or f"cpu-{platform.machine()}")


def _gpu_arch() -> str | None:
    """Architecture of the GPU that engines run on. torch tells, which every one of them needs: it heeds
    CUDA_VISIBLE_DEVICES, may count GPUs in another order than the driver's tool, and needs no such tool in a container.
    Where it sees none or is not installed, the tool tells; loading an engine then says what is missing."""
    return _torch_arch("cuda") or _driver_arch()


def _torch_arch(device: str) -> str | None:
    from lada_rt.engines.torch import device_key

    try:
        return device_key(device)
    except (EngineError, OSError, RuntimeError):  # a broken torch, too, is for the loader to tell of
        return None


@cache
def _driver_arch() -> str | None:
    """Architecture of the first GPU that the driver's own tool lists."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.fullmatch(r"(\d+)\.(\d+)", lines[0]) if lines else None
    return f"sm_{found[1]}{found[2]}" if found else None


def _version(backend: str) -> str | None:
    for distribution in DISTRIBUTIONS[backend]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def list_engines(bundle: Bundle) -> list[EngineEntry]:
    """The engines in a bundle's folder, sorted by name. What cannot be read as one is left out: it is never run."""
    entries = []
    for path in sorted((bundle.path / "engines").glob(f"*/{ENTRY_FILE}")):
        try:
            entries.append(_parse(path.parent, read_json(path, ENTRY_LIMIT_BYTES)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            continue
    return entries


def _parse(folder: Path, data: Any) -> EngineEntry:
    version = data.get("format_version", 1)
    if isinstance(version, bool) or not isinstance(version, int):
        raise ValueError("damaged version")
    key = dict(data["key"])
    profile = {str(axis): (int(low), int(opt), int(high)) for axis, (low, opt, high) in key.pop("profile").items()}
    later = key.pop("any_later_version")
    if not isinstance(later, bool) or not all(isinstance(value, str) for value in key.values()):
        raise ValueError("damaged key")
    files = tuple(FileEntry(Path(f["path"]).name, str(f["sha256"]), int(f["bytes"])) for f in data["files"])
    parsed = EngineKey(**key, profile=profile, any_later_version=later)
    if parsed.folder_name != folder.name or not files or parsed.backend not in DISTRIBUTIONS:
        raise ValueError("the folder's name is not the key's")
    proof = parse_proof(data["proof"])
    if "max_rel_error" not in proof:
        raise ValueError("no measured error")
    return EngineEntry(parsed, folder, files, proof, dict(data["description"]), version)


def misfit(entry: EngineEntry, bundle: Bundle, machine: Machine) -> str | None:
    """Why an engine must not run here: None if it fits."""
    key = entry.key
    stage = bundle.stages.get(key.stage)
    if stage is None or stage.sha256 != key.network_sha256 or stage.precision != key.precision:
        return "was built from another network than the bundle's"
    if entry.format_version != ENGINE_FORMAT:
        age = "an older" if entry.format_version < ENGINE_FORMAT else "a newer"
        return f"was built by {age} lada-rt: it is of format {entry.format_version}, this one runs {ENGINE_FORMAT}"
    if machine.backend_version is None:
        return f"needs {key.backend} {key.backend_version}, which is not installed"
    same = machine.backend_version == key.backend_version
    if not same and not (key.any_later_version and _numbers(machine.backend_version) >= _numbers(key.backend_version)):
        return f"was built by {key.backend} {key.backend_version}, this is {machine.backend_version}"
    if machine.arch != key.arch and not _later_arch(machine.arch, key.arch):
        return f"was built for {key.arch}, this device is {machine.arch}"
    return None


def _numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version.split("+")[0])]


def _later_arch(found: str, wanted: str) -> bool:
    return (
        wanted.endswith("+")
        and found.startswith("sm_")
        and wanted.startswith("sm_")
        and _numbers(found) >= _numbers(wanted.removesuffix("+"))
    )


def engine_report(bundle: Bundle) -> list[dict[str, Any]]:
    """Every engine of a bundle, its measured error, and why it does not run here (None: it does), as plain data."""
    return [
        {
            "engine": entry.folder.name,
            **entry.key.to_json(),
            "bytes": sum(file.bytes for file in entry.files),
            "proof": dict(entry.proof),
            "misfit": misfit(
                entry,
                bundle,
                this_machine(entry.key.backend, "cpu" if _is_cpu(entry.key.arch) else "auto"),
            ),
        }
        for entry in list_engines(bundle)
    ]


def find_engine(bundle: Bundle, stage: str, backend: str, machine: Machine) -> EngineEntry:
    """The engine of a stage that fits, its files verified.

    Raises:
        EngineError: there is none; the message says what there is and how to build one.
    """
    reasons = []
    # what was built for this very machine is faster than what runs on others too
    for entry in sorted(list_engines(bundle), key=lambda e: (e.key.arch.endswith("+"), e.key.any_later_version)):
        if entry.key.stage != stage or entry.key.backend != backend:
            continue
        reason = misfit(entry, bundle, machine)
        if reason is None:
            entry.verify()
            return entry
        reasons.append((reason, entry.key))
    if reasons:
        reason, key = reasons[-1]
        raise EngineError(f"{stage}: the {backend} engine {reason}; {remedy(bundle.path, key, machine)}")
    raise EngineError(
        f"{stage}: {bundle.path} has no {backend} engine; build it with: "
        f"{rebuild_command(bundle.path, backend=backend, on_cpu=_is_cpu(machine.arch))}"
    )


def remedy(bundle: Path, key: EngineKey, machine: Machine) -> str:
    """What to do about an engine that does not fit a machine."""
    if machine.backend_version is None:
        return 'install it with: pip install "lada-rt[gpu]"'
    return f"rebuild it with: {rebuild_command(bundle, key, on_cpu=_is_cpu(machine.arch))}"


def _is_cpu(arch: str) -> bool:
    return arch.startswith("cpu-")


def rebuild_command(
    bundle: Path, key: EngineKey | None = None, *, backend: str = "", on_cpu: bool | None = None
) -> str:
    """The command that builds an engine into a bundle; the checkpoint's place is the user's to fill in.

    Args:
        bundle: its folder. Of the embedded demo bundle a second one is built: an installed package stays as it is.
        key: of an engine to take the options from.
        backend: without a key.
        on_cpu: build for the CPU, on a machine with a GPU too; None does as the key says.
    """
    name = key.backend if key is not None else backend
    # the other stages follow the option only when named in it
    follows = key is not None and key.stage in ("denoiser", "flow")
    precision = f" --precision {key.precision}" if key is not None and follows else ""
    if on_cpu is None:
        on_cpu = key is not None and _is_cpu(key.arch)
    options = f"--backend {name}{precision}{' --device cpu' if on_cpu else ''}"
    if bundle.resolve() == demo_bundle_path().resolve():
        return f"lada-rt build-engine --demo --out demo.bundle {options}, and use --bundle demo.bundle"
    return f"lada-rt build-engine --checkpoint CKPT --pretrained-root DIR --out {bundle} {options}"


def write_engine(
    folder: Path,
    key: EngineKey,
    files: Sequence[Path],
    proof: Mapping[str, Any],
    description: Mapping[str, Any] | None = None,
) -> EngineEntry:
    """Put a proven engine into its place, whole or not at all.

    Args:
        folder: the bundle's `engines` folder.
        key: of the engine.
        files: on the same disk; they are moved.
        proof: what was measured.
        description: what the backend needs to load it.
    """
    target = folder / key.folder_name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    entries = []
    for file in files:
        entries.append(FileEntry(file.name, file_sha256(file), file.stat().st_size))
        file.rename(target / file.name)
    data = {
        "format_version": ENGINE_FORMAT,
        "key": key.to_json(),
        "files": [f.to_json() for f in entries],
        "proof": dict(proof),
        "description": dict(description or {}),
    }
    temporary = target / (ENTRY_FILE + ".new")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(target / ENTRY_FILE)
    return EngineEntry(key, target, tuple(entries), dict(proof), dict(description or {}))
