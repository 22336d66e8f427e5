"""Check all that a release needs, but the upload: `make release-check`.

The wheel is built from the source distribution, for old systems where zig is at hand, and what it
gives to users is tried in fresh environments outside the tree: its tests come from the source
distribution too. Nothing but the package registries is asked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
COMPATIBILITY = "manylinux2014"
# What a release could break that a source tree does not show; --full runs all.
SELECTION = (
    *("tests/test_package.py", "tests/test_public_api.py", "tests/cli/test_doctor.py"),
    *("tests/vocab/test_read.py", "tests/align/test_alignment.py", "tests/test_pair.py"),
    *("tests/projection/test_projection_file.py", "tests/losses/test_losses_baselines.py"),
)
FIRST_LOSS = """
import time
start = time.perf_counter()
import torch
import xtoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

text = "In 1969 a computer with 4,096 words of memory flew 384,400 km."

def tokenizer(size):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    made.train_from_iterator([text] * 2, trainer)
    return made

pair = xtoken.Pair(tokenizer(300), tokenizer(270), cache_dir=False)
distiller = pair.distiller("prefix-kl")
batch = distiller.collate([text])
torch.manual_seed(0)
ids = batch.student["input_ids"], batch.teacher["input_ids"]
student, teacher = (torch.randn(*i.shape, size) for i, size in zip(ids, pair.sizes))
student.requires_grad_()
loss = distiller(student, teacher, batch).loss
loss.backward()
assert loss > 0 and student.grad.abs().sum() > 0
print(f"{time.perf_counter() - start:.1f}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="run all tests on the wheel")
    parser.add_argument("--dirty", action="store_true", help="allow changes that are not committed")
    parser.add_argument("--tag", help="the tag of the release, such as v0.1.0")
    parser.add_argument("--out", type=Path, help="folder for the wheel and sdist that passed")
    options = parser.parse_args()
    if options.out and options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file, expected a folder; name another")
    if not options.dirty:
        step("no change is left uncommitted", check_tree)
    version = step("the versions and addresses agree", lambda: check_versions(options.tag))
    # Outside the tree, so that nothing of it is imported by chance.
    with tempfile.TemporaryDirectory(prefix="xtoken-release-") as made:
        folder = Path(made)
        sdist = step("the source distribution builds", lambda: build_sdist(folder, version))
        source = step("it holds what it needs and nothing else", lambda: unpack(sdist, folder))
        wheel = step(f"a {COMPATIBILITY} wheel builds from it", lambda: build_wheel(folder, source))
        step("PyPI would show both", lambda: check_metadata(sdist, wheel))
        step("the wheel keeps to the stable ABI and its tag", lambda: check_binary(wheel))
        step("pip and Rust alone install the sdist", lambda: install_sdist(folder, sdist))
        step("the wheel works without an extra", lambda: install_base(folder, wheel))
        python = step("from pip install to a first loss", lambda: first_loss(folder, wheel))
        step("its tests pass on it", lambda: run_tests(folder, source, python, options.full))
        step("the crate packs, builds and documents itself", check_crate)
        if options.out:
            keep(options.out, wheel, sdist)
    print(f"xtoken {version} may be released")


def step(what: str, check: Callable[[], object]) -> object:
    """Run one check, and say how long it took."""
    print(f"{what} ...", flush=True)
    start = time.perf_counter()
    found = check()
    print(f"{what}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def run(*command: object, **options: object) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    if done.returncode:
        fail(f"{' '.join(map(str, command))[:300]}\n{done.stdout[-6000:]}")
    return done.stdout


def fail(message: str) -> None:
    sys.exit(f"release-check: {message}")


def check_tree() -> None:
    if left := run("git", "status", "--porcelain", cwd=ROOT):
        fail(f"commit or remove these first:\n{left}")


def check_versions(tag: str | None) -> str:
    """Every file that names the version or the repository names the same."""
    project = tomllib.loads(read("pyproject.toml"))["project"]
    workspace = tomllib.loads(read("Cargo.toml"))["workspace"]["package"]
    crate = tomllib.loads(read("rust/Cargo.toml"))["package"]
    locked = tomllib.loads(read("Cargo.lock"))["package"]
    (core,) = (item["version"] for item in locked if item["name"] == "xtoken-core")
    released = re.search(r"^## \[(\d[^\]]*)\]", read("CHANGELOG.md"), re.MULTILINE)
    versions = {
        "pyproject.toml": project["version"],
        "Cargo.toml": workspace["version"],
        "Cargo.lock": core,
        "CITATION.cff": field("version"),
        "CHANGELOG.md": released[1] if released else "no released version",
    }
    if tag is not None:
        versions["the tag"] = tag.removeprefix("v")
    same(versions)
    same(
        {
            "pyproject.toml": project["urls"]["Repository"],
            "rust/Cargo.toml": crate["repository"],
            "CITATION.cff": field("repository-code"),
        }
    )
    same({"LICENSE": read("LICENSE"), "rust/LICENSE": read("rust/LICENSE")})
    return project["version"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def field(name: str) -> str:
    """A value at the top of CITATION.cff."""
    found = re.search(rf"^{name}: (.*)$", read("CITATION.cff"), re.MULTILINE)
    return found[1].strip('"') if found else f"no {name}"


def same(values: dict[str, str]) -> None:
    if len(set(values.values())) > 1:
        fail("; ".join(f"{name} says {value[:80]}" for name, value in values.items()))


def build_sdist(folder: Path, version: str) -> Path:
    run("maturin", "sdist", "--out", folder / "sdist", cwd=ROOT)
    sdist = folder / "sdist" / f"xtoken-{version}.tar.gz"
    if not sdist.is_file():
        fail(f"{sdist.name} was not made")
    return sdist


def unpack(sdist: Path, folder: Path) -> Path:
    """The sources, with what pip, PyPI and the tests need, and nothing that git does not know."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    needed = ("PKG-INFO", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md")
    needed += ("Cargo.lock", "rust/LICENSE", "python/xtoken/py.typed", "python/xtoken/_core.pyi")
    if missing := [name for name in needed if not (source / name).is_file()]:
        fail(f"{sdist.name} lacks {', '.join(missing)}")
    known = set(run("git", "ls-files", "--cached", "--others", "--exclude-standard",
                    cwd=ROOT).splitlines())  # fmt: skip
    held = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    if strange := sorted(held - known - {"PKG-INFO"}):
        fail(f"{sdist.name} holds files that git does not know: {', '.join(strange[:8])}")
    return source


def build_wheel(folder: Path, source: Path) -> Path:
    """Build in the unpacked sources."""
    command = ["maturin", "build", "--release", "--locked", "--out", folder / "wheel"]
    if sys.platform == "linux":
        command += ["--zig", "--compatibility", COMPATIBILITY]
    run(*command, cwd=source, env=os.environ | kept_builds())
    (wheel,) = (folder / "wheel").glob("*.whl")
    return wheel


def kept_builds() -> dict[str, str]:
    """The environment of a build that keeps what it compiles of other crates for the next.

    Ours is compiled each time: files of an archive have old dates, by which cargo would take what
    it built of another version for this one.
    """
    target = ROOT / "target" / "release-check"
    for found in target.glob("**/.fingerprint/xtoken-core-*"):
        shutil.rmtree(found)
    return {"CARGO_TARGET_DIR": str(target)}


def check_metadata(sdist: Path, wheel: Path) -> None:
    run("twine", "check", "--strict", sdist, wheel)


def check_binary(wheel: Path) -> None:
    run("abi3audit", "--strict", wheel)
    if sys.platform == "linux":
        shown = " ".join(run("auditwheel", "show", wheel).split())
        tag = re.search(
            r'constrained by the platform tag: "([^"]+)"|following platform tag: "([^"]+)"', shown
        )
        print(f"  {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB; auditwheel: {tag and tag[0]}")
        if not re.search(r'platform tag: "manylinux_2_(5|12|17)_', shown):
            fail(f"{wheel.name} needs a younger system than its tag says:\n{shown}")


def environment(folder: Path, name: str) -> Path:
    """The interpreter of a fresh virtual environment."""
    run(PYTHON, "-m", "venv", folder / name)
    return folder / name / ("Scripts" if os.name == "nt" else "bin") / "python"


@contextmanager
def elsewhere(folder: Path):
    """Arguments of `run` for a place in which the tree is not importable."""
    place = folder / "elsewhere"
    place.mkdir(exist_ok=True)
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "XTOKEN_CACHE")
    yield {
        "cwd": place,
        "env": {k: v for k, v in os.environ.items() if k not in hidden} | {"XTOKEN_CACHE": "off"},
    }


def pip(python: Path, *what: object, **options: object) -> None:
    run(python, "-m", "pip", "install", "--quiet", *what, **options)


def install_sdist(folder: Path, sdist: Path) -> None:
    """As a user without a wheel does it: pip fetches the build tools, cargo the crates."""
    python = environment(folder, "from-sdist")
    with elsewhere(folder) as place:
        place["env"] |= kept_builds()
        pip(python, sdist, **place)
        run(python.with_name("xtoken"), "doctor", **place)
    shutil.rmtree(folder / "from-sdist")


def install_base(folder: Path, wheel: Path) -> None:
    python = environment(folder, "base")
    with elsewhere(folder) as place:
        pip(python, wheel, **place)
        found = json.loads(run(python.with_name("xtoken"), "doctor", "--json", **place))
        if not found["ok"] or found["devices"]["torch_threads"] is not None:
            fail(f"xtoken doctor found {found['findings']}")
        if not Path(found["folder"]).is_relative_to(folder):
            fail(f"xtoken was imported from {found['folder']}")
        timed = (
            "import time; start = time.perf_counter(); import xtoken\n"
            "print(round(time.perf_counter() - start, 2))"
        )
        print(f"  import xtoken: {run(python, '-c', timed, **place).strip()} s")
        refused = (
            "import xtoken\ntry:\n    import xtoken.losses\n"
            "except ImportError as error:\n    print(error)\nelse:\n    raise SystemExit(1)"
        )
        run(python, "-c", refused, **place)
    shutil.rmtree(folder / "base")


def first_loss(folder: Path, wheel: Path) -> Path:
    """Seconds from `pip install` in a fresh environment to a loss with its gradient."""
    python = environment(folder, "wheel")
    with elsewhere(folder) as place:
        start = time.perf_counter()
        pip(python, f"{wheel}[torch]", **place)
        installed = time.perf_counter() - start
        seconds = run(python, "-c", FIRST_LOSS, **place).strip().splitlines()[-1]
        again = run(python, "-c", FIRST_LOSS, **place).strip().splitlines()[-1]
    print(f"  pip install {installed:.0f} s, then the first loss {seconds} s; once more {again} s")
    return python


def run_tests(folder: Path, source: Path, python: Path, full: bool) -> None:
    """The tests of the source distribution, in a copy without the sources."""
    place = folder / "tests"
    place.mkdir()
    for item in source.iterdir():
        if item.name not in ("python", "rust", "Cargo.toml", "Cargo.lock"):
            shutil.move(item, place / item.name)
    requirements = [PYTHON, place / "scripts" / "requirements.py"]
    with elsewhere(folder) as outside:
        pip(python, "--no-compile", *run(*requirements, "dev").split(), **outside)
        pip(python, "--no-compile", "--no-deps", *run(*requirements, "data").split(), **outside)
        tests = ["-n", os.environ.get("JOBS", "2"), "--dist", "loadfile"] if full else SELECTION
        said = run(
            python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests,
            cwd=place, env=outside["env"],
        )  # fmt: skip
    print(f"  {said.strip().splitlines()[-1]}")


def keep(out: Path, *files: Path) -> None:
    """Leave what passed in a folder, before the temporary one goes."""
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        print(f"kept: {shutil.copy2(file, out)}")


def check_crate() -> None:
    run("cargo", "package", "--package", "xtoken-core", "--locked", "--allow-dirty", cwd=ROOT)
    listed = run(
        "cargo", "package", "--package", "xtoken-core", "--list", "--allow-dirty", cwd=ROOT
    )
    if missing := {"README.md", "LICENSE", "src/lib.rs"} - set(listed.split()):
        fail(f"the crate lacks {', '.join(sorted(missing))}")
    run(
        "cargo", "doc", "--package", "xtoken-core", "--no-deps", "--locked",
        cwd=ROOT, env=os.environ | {"RUSTDOCFLAGS": "-D warnings"},
    )  # fmt: skip


if __name__ == "__main__":
    main()
