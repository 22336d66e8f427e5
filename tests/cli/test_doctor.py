"""`xtoken doctor`: what it says of an installation, of caches and of a pair, and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizer_zoo as zoo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

import xtoken
from xtoken import Projection
from xtoken.cli import app
from xtoken.cli.distill_settings import Settings, kept_settings
from xtoken.cli.doctor_installation import Package, extras_of, needed_packages, package_findings

WIDE = {"COLUMNS": "200", "TERM": "dumb"}
METADATA = [
    "numpy>=2.0",
    'torch>=2.6 ; extra == "torch"',
    'xtoken[torch] ; extra == "train"',
    'datasets>=4.0 ; extra == "train"',
    'a-package-that-nobody-has>=1 ; extra == "train"',
    'numpy>=99 ; python_version < "3" and extra == "train"',
    'xtoken[train] ; extra == "trl"',
    'trl>=1.16 ; extra == "trl"',
    'ruff==0.17.6 ; extra == "dev"',
]


def doctor(*arguments: str | Path, **environment: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments)], env=WIDE | environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def report(*arguments: str | Path, **environment: str) -> tuple[int, dict[str, Any]]:
    code, output = doctor(*arguments, "--json", **environment)
    return code, json.loads(output)


def line(content: dict[str, Any], subject: str) -> dict[str, str]:
    """The only finding on a subject."""
    found = [item for item in content["findings"] if item["subject"] == subject]
    assert len(found) == 1, content["findings"]
    return found[0]


@pytest.fixture(name="pair", scope="module")
def _pair(folder: Path) -> list[str]:
    return ["--student", str(folder / "student"), "--teacher", str(folder / "teacher")]


def test_versions_extras_devices_and_caches_are_printed(tmp_path: Path) -> None:
    code, output = doctor(XTOKEN_CACHE=str(tmp_path), OMP_NUM_THREADS="3")
    assert code == 0, output
    assert f"{xtoken.__version__} (core {xtoken.__version__})" in output
    for expected in ("numpy", "torch uses", str(tmp_path), "OMP_NUM_THREADS", "nothing is broken"):
        assert expected in output


def test_json_holds_the_same(tmp_path: Path) -> None:
    code, content = report(XTOKEN_CACHE=str(tmp_path))
    assert code == 0
    assert content["ok"]
    assert content["core"] == xtoken.__version__
    assert content["devices"]["torch_threads"] > 0
    assert {folder["name"] for folder in content["caches"]} == {"xtoken", "hub"}
    assert content["environment"]["XTOKEN_CACHE"] == str(tmp_path)


def test_a_package_belongs_to_the_smallest_extra_and_a_missing_one_names_its_command() -> None:
    packages = list(needed_packages(METADATA))
    assert {item.name: item.extra for item in packages} == {
        "numpy": "",
        "torch": "torch",
        "datasets": "train",
        "a-package-that-nobody-has": "train",
        "trl": "trl",
    }
    torch, train, trl = extras_of(METADATA, packages)
    assert torch.missing == ()
    assert train.missing == trl.missing == ("a-package-that-nobody-has",)
    assert train.command == 'pip install "xtoken[train]"'
    assert not list(package_findings(packages, xtoken.__version__))


@pytest.mark.parametrize(
    ("package", "version", "message"),
    [
        (Package("torch", "2.3.0+cpu", ">=2.6", "torch"), None, "it is 2.3.0+cpu, xtoken needs"),
        (Package("numpy", None, ">=2.0", ""), None, "xtoken needs it and it is not installed"),
        (Package("numpy", "2.0.0", ">=2.0", ""), "0.0.1", "the package is 0.0.1, its compiled"),
    ],
)
def test_what_does_not_fit_is_broken(package: Package, version: str | None, message: str) -> None:
    (found,) = package_findings([package], version or xtoken.__version__)
    assert found.status == "broken"
    assert message in found.text
    assert "pip install" in found.text


def test_a_development_version_of_torch_will_do() -> None:
    package = Package("torch", "2.16.0.dev20261101+cu130", ">=2.6", "torch")
    assert not list(package_findings([package], xtoken.__version__))


def test_secrets_are_not_printed() -> None:
    _, output = doctor(HF_TOKEN="hf_secret", HF_ENDPOINT="https://me:secret@hub.example/x")
    assert "secret" not in output
    assert "https://hub.example/x" in output


def test_a_pair_that_works_has_a_line_for_each_part(pair: list[str], tmp_path: Path) -> None:
    code, first = report(*pair, XTOKEN_CACHE=str(tmp_path))
    assert code == 0
    assert {item["status"] for item in first["pair"]} == {"ok"}
    assert [item["subject"] for item in first["pair"]] == [
        *("student", "teacher", "W", "alignment", "student's stops", "teacher's stops"),
        "stops in W",
    ]
    assert "100.0% of the student's bytes" in line(first, "alignment")["text"]
    assert "<|end_of_text|>" in line(first, "student's stops")["text"]
    assert f"kept in {tmp_path}" in line(first, "W")["text"]
    _, second = report(*pair, XTOKEN_CACHE=str(tmp_path))
    assert "read from the cache" in line(second, "W")["text"]
    assert second["caches"][0]["kept"][0]["count"] == 1


def test_each_side_that_cannot_be_read_is_one_line(pair: list[str], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    code, content = report("--student", tmp_path / "none", "--teacher", tmp_path)
    assert code == 1
    assert not content["ok"]
    assert "does not exist" in line(content, "student")["text"]
    assert line(content, "teacher")["status"] == "broken"
    assert [item["subject"] for item in content["pair"]] == ["student", "teacher"]
    code, output = doctor("--student", tmp_path / "none", *pair[2:])
    assert code == 1
    assert "1 broken" in output


def test_one_side_alone_is_refused(pair: list[str]) -> None:
    result = CliRunner().invoke(app, ["doctor", *pair[:2]], env=WIDE)
    assert "--student and --teacher go together" in str(result.exception)


def test_a_model_with_fewer_rows_than_its_tokenizer_has_ids_is_broken(
    pair: list[str], tmp_path: Path
) -> None:
    source = Path(pair[1])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    code, content = report("--student", tmp_path, *pair[2:])
    assert code == 1
    assert (
        "vocab_size = 1,000, the tokenizer has 1,700 ids"
        in line(content, "student's model")["text"]
    )


def test_a_side_that_nothing_stops_and_a_stop_without_partner_are_warned_of(
    tmp_path: Path,
) -> None:
    whole = json.loads(zoo.byte_level_bpe(2000, 1).to_str())
    whole["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    student = tmp_path / "student.json"
    zoo.byte_level_bpe(2000, 3).save(str(student))
    code, content = report("--student", student, "--teacher", tmp_path)
    assert code == 0
    found = line(content, "teacher's stops")
    assert found["status"] == "warning"
    assert "nothing stops it, so no end is distilled" in found["text"]


def test_sides_that_spell_nothing_alike_are_broken(tmp_path: Path) -> None:
    """Of a WordPiece vocabulary of one word every text is unknown tokens alone."""
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "zzz": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    words.save(str(tmp_path / "words.json"))
    zoo.byte_level_bpe(2000, 1).save(str(tmp_path / "bytes.json"))
    code, content = report(
        "--student", tmp_path / "words.json", "--teacher", tmp_path / "bytes.json"
    )
    assert code == 1
    assert "lossy" in line(content, "student")["text"]
    assert line(content, "alignment")["status"] == "broken"


def test_a_damaged_projection_and_a_stale_file_are_named_and_left(
    pair: list[str], tmp_path: Path
) -> None:
    student, teacher = pair[1], pair[3]
    Projection.build(student, teacher, cache_dir=tmp_path)
    (kept,) = tmp_path.glob("projection-*.safetensors")
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    stale = tmp_path / ".w.00000000-1-00000000.xtoken-tmp"
    stale.write_bytes(b"1234")
    os.utime(stale, (0, 0))
    code, found = report(XTOKEN_CACHE=str(tmp_path))
    assert code == 0
    damage, left = (item for item in found["findings"] if item["subject"] == "cache")
    assert damage["status"] == "warning"
    assert str(kept) in damage["text"]
    assert left["status"] == "note"
    assert (found["caches"][0]["stale"], found["caches"][0]["stale_size"]) == (1, 4)
    assert found["caches"][0]["kept"][0]["note"] == "1 damaged"
    assert stale.exists()


def test_settings_that_a_help_keeps_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path))
    kept_settings(lambda: Settings([], {}, {}))
    (file,) = tmp_path.rglob("*.json")
    _, found = report(XTOKEN_CACHE=str(tmp_path))
    (kept,) = [each for each in found["caches"][0]["kept"] if "--help" in each["what"]]
    assert (kept["count"], kept["size"]) == (1, file.stat().st_size)


def test_a_cache_that_is_a_file_is_broken_and_one_that_is_off_is_not(tmp_path: Path) -> None:
    file = tmp_path / "cache"
    file.write_text("")
    code, content = report(XTOKEN_CACHE=str(file))
    assert code == 1
    assert f"{file} is a file" in line(content, "cache")["text"]
    code, content = report(XTOKEN_CACHE="off")
    assert code == 0
    assert content["caches"][0]["path"] is None


def run_apart(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that finds the modules of a folder first."""
    source = str(Path(xtoken.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", f"{code}\nfrom xtoken.cli import main; main()", "doctor", "--json"],
        capture_output=True,
        text=True,
        env=os.environ | WIDE | {"PYTHONPATH": os.pathsep.join([str(folder), source])},
    )


def test_without_torch_none_is_imported(tmp_path: Path) -> None:
    block = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Blocked())"
    )
    done = run_apart(block, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["devices"]["torch_threads"] is None


def test_a_torch_that_cannot_be_imported_is_broken(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    missing = "libcudart.so.13: cannot open shared object file"
    (tmp_path / "torch" / "__init__.py").write_text(f"raise OSError({missing!r})")
    done = run_apart("", tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    found = line(json.loads(done.stdout), "torch")
    assert found["status"] == "broken"
    assert missing in found["text"]
