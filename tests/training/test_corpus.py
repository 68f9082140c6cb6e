"""The corpus: which files it takes, how it divides them, and chats made of them."""

import hashlib
import random
import zipfile
from pathlib import Path

import pytest
from pydantic import ValidationError

from orthrus.training.corpus import (
    HELD_OUT_FILE,
    SEPARATOR,
    TRAIN_FILE,
    CorpusSettings,
    NearDuplicates,
    build,
    chat_documents,
    is_permissive,
)


def test_near_duplicates_and_foreign_licences_stay_out() -> None:
    duplicates = NearDuplicates(min_new=0.5)
    text = "\n".join(f"a line of code number {i} that is long" for i in range(10))
    assert duplicates.keep(text)
    assert not duplicates.keep(text + "\none more line of code that is long")
    assert is_permissive("License-Expression: Apache-2.0")
    assert not is_permissive("License: LGPL-2.1")
    assert not is_permissive("")
    with pytest.raises(ValidationError, match="no pinned version"):
        CorpusSettings(packages=["flask"])


def make_wheel(folder: Path, name: str, files: dict[str, str]) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\nLicense-Expression: MIT\n")
        for path, text in files.items():
            wheel.writestr(f"{name}/{path}", text)


def test_a_corpus_keeps_neighbours_together_and_whole_packages_apart(tmp_path: Path) -> None:
    def code(name: str) -> str:
        return f"def {name}(value):\n" + "".join(f"    value = {name}_{i}(value, {i})\n" for i in range(20))

    documented = (
        'def shown(value):\n    """Show the value to whoever asks for it."""\n' + "    value += 1\n" * 20
    )
    archives = tmp_path / "archives"
    archives.mkdir()
    make_wheel(
        archives, "alpha", {f"{name}.py": code(f"alpha_{name}") for name in "dbca"} | {"e.py": documented}
    )
    for name in ("beta", "gamma", "delta"):
        make_wheel(archives, name, {f"{i}.py": code(f"{name}_{i}") for i in range(9)})
    names = ("alpha", "beta", "gamma", "delta")
    rule = {name for name in names if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 3 == 0}
    assert 0 < len(rule | {"beta"}) < 4
    config = CorpusSettings(
        packages=[f"{name}==1.0" for name in names],
        held_out=("beta",),
        held_out_one_in=3,
        max_held_out_bytes=1000,
        chat_fraction=0.5,
    )
    sizes = build(config, tmp_path / "corpus", archives)
    parts = {
        part: (tmp_path / "corpus" / part).read_text().split(SEPARATOR)
        for part in (TRAIN_FILE, HELD_OUT_FILE)
    }
    for name in names:
        part = HELD_OUT_FILE if name in rule | {"beta"} else TRAIN_FILE
        found = [text for text in parts[part] if text.startswith(f"def {name}_")]
        assert found == sorted(found) and found
        assert (len(found) < 9) == (part == HELD_OUT_FILE or name == "alpha")
        assert not any(f"def {name}_" in text for other in parts if other != part for text in parts[other])
    holder = parts[HELD_OUT_FILE if "alpha" in rule else TRAIN_FILE]
    assert holder[-1].startswith("<|im_start|>user\n")
    assert sizes["chat"] == len(holder[-1])
    assert sizes[TRAIN_FILE] == sum(map(len, parts[TRAIN_FILE]))


def test_chat_documents_hold_a_question_and_its_function() -> None:
    body = '        """Add x to the whole of this."""\n        y = x\n        y += 1\n        return y\n'
    source = f"class A:\n    def add(self, x):\n{body}"
    (document,) = chat_documents(source, random.Random(0))
    question, answer = document.split("<|im_end|>\n<|im_start|>assistant\n")
    assert question.startswith("<|im_start|>user\n")
    assert answer.endswith("<|im_end|>\n")
    assert "add" in document
