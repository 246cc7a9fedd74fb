"""A manifest made to harm, its hash in order: refused before anything is opened or allocated."""

from __future__ import annotations

import hashlib
import json
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disks import same, state

import shardwise as sw
from shardwise.checkpoint import CheckpointError, manifest, parse

HUGE = 2**62
BY_CONTENT = ("another type|header", "header", "sha256")  # seen only once files are read


def body_of(root: Path) -> dict[str, Any]:
    found = json.loads((root / "step-00000001" / "manifest.json").read_text())
    del found["sha256"]
    return found


def refuse(root: Path, text: bytes, match: str) -> CheckpointError:
    (root / "step-00000001" / "manifest.json").write_bytes(text)
    acts = [lambda: sw.checkpoint.restore(root, state(0)), lambda: sw.checkpoint.verify(root, 1)]
    if match not in BY_CONTENT:
        acts.append(lambda: sw.checkpoint.inspect(root, 1))
    for act in acts:
        with pytest.raises(CheckpointError, match=match) as caught:
            act()
    assert "manifest.json" in str(caught.value) or "shard-" in str(caught.value)
    return caught.value


@pytest.fixture
def root(tmp_path: Path) -> Path:
    sw.checkpoint.save(tmp_path, state(1), step=1)
    return tmp_path


def _set(*where: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        inner: Any = body
        for key in where[:-1]:
            inner = inner[key]
        inner[where[-1]] = to

    return change


def _w(*where: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    return _set("tensors", "w", *where, to=to)


def _both(*changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        for one in changes:
            one(body)

    return change


CASES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a path upwards": (
        _set("files", 0, 0, to="../../shard-00000.safetensors"),
        "no name of",
    ),
    "an absolute path": (_set("files", 0, 0, to="/etc/passwd"), "no name of"),
    "a path below": (_set("files", 0, 0, to="a/shard-00000.safetensors"), "no name of"),
    "a name with a zero byte": (_set("files", 0, 0, to="shard-00000.safetensors\0"), "no name"),
    "a name with a line end": (_set("files", 0, 0, to="shard-00000.safetensors\n"), "no name"),
    "the manifest as data": (_set("files", 0, 0, to="manifest.json"), "no name of"),
    "a file twice": (_set("files", 1, 0, to="shard-00000.safetensors"), "listed twice"),
    "another file": (_set("files", 1, 0, to="shard-00007.safetensors"), "is missing"),
    "a negative length": (_set("files", 0, 1, to=-1), "from 0 to"),
    "a huge length": (_set("files", 0, 1, to=HUGE), "length"),
    "a length of text": (_set("files", 0, 1, to="12"), "from 0 to"),
    "a length that is true": (_set("files", 0, 1, to=True), "from 0 to"),
    "no hash": (_set("files", 0, 2, to="abc"), "no sha256"),
    "a hash that is no text": (_set("files", 0, 2, to=3), "no sha256"),
    "files as object": (_set("files", to={}), "expected a list"),
    "a file of two": (_set("files", 0, to=["shard-00000.safetensors", 3]), "list of 3"),
    "an unknown dtype": (_w("dtype", to="Q7"), "unknown dtype"),
    "a dtype that is a list": (_w("dtype", to=["F32"]), "unknown dtype"),
    "another dtype": (_w("dtype", to="F64"), "length"),
    "another dtype of one size": (_w("dtype", to="I32"), "another type|header"),
    "a huge shape": (_w("shape", to=[HUGE, HUGE]), "too large"),
    "a shape larger than its files": (_w("shape", to=[10**9, 2]), "gap"),
    "a negative shape": (_w("shape", to=[-4, -2]), "from 0 to"),
    "a shape of floats": (_w("shape", to=["4", 2]), "from 0 to"),
    "a hundred dims": (_w("shape", to=[1] * 100), "at most 64"),
    "another shape": (_w("shape", to=[2, 4]), "outside|gap|overlap"),
    "one dim less": (_w("shape", to=[8]), "number of dims"),
    "a gap": (_w("blocks", 1, 1, to=[3, 0]), "gap"),
    "an overlap": (_w("blocks", 1, 1, to=[1, 0]), "overlap"),
    "a block twice": (_w("blocks", 1, slice(1, 3), to=[[0, 0], [2, 2]]), "overlaps"),
    "overlap and gap": (_w("blocks", 1, slice(1, 3), to=[[1, 0], [3, 2]]), "overlaps"),
    "a block outside": (_w("blocks", 1, slice(1, 3), to=[[4, 0], [6, 2]]), "outside"),
    "a negative start": (_w("blocks", 0, 1, to=[-2, 0]), "from 0 to"),
    "a block turned round": (_w("blocks", 0, slice(1, 3), to=[[2, 2], [0, 0]]), "holds nothing"),
    "a block in no file": (_w("blocks", 0, 0, to=99), "not listed"),
    "a block in a negative file": (_w("blocks", 0, 0, to=-1), "from 0 to"),
    "two blocks in one file": (_w("blocks", 1, 0, to=0), "two blocks in one file"),
    "blocks in each other's files": (
        _both(_w("blocks", 0, 0, to=1), _w("blocks", 1, 0, to=0)),
        "header",
    ),
    "no blocks": (_w("blocks", to=[]), "gap"),
    "a block with a tail": (_w("blocks", 0, to=[0, [0, 0], [2, 2], "0" * 64, 5]), "list of 4"),
    "another block's hash": (_w("blocks", 0, 3, to="0" * 64), "sha256"),
    "a mesh that is a list": (_w("mesh", to=[]), "expected an object"),
    "an unknown key": (_w("extra", to=1), "unknown or missing keys"),
    "an unknown key at the top": (_set("extra", to=1), "unknown or missing keys"),
    "a missing key": (lambda body: body.pop("values"), "unknown or missing keys"),
    "another format": (_set("format", to="zip"), "not a checkpoint"),
    "a newer version": (_set("version", to=2), "version of the format is unknown"),
    "a version that is true": (_set("version", to=True), "version of the format is unknown"),
    "another step": (_set("step", to=7), "step differs"),
    "a huge step": (_set("step", to=10**30), "from 0 to"),
    "an unknown kind": (_set("values", "seen", to=["pickle", "x"]), "unknown kind"),
    "a kind that is a list": (_set("values", "seen", to=[[], 1]), "unknown kind"),
    "an int that is a text": (_set("values", "seen", to=["int", "1"]), "not a value of kind int"),
    "an int that is true": (_set("values", "seen", to=["int", True]), "not a value of kind int"),
    "a float that is code": (_set("values", "seen", to=["float", "exit()"]), "kind float"),
    "a long float": (_set("values", "seen", to=["float", "1" * 10**5]), "kind float"),
    "a key of three": (_set("values", "key", to=["key", [1, 2, 3]]), "kind key"),
    "a key of large words": (_set("values", "key", to=["key", [2**32, 1]]), "kind key"),
    "tensor and value": (_set("values", "w", to=["int", 1]), "both as tensor and as value"),
    "the header's own name": (_set("tensors", "__metadata__", to={}), "no tree path"),
    "a long path": (_set("values", "x" * 10**5, to=["int", 1]), "no tree path"),
    "a text where tensors are": (_set("tensors", to="w"), "expected an object"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_manifest_that_lies(root: Path, case: str) -> None:
    change, match = CASES[case]
    body = body_of(root)
    change(body)
    refuse(root, manifest.seal(body), match)


def _seal(text: str | bytes) -> bytes:
    """A raw JSON object with its hash as last member."""
    raw = text if isinstance(text, bytes) else text.encode()
    digest = hashlib.sha256(raw).hexdigest().encode()
    return raw[:-1] + b',"sha256":"' + digest + b'"}\n'


TEXTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a key twice": (lambda: _seal('{"step":1,"step":1}'), "'step' is there twice"),
    "not a number": (lambda: _seal('{"step":NaN}'), "no other numbers"),
    "infinite": (lambda: _seal('{"step":-Infinity}'), "no other numbers"),
    "a float": (lambda: _seal('{"step":1.0}'), "no other numbers"),
    "a large exponent": (lambda: _seal('{"step":1e999999999}'), "no other numbers"),
    "a million digits": (lambda: _seal('{"step":' + "9" * 10**6 + "}"), "digits is too long"),
    "nested deeply": (
        lambda: _seal('{"step":' + "[" * 10**5 + "]" * 10**5 + "}"),
        "too deeply",
    ),
    "objects nested deeply": (lambda: _seal('{"a":' * 10**5 + "1" + "}" * 10**5), "too deeply"),
    "a million keys": (
        lambda: _seal("{" + ",".join(f'"{i}":1' for i in range(10**6 + 1)) + "}"),
        "too many members",
    ),
    "a hundred thousand keys": (
        lambda: _seal("{" + ",".join(f'"{i}":1' for i in range(100_000)) + "}"),
        "not a checkpoint",
    ),
    "a list": (lambda: b'["sha256"]\n', "does not end in its hash"),
    "nothing": (lambda: b"", "does not end in its hash"),
    "no text": (lambda: bytes(range(256)), "does not end in its hash"),
    "another hash": (lambda: manifest.seal({"a": 1}).replace(b'"a":1', b'"a":2'), "is damaged"),
    "no JSON inside": (lambda: _seal('{"a":}'), "no JSON"),
    "no UTF-8": (lambda: _seal(b'{"a":"\xff"}'), "no JSON"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_is_no_manifest(root: Path, case: str) -> None:
    make, match = TEXTS[case]
    refuse(root, make(), match)


@pytest.mark.parametrize("case", ["a million digits", "nested deeply", "a million keys"])
def test_refusing_is_quick_and_needs_little(root: Path, case: str) -> None:
    text = TEXTS[case][0]()
    started = time.process_time()
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        parse.parse(text, "manifest.json", 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - started < 1.0
    assert peak < 100 * 2**20


def test_a_manifest_longer_than_any_is_not_read(root: Path) -> None:
    path = root / "step-00000001" / "manifest.json"
    with open(path, "ab") as file:
        file.truncate(parse.MAX_BYTES + 1)  # sparse
    with pytest.raises(CheckpointError, match="manifest is too long"):
        sw.checkpoint.inspect(root, 1)


def test_nothing_is_allocated_for_a_tensor_that_its_files_cannot_hold(root: Path) -> None:
    body = body_of(root)
    body["tensors"]["w"]["shape"] = [10**9, 10**6]
    tracemalloc.start()
    refuse(root, manifest.seal(body), "gap")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def _mutated(value: Any, rng: random.Random) -> Any:
    """The value with one thing in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        changed = {k: (_mutated(v, rng) if k == key else v) for k, v in value.items()}
        return changed if rng.random() < 0.95 else {k: v for k, v in changed.items() if k != key}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        if rng.random() < 0.1:
            return [*value[:at], *value[at + 1 :]]
        return [*value[:at], _mutated(value[at], rng), *value[at + 1 :]]
    return rng.choice([0, 1, 2, -1, HUGE, "", "w", "F32", None, True, [], {}, [0], "../x", [[]]])


def test_mutated_manifests_are_refused_or_load_what_was_saved(root: Path) -> None:
    rng = random.Random(0)
    body = body_of(root)
    path = root / "step-00000001" / "manifest.json"
    saved, refusals = state(1), 0
    for _ in range(300):
        path.write_bytes(manifest.seal(_mutated(body, rng)))
        try:
            loaded = sw.checkpoint.restore(root, {"w": saved["w"], "b": saved["b"]})
        except CheckpointError:
            refusals += 1
            continue
        assert same(loaded, {"w": saved["w"], "b": saved["b"]})
    assert refusals > 150


def test_random_bytes_are_refused(root: Path) -> None:
    rng = random.Random(1)
    good = (root / "step-00000001" / "manifest.json").read_bytes()
    for _ in range(1000):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if bytes(data) != good:
            with pytest.raises(CheckpointError):
                parse.parse(bytes(data), "manifest.json", 1)
