"""Text sources have two halves that never overlap, and windows predict every token once."""

from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer

from kvsplice_hf import ConfigError
from kvsplice_hf.text import load_texts, token_windows


def halves(source: str) -> tuple[set[str], set[str]]:
    return set(load_texts(source, "calibration")), set(load_texts(source, "evaluation"))


def test_pydoc_has_two_halves_that_do_not_overlap() -> None:
    """Not one paragraph is in both, although the topics quote one another."""
    paragraphs = [{" ".join(p.split()) for text in half for p in text.split("\n\n")} for half in halves("pydoc")]
    assert paragraphs[0].isdisjoint(paragraphs[1])
    for half in paragraphs:
        assert sum(map(len, half)) > 100_000


def test_varied_text_has_excerpts_of_every_kind_in_both_halves() -> None:
    calibration, evaluation = halves("varied")
    assert calibration.isdisjoint(evaluation)
    for half in (calibration, evaluation):
        texts = "\n".join(half)
        for sign in ("whale", "population", "expression", "def "):
            assert sign in texts
        assert 60_000 < len(texts) < 80_000


def test_a_folder_is_split_by_file_and_a_file_in_its_middle(tmp_path: Path) -> None:
    for index in range(5):
        (tmp_path / f"{index}.txt").write_text(f"text {index}")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    assert halves(str(tmp_path)) == ({"text 0", "text 2", "text 4"}, {"text 1", "text 3"})
    file = tmp_path / "one.md"
    file.write_text("\n\n".join(f"paragraph {index}" for index in range(4)))
    assert halves(str(file)) == ({"paragraph 0\n\nparagraph 1"}, {"paragraph 2\n\nparagraph 3"})


def test_samples_bound_the_number_of_documents() -> None:
    assert load_texts("pydoc", samples=3) == load_texts("pydoc")[:3]


@pytest.mark.parametrize(
    ("source", "split", "phrase"),
    [
        ("pydoc", "training", "`split` is 'training'"),
        ("no/such/file", "evaluation", "neither a file nor a folder"),
        ("EMPTY", "evaluation", "holds no text"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(source: str, split: str, phrase: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=phrase):
        load_texts(str(tmp_path) if source == "EMPTY" else source, split)


def test_a_named_set_that_cannot_be_reached_points_to_offline_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise ConnectionError("no route")

    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConfigError, match='no route.*"pydoc"'):
        load_texts("wikitext")


def test_a_set_with_one_split_gives_every_other_document(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [{"text": str(index)} for index in range(5)])
    assert load_texts("fineweb-edu", "calibration") == ["0", "2", "4"]
    assert load_texts("fineweb-edu", "evaluation") == ["1", "3"]


def test_windows_are_consecutive_and_do_not_overlap() -> None:
    tokenizer = byte_tokenizer()
    windows = token_windows(tokenizer, ["abcdefg", "hij"], window=4)
    assert tokenizer.decode(windows.flatten()) == "abcdefg\n\nhij"
    assert windows.shape == (3, 4)
    assert torch.equal(token_windows(tokenizer, ["abcdefg", "hij"], window=4, samples=2), windows[:2])


@pytest.mark.parametrize(
    ("window", "phrase"), [(1, "two tokens"), (99, "less than one window of 99.*`window`.*--window")]
)
def test_windows_that_cannot_be_cut_are_refused(window: int, phrase: str) -> None:
    with pytest.raises(ConfigError, match=phrase):
        token_windows(byte_tokenizer(), ["abc"], window=window)
