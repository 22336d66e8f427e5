"""What is installed: versions, extras, devices, and the environment variables that matter."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

import xtoken._core
from xtoken._extras import installed
from xtoken._files import CACHE_VARIABLE
from xtoken.cli.command import TRACEBACK_VARIABLE
from xtoken.cli.doctor_findings import Finding, one_line

_EXTRA = re.compile(r"extra == ['\"]([\w-]+)['\"]")
# Extras of people who change xtoken, not of those who use it.
_OURS = ("dev", "docs")
# By what changes when it is set.
_VARIABLES = {
    "xtoken": (CACHE_VARIABLE, TRACEBACK_VARIABLE, "XDG_CACHE_HOME", "PYTHONPATH"),
    "hub": (
        *("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN"),
        *("TRANSFORMERS_OFFLINE",),
    ),
    "threads": ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM"),
    "devices": ("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF"),
    "processes": ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Package:
    """A package that xtoken needs, always or for an extra.

    Attributes:
        name: on PyPI.
        version: that is installed; None where it is not.
        needed: the versions that will do, as in ">=2.6"; empty for any.
        extra: the smallest extra that brings it; empty for what every installation has.
    """

    name: str
    version: str | None
    needed: str
    extra: str


@dataclass(frozen=True)
class Extra:
    """An extra of xtoken.

    Attributes:
        name: as in `pip install "xtoken[NAME]"`.
        missing: its packages that are not installed.
    """

    name: str
    missing: tuple[str, ...]

    @property
    def command(self) -> str:
        """What installs it."""
        return f'pip install "xtoken[{self.name}]"'


@dataclass(frozen=True)
class Devices:
    """What computes.

    Attributes:
        threads: of the CPU that this process may use.
        memory: of the machine, in bytes; 0 where the system does not say.
        cuda: name and memory in bytes of each GPU that torch sees.
        torch_threads: those that torch uses; None without torch.
    """

    threads: int
    memory: int
    cuda: tuple[tuple[str, int], ...] = ()
    torch_threads: int | None = None


@dataclass(frozen=True)
class Installation:
    """See `installation`."""

    xtoken: str
    core: str
    python: str
    system: str
    folder: str
    packages: tuple[Package, ...]
    extras: tuple[Extra, ...]
    devices: Devices
    environment: Mapping[str, str]
    findings: list[Finding] = field(default_factory=list)


def installation() -> Installation:
    """Look at this installation; torch is imported where it is installed."""
    findings: list[Finding] = []
    try:
        version = metadata.version("xtoken")
        lines = metadata.requires("xtoken") or []
    except metadata.PackageNotFoundError:
        version, lines = "not installed", []
        findings.append(
            Finding(
                "warning",
                "xtoken",
                "it is imported from a source tree and not installed, so its requirements are not "
                "known; install it with pip install .",
            )
        )
    packages = tuple(needed_packages(lines))
    findings += package_findings(packages, version)
    return Installation(
        xtoken=version,
        core=xtoken._core.__version__,
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        system=f"{platform.system()} {platform.machine()}",
        folder=str(Path(xtoken._core.__file__).resolve().parent),
        packages=packages,
        extras=extras_of(lines, packages),
        devices=devices(findings),
        environment=environment(),
        findings=findings,
    )


def needed_packages(lines: Sequence[str]) -> Iterator[Package]:
    """The packages that the lines of a package's metadata require on this machine.

    Args:
        lines: as `importlib.metadata.requires` gives them.
    """
    found: dict[str, Package] = {}
    opened = {extra: set(_opened(extra, lines)) for extra in ("", *_extras(lines))}
    # An extra that another one includes is the smaller one.
    for extra in sorted(opened, key=lambda name: (len(opened[name]), name)):
        for requirement in opened[extra]:
            name = canonicalize_name(requirement.name)
            if name not in found:
                found[name] = Package(
                    requirement.name, _version(name), str(requirement.specifier), extra
                )
    order = ["", *_extras(lines)]
    yield from sorted(found.values(), key=lambda item: (order.index(item.extra), item.name))


def extras_of(lines: Sequence[str], packages: Sequence[Package]) -> tuple[Extra, ...]:
    """Each extra of the metadata's lines, with what is missing of it."""
    versions = {canonicalize_name(item.name): item.version for item in packages}
    return tuple(
        Extra(
            extra,
            tuple(
                sorted(
                    requirement.name
                    for requirement in _opened(extra, lines)
                    if versions.get(canonicalize_name(requirement.name)) is None
                )
            ),
        )
        for extra in _extras(lines)
    )


def package_findings(packages: Sequence[Package], version: str) -> Iterator[Finding]:
    """What is wrong with the versions: a core of another version, packages out of bounds."""
    core = xtoken._core.__version__
    if version not in (core, "not installed"):
        yield Finding(
            "broken",
            "xtoken",
            f"the package is {version}, its compiled core is {core}; install it again: "
            "pip install --force-reinstall xtoken",
        )
    for package in packages:
        if package.version is None:
            if not package.extra:
                yield Finding(
                    "broken",
                    package.name,
                    "xtoken needs it and it is not installed; pip install xtoken",
                )
        elif not _suffices(package):
            what = f'"xtoken[{package.extra}]"' if package.extra else "xtoken"
            yield Finding(
                "broken",
                package.name,
                f"it is {package.version}, xtoken needs {package.needed}; "
                f"pip install --upgrade {what}",
            )


def devices(findings: list[Finding]) -> Devices:
    """What this process may compute on; what is wrong with it goes to `findings`."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = Devices(threads or 1, _memory())
    if not installed("torch"):
        return found
    try:
        import torch
    # Besides ImportError, a library that cannot be loaded is an OSError, and a NumPy of another
    # ABI something else again.
    except Exception as error:
        findings.append(
            Finding(
                "broken",
                "torch",
                f"it is installed and cannot be imported ({one_line(error)}); install it again: "
                'pip install --force-reinstall "xtoken[torch]"',
            )
        )
        return found
    cuda: list[tuple[str, int]] = []
    try:
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            properties = torch.cuda.get_device_properties(index)
            cuda.append((properties.name, properties.total_memory))
    except (RuntimeError, AssertionError) as error:
        findings.append(
            Finding("broken", "CUDA", f"torch cannot use it ({one_line(error)}); see nvidia-smi")
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not cuda and _NVIDIA_DRIVER.exists() and not hidden:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        findings.append(
            Finding(
                "warning",
                "CUDA",
                f"the machine has an NVIDIA driver, and torch {torch.__version__}, built for "
                f"{built}, sees no GPU; install a torch that is built for this driver",
            )
        )
    return Devices(found.threads, found.memory, tuple(cuda), torch.get_num_threads())


def environment() -> dict[str, str]:
    """The variables that matter and are set; of secrets only that they are."""
    found = {}
    for name in (name for names in _VARIABLES.values() for name in names):
        value = os.environ.get(name)
        if value is not None:
            found[name] = _shown(name, value)
    return found


def _shown(name: str, value: str) -> str:
    if name == "HF_TOKEN":
        return "set"
    if name == "HF_ENDPOINT" and "@" in value:
        parts = urlsplit(value)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return value


def _extras(lines: Sequence[str]) -> list[str]:
    """The extras that users install, in the order of the metadata."""
    names = [found[1] for line in lines if (found := _EXTRA.search(line))]
    return [name for name in dict.fromkeys(names) if name not in _OURS]


def _opened(extra: str, lines: Sequence[str]) -> Iterator[Requirement]:
    """What an extra requires beyond the base, those that it includes opened."""
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        marked = _EXTRA.search(line)
        if (marked[1] if marked else "") != extra:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if canonicalize_name(requirement.name) == "xtoken":
            for name in sorted(requirement.extras):
                yield from _opened(name, lines)
        else:
            yield requirement


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _suffices(package: Package) -> bool:
    try:
        specifier = Requirement(f"{package.name}{package.needed}").specifier
        return package.version is None or specifier.contains(package.version, prereleases=True)
    except (InvalidRequirement, InvalidVersion):
        return True


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
