"""Calibration input: what a user would try is read for what it holds, and the rest is refused by what it is.

The tables hold every form of data; each test goes over all of them.
"""

import collections
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_models import build
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import PreTrainedTokenizerFast

from kvsplice_hf import CalibrationError, ConfigError, KVSpliceCalibrator, KVSpliceConfig, KVSpliceError
from kvsplice_hf.calibration import sampling
from kvsplice_hf.calibration.data import as_batches
from kvsplice_hf.calibration.sampling import sample_from_model
from kvsplice_hf.patch.mla import effective_weight
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.text import load_texts, token_windows


NAME = "deepseek_v3"
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
TOKENIZER = byte_tokenizer()
TOKENIZER.pad_token_id = 0
TEXT = " ".join(f"The fox number {index} jumps." for index in range(40))  # about 1000 characters, tokens of one byte
IDS: list[int] = TOKENIZER(TEXT)["input_ids"]
SHORTER = IDS[: len(IDS) // 2]
PADDED = TOKENIZER([TEXT, TEXT[: len(TEXT) // 2]], padding=True)
CHAT = [
    {"role": "user", "content": TEXT},
    {"role": "assistant", "content": [{"type": "text", "text": TEXT}, {"type": "image"}]},
]
SHARED_CHAT = [{"from": "human", "value": TEXT}, {"from": "gpt", "value": TEXT}]
# Rows of data sets lack some texts, as the data sets of the hub do.
ROWS = datasets.Dataset.from_dict({"text": [TEXT, None, "", TEXT]})
CHATS = datasets.Dataset.from_dict({"messages": [CHAT[:1], CHAT[:1]]})
TOKENS = datasets.Dataset.from_dict({"input_ids": [IDS, IDS], "attention_mask": [[1] * len(IDS)] * 2})


class Rows(Dataset):
    """A data set of torch: it has a length, and its items no end."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"text": TEXT}


def batches_of(data: Any, tokenizer: Any = TOKENIZER, max_tokens: int = 8192, window: int = 64) -> list[dict[str, Any]]:
    return as_batches(data, tokenizer, max_tokens, window)


def with_template() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def real_tokens(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    """The tokens that count, of all batches in a row."""
    found: list[int] = []
    for batch in batches:
        ids = batch["input_ids"]
        assert ids.dtype == torch.int64
        assert ids.dim() == 2
        mask = batch.get("attention_mask", torch.ones_like(ids))
        assert mask.shape == ids.shape
        found += ids[mask.bool()].tolist()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What is read

TEXTS: dict[str, Callable[[], Any]] = {
    "a text": lambda: TEXT,
    "a text in a list": lambda: [TEXT],
    "texts, some missing": lambda: [None, TEXT, "", "  ", float("nan"), TEXT],
    "a tuple": lambda: (TEXT, TEXT),
    "lists of texts": lambda: [[TEXT], [TEXT]],
    "an array of texts": lambda: np.array([TEXT, TEXT]),
    "a generator": lambda: (part for part in (TEXT, TEXT)),
    "values of a mapping": lambda: {"a": TEXT, "b": TEXT}.values(),
    "an open file": lambda: io.StringIO(TEXT),
    "a row": lambda: {"text": TEXT},
    "columns": lambda: {"text": [TEXT, None]},
    "rows": lambda: [{"text": TEXT}, {"content": TEXT}, {"text": None}],
    "a data set": lambda: ROWS,
    "some of its rows": lambda: ROWS[:2],
    "its column": lambda: ROWS["text"],
    "a stream": lambda: ROWS.to_iterable_dataset(),
    "a column of a stream": lambda: ROWS.to_iterable_dataset()["text"],
    "a data set that gives tables": lambda: ROWS.with_format("pandas"),
    "several data sets": lambda: [ROWS, ROWS],
    "splits, train among them": lambda: datasets.DatasetDict(test=CHATS, train=ROWS),
    "a single split": lambda: datasets.DatasetDict(validation=ROWS),
    "splits of streams": lambda: datasets.IterableDatasetDict(train=ROWS.to_iterable_dataset()),
    "splits in a plain mapping": lambda: {"train": [TEXT], "test": ["other"]},
    "a data set of torch": Rows,
    "a loader of texts": lambda: DataLoader([TEXT, TEXT], batch_size=2),
    "a loader of rows": lambda: DataLoader(Rows(), batch_size=2),
    "a table of pandas": lambda: pd.DataFrame({"text": [TEXT, None]}),
    "a column of pandas": lambda: pd.Series([TEXT, None]),
    "a table of pyarrow": lambda: pa.table({"text": [TEXT, None]}),
    "a chat": lambda: CHAT,
    "chats": lambda: [CHAT, CHAT],
    "a message": lambda: CHAT[0],
    "a row with a chat": lambda: {"messages": CHAT},
    "rows with chats, some missing": lambda: [{"messages": None}, {"messages": CHAT}],
    "chats that datasets made columns": lambda: {"messages": {"role": ["user"], "content": [TEXT]}},
    "chats in the other convention": lambda: [{"conversations": SHARED_CHAT}],
    "a data set of chats": lambda: CHATS,
    "its column of chats": lambda: CHATS["messages"],
}


@pytest.mark.parametrize("what", TEXTS)
def test_texts_are_read_in_every_form_and_nothing_else_is(what: str) -> None:
    for tokenizer in (TOKENIZER, with_template(), SimpleNamespace(tokenizer=TOKENIZER)):
        decoded = TOKENIZER.decode(real_tokens(batches_of(TEXTS[what](), tokenizer)))
        assert len(decoded) >= len(TEXT) - 64  # what is left over after the last window goes
        sentences = decoded.replace("<user>", "").replace("<assistant>", "").replace("\n\n", "").split(".")
        assert {" ".join(sentence.split()[:3]) for sentence in sentences[:-1]} == {"The fox number"}


TOKEN_FORMS: dict[str, tuple[Callable[[], Any], list[int]]] = {
    "a list of numbers": (lambda: IDS, IDS),
    "an array": (lambda: np.array(IDS, dtype=np.int32), IDS),
    "a tensor": (lambda: torch.tensor(IDS), IDS),
    "a tensor of small integers": (lambda: torch.tensor([IDS], dtype=torch.int16), IDS),
    "a tensor [B, T]": (lambda: torch.tensor([IDS, IDS]), IDS * 2),
    "parts of a tensor": (lambda: torch.tensor([IDS, IDS]).split(1), IDS * 2),
    "tensors of several lengths": (lambda: [torch.tensor(IDS), torch.tensor(SHORTER)], IDS + SHORTER),
    "lists of several lengths": (lambda: [IDS, SHORTER, [], None, [7]], IDS + SHORTER),
    "arrays": (lambda: [np.array(IDS), np.array(SHORTER)], IDS + SHORTER),
    "what a tokenizer returns": (lambda: TOKENIZER(TEXT), IDS),
    "as tensors": (lambda: TOKENIZER(TEXT, return_tensors="pt"), IDS),
    "as a plain mapping": (lambda: dict(TOKENIZER(TEXT, return_tensors="pt")), IDS),
    "the tokens alone": (lambda: {"input_ids": torch.tensor([IDS])}, IDS),
    "a mapping of another class": (lambda: collections.UserDict(input_ids=IDS), IDS),
    "of several texts": (lambda: TOKENIZER([TEXT, TEXT[: len(SHORTER)]]), IDS + SHORTER),
    "of several texts, padded": (lambda: PADDED, IDS + SHORTER),
    "of several texts, padded arrays": (lambda: {name: np.array(rows) for name, rows in PADDED.items()}, IDS + SHORTER),
    "a float mask": (lambda: {"input_ids": [IDS], "attention_mask": torch.ones(1, len(IDS))}, IDS),
    "a boolean mask": (lambda: {"input_ids": IDS, "attention_mask": [False] + [True] * (len(IDS) - 1)}, IDS[1:]),
    "a row of padding": (lambda: {"input_ids": [IDS, IDS], "attention_mask": [[1] * len(IDS), [0] * len(IDS)]}, IDS),
    "batches": (lambda: [PADDED, {"input_ids": IDS}], IDS + SHORTER + IDS),
    "rows, some missing": (lambda: [{"input_ids": None}, {"input_ids": []}, {"input_ids": IDS}], IDS),
    "a data set": (lambda: TOKENS, IDS * 2),
    "its column": (lambda: TOKENS["input_ids"], IDS * 2),
    "a data set of tensors": (lambda: TOKENS.with_format("torch"), IDS * 2),
    "a loader": (lambda: DataLoader(TensorDataset(torch.tensor([IDS, IDS]))), IDS * 2),
    "a loader of lists, which turns them": (lambda: DataLoader(TOKENS, batch_size=2), IDS * 2),
    "a loader of lists alone": (lambda: DataLoader([IDS, IDS], batch_size=2), IDS * 2),
    "a generator": (lambda: (torch.tensor([IDS]) for _ in range(2)), IDS * 2),
    "what tokenizers returns": (lambda: TOKENIZER._tokenizer.encode(TEXT), IDS),
}


@pytest.mark.parametrize("what", TOKEN_FORMS)
def test_tokens_are_read_in_every_form_and_padding_is_left_out(what: str) -> None:
    data, expected = TOKEN_FORMS[what]
    assert real_tokens(batches_of(data(), tokenizer=None)) == expected


def test_a_padded_mapping_is_one_batch_with_its_mask() -> None:
    (batch,) = batches_of(PADDED, tokenizer=None)
    assert torch.equal(batch["input_ids"], torch.tensor(PADDED["input_ids"]))
    assert torch.equal(batch["attention_mask"], torch.tensor(PADDED["attention_mask"]))


def test_a_chat_goes_through_the_template_and_without_one_is_joined() -> None:
    expected = f"<user>{TEXT}<assistant>{TEXT}"
    for data in (CHAT, [CHAT], {"messages": CHAT}, [{"conversations": SHARED_CHAT}]):
        assert TOKENIZER.decode(real_tokens(batches_of(data, with_template(), window=5000))) == expected
        assert TOKENIZER.decode(real_tokens(batches_of(data, window=5000))) == f"{TEXT}\n\n{TEXT}"


def test_a_chat_that_the_template_refuses_is_refused_with_its_reason() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match="user.*roles must alternate"):
        batches_of([CHAT], tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Names, paths and texts


@pytest.mark.parametrize("length", [1, 15, 100, 255, 256, 300, 1000, 4094, 4095, 4096, 20_000])
@pytest.mark.parametrize("unit", ["word ", "a line\n", "word", "no\0text ", "\ud800 half a pair ", "語"])
def test_a_string_of_any_length_is_a_text(unit: str, length: int) -> None:
    text = (unit * length)[:length]
    needed = len(TOKENIZER(text.encode(errors="replace").decode())["input_ids"]) >= 16
    with contextlib.nullcontext() if needed else pytest.raises(CalibrationError, match="has .* tokens; 16 are needed"):
        assert real_tokens(batches_of(text))


@pytest.mark.parametrize("name", ["notes.txt", "no/such/folder", "/no/such.jsonl", "stats.safetensors", "a b.parquet"])
def test_a_string_that_looks_like_a_path_must_be_one(name: str) -> None:
    with pytest.raises(ConfigError, match="There is no file or folder"):
        batches_of(name)
    assert TOKENIZER.decode(real_tokens(batches_of([name] * 5, window=1000))).startswith(name)  # in a list it is a text


@pytest.mark.parametrize("name", ["pydoc", "notes.txt", "x" * 300, "no\0file"])
def test_a_path_is_always_a_path(name: str) -> None:
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        batches_of(Path(name))


def test_a_mistyped_source_is_told_the_sources() -> None:
    with pytest.raises(CalibrationError, match=r"'pydocs' has 6 tokens; 16 are needed.*one of pydoc, varied"):
        batches_of("pydocs")


def _write_files(folder: Path) -> dict[str, Path]:
    frame = pd.DataFrame({"text": [TEXT, None, TEXT]})
    (folder / "lines.txt").write_text("\n".join([TEXT] * 4))  # not one blank line
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": TEXT}) for _ in range(2)))
    (folder / "chats.json").write_text(json.dumps([{"messages": CHAT[:1]}] * 2))
    frame.to_csv(folder / "rows.csv")
    frame.to_parquet(folder / "rows.parquet")
    ROWS.save_to_disk(folder / "saved")
    datasets.DatasetDict(train=ROWS).save_to_disk(folder / "saved_splits")
    (folder / "texts").mkdir()
    (folder / "texts" / "NOTES.TXT").write_text(TEXT)
    return {path.name: path for path in folder.iterdir()}


def test_files_and_folders_of_every_kind_are_read(tmp_path: Path) -> None:
    for name, path in _write_files(tmp_path).items():
        for data in (path, str(path), [path], [str(path)]):
            decoded = TOKENIZER.decode(real_tokens(batches_of(data)))
            assert decoded.startswith("The fox number 0 jumps."), name
            assert len(decoded) > 900, name


def test_a_file_of_something_else_is_refused_by_its_name(tmp_path: Path) -> None:
    contents = {"a.bin": b"\0\1", "a.safetensors": b"\0\1", "a.jsonl": b"{nope", "a.parquet": b"\0\1"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(KVSpliceError, match=re_escaped(tmp_path / name)):
            batches_of(str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"holds no text. A folder is searched for files that end in .txt"):
        batches_of(tmp_path)


def re_escaped(path: Path) -> str:
    return str(path).replace(".", r"\.")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "None": (lambda: None, "type NoneType cannot be read"),
    "a number": (lambda: 7, "type int cannot be read"),
    "a boolean": (lambda: True, "type bool cannot be read"),
    "bytes": (lambda: TEXT.encode(), "type bytes cannot be read. Decode it"),
    "bytes among texts": (lambda: [TEXT.encode()], "hold a bytes. Decode it"),
    "a tokenizer": (lambda: TOKENIZER, "Pass it as `tokenizer`"),
    "a tokenizer among texts": (lambda: [TOKENIZER], "Pass it as `tokenizer`"),
    "a model": (lambda: torch.nn.Linear(2, 2), "type Linear cannot be read. It is a model"),
    "a model that is iterable": (lambda: torch.nn.ModuleList([torch.nn.Linear(2, 2)]), "type ModuleList"),
    "a class": (lambda: Rows, "It is a class"),
    "a function": (lambda: lambda: TEXT, "type function cannot be read"),
    "a few numbers": (lambda: [1, 2], "hold a int at each of 2 places"),
    "nothing": (list, "are empty"),
    "an empty text": (lambda: " \n", "are empty"),
    "rows that are all missing": (lambda: [None, "", {"text": None}, {"input_ids": []}], "of 4 rows none holds"),
    "floats": (lambda: [0.5] * 20, "torch.float64"),
    "an array of floats": (lambda: np.ones((2, 8), dtype=np.float32), "torch.float64"),
    "a tensor of floats": (lambda: torch.ones(2, 8), "torch.float32"),
    "booleans": (lambda: torch.ones(2, 8, dtype=torch.bool), "torch.bool"),
    "complex numbers": (lambda: np.ones(20, dtype=complex), "a complex among token ids"),
    "numbers beyond 64 bits": (lambda: [2**70] * 20, "more than 64 bits"),
    "None among tokens": (lambda: [1, None] * 20, "a NoneType among token ids"),
    "texts among tokens": (lambda: [1, "a"] * 20, "a str among token ids"),
    "None in a row of tokens": (lambda: [[1, None, 2]], "a NoneType among token ids"),
    "texts as tokens": (lambda: {"input_ids": ["one", "two"]}, "`input_ids` hold a str"),
    "a tensor of no dimension": (lambda: torch.tensor(3), r"torch.int64 \[\]"),
    "a tensor of three dimensions": (lambda: torch.ones(2, 3, 4, dtype=torch.int64), r"\[2, 3, 4\]"),
    "sequences of one token": (lambda: torch.ones(3, 1, dtype=torch.int64), r"\[3, 1\]"),
    "tokens without values": (lambda: torch.ones(2, 8, dtype=torch.int64, device="meta"), "meta device"),
    "a mask of another shape": (lambda: {"input_ids": IDS, "attention_mask": [1, 1]}, r"`attention_mask` is \[2\]"),
    "masks for other rows": (lambda: {"input_ids": [IDS, [1, 2]], "attention_mask": [[1, 1]]}, "has 1 rows"),
    "an additive mask": (lambda: {"input_ids": [5, 6], "attention_mask": [0.0, -1e9]}, "1 at real tokens"),
    "tensors without names": (lambda: DataLoader(TensorDataset(*[torch.ones(2, 5).long()] * 2)), "without names"),
    "texts and tokens": (lambda: [TEXT, torch.tensor([IDS])], "both texts and token ids"),
    "other keys": (lambda: {"title": "x", 3: 1}, r"dict with \['3', 'title'\]"),
    "rows with other keys": (lambda: [{"title": "x"}], r"dict with \['title'\]"),
    "a table with other columns": (lambda: pd.DataFrame({"title": ["x"]}), r"\['title'\]"),
    "a data set with other columns": (lambda: ROWS.rename_column("text", "prose"), r"\['prose'\]"),
    "several splits without train": (lambda: datasets.DatasetDict(a=ROWS, b=ROWS), r"splits \['a', 'b'\].*data\['a'\]"),
    "a chat of something else": (lambda: [CHAT[0], 5], "hold a int"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused_by_what_it_is(what: str) -> None:
    data, phrase = REFUSED[what]
    with pytest.raises(CalibrationError, match=f"(?s){phrase}"):
        batches_of(data())


@pytest.mark.parametrize(
    ("tokenizer", "phrase"),
    [
        (None, "needs its `tokenizer`"),
        ("gpt2", "is the str 'gpt2'.*AutoTokenizer"),
        (7, "is a int"),
        (torch.nn.Linear(2, 2), "is a Linear"),
        (PreTrainedTokenizerFast, "is a type"),
        (SimpleNamespace(tokenizer="gpt2"), "is a SimpleNamespace"),
    ],
)
def test_a_tokenizer_that_is_none_is_refused_before_the_data_are_read(tokenizer: Any, phrase: str) -> None:
    def texts() -> Iterator[str]:
        yield TEXT
        raise AssertionError("read on")

    for data in (TEXT, texts(), CHAT):
        with pytest.raises(ConfigError, match=phrase):
            batches_of(data, tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# How much is read


@pytest.mark.parametrize("item", [TEXT, {"text": TEXT}, {"input_ids": IDS}, torch.tensor([IDS]), "x"])
def test_a_stream_without_end_is_read_until_it_is_enough(item: Any) -> None:
    read = 0

    def stream() -> Iterator[Any]:
        nonlocal read
        while True:
            read += 1
            yield item

    tokens = len(real_tokens(batches_of(stream(), max_tokens=2000)))
    assert 900 < tokens < 2000 + len(IDS)
    assert read <= 2000


def test_no_batch_has_more_tokens_than_are_asked_for() -> None:
    rows = torch.arange(50 * 100).view(50, 100)
    (few,) = batches_of(rows, max_tokens=1000)
    assert few["input_ids"][:, 0].tolist() == [0, 500, 1100, 1600, 2200, 2700, 3300, 3800, 4400, 4900]
    document = {"input_ids": torch.arange(9000)[None], "attention_mask": (torch.arange(9000) < 8000)[None]}
    windows = batches_of(document, max_tokens=1000, window=100)
    assert [len(batch["input_ids"][0]) for batch in windows] == [100] * 10
    assert windows[-1]["input_ids"].max() == 7999


# ---------------------------------------------------------------------------------------------------------------------
# The model's side


def tokens(count: int = 24, length: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(8, 128, (count, length), generator=generator, dtype=torch.int64, device="cpu")


def sums(calibrator: KVSpliceCalibrator) -> list[torch.Tensor]:
    names = ("count", "latent_sum", "latent_outer", "rot_outer", "fisher", "rot_fisher", "readers", "rows")
    return [getattr(layer, name) for layer in calibrator.statistics.values() for name in names]


def collected(metric: str, model: Any = None) -> KVSpliceCalibrator:
    model = build(NAME) if model is None else model
    mask = torch.ones_like(tokens())
    mask[1, :5] = 0
    data = {"input_ids": tokens(), "attention_mask": mask}
    return KVSpliceCalibrator(model, metric=metric).collect(data, progress=False)


def assert_same(found: KVSpliceCalibrator, expected: KVSpliceCalibrator) -> None:
    assert all(torch.equal(*pair) for pair in zip(sums(found), sums(expected), strict=True))


@pytest.mark.parametrize("metric", ["fisher", "readers", "pca"])
def test_statistics_of_inference_mode_are_those_of_any_other_and_can_be_added_to(metric: str) -> None:
    model, expected = build(NAME), collected(metric)
    with torch.inference_mode():
        found = collected(metric, model)
        found.statistics[0].merge(expected.statistics[0])
        found.statistics[0] = collected(metric, model).statistics[0]
    assert_same(found, expected)
    assert all(parameter.requires_grad for parameter in model.parameters())
    found.collect(tokens(), progress=False)
    assert found.tokens == expected.tokens + 24 * 28


def test_a_model_loaded_in_inference_mode_needs_a_metric_without_gradients() -> None:
    with torch.inference_mode():
        loaded, moved = build(NAME), build(NAME, torch.bfloat16)
        for model in (loaded, moved):
            with pytest.raises(CalibrationError, match='Load it outside.*metric="readers"'):
                collected("fisher", model)
    with pytest.raises(CalibrationError, match="Load it outside"):
        collected("fisher", loaded)
    for metric in ("readers", "pca"):
        expected = collected(metric)
        assert_same(collected(metric, loaded), expected)
        with torch.inference_mode():
            assert_same(collected(metric, loaded), expected)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_tokens_of_another_tokenizer_are_refused_before_the_model_runs() -> None:
    model = build(NAME)
    for wrong in (128, -100):
        ids = tokens()
        ids[2, 3] = wrong
        with pytest.raises(CalibrationError, match=f"{wrong}.*0 to 127.*another tokenizer"):
            KVSpliceCalibrator(model).collect(ids, progress=False)


def test_a_model_that_is_not_loaded_is_refused_by_its_name() -> None:
    with pytest.raises(CalibrationError, match="DeepseekV3ForCausalLM are not loaded"):
        collected("pca", build(NAME).to("meta"))


def with_norms_in(model: Any, dtype: torch.dtype) -> Any:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_effective_weight_does_not_depend_on_the_dtype_of_the_norms(
    dtype: torch.dtype, norms: torch.dtype, autocast: bool
) -> None:
    (site, _) = find_sites(with_norms_in(build(NAME, dtype), norms))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(effective_weight(site), site.module.kv_b_proj.weight)


@pytest.mark.parametrize("metric", ["fisher", "readers", "pca"])
def test_a_model_with_norms_in_float32_is_calibrated_under_autocast(metric: str) -> None:
    model, expected = with_norms_in(build(NAME, torch.bfloat16), torch.float32), collected(metric)
    with torch.autocast("cpu", torch.bfloat16):
        found = collected(metric, model)
    for mine, other in zip(found.statistics.values(), expected.statistics.values(), strict=True):
        assert (mine.latent_outer - other.latent_outer).norm() < 0.02 * other.latent_outer.norm()
    found.fit(KVSpliceConfig(bytes_per_token=20))


@contextlib.contextmanager
def defaults(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_while_a_model_writes_its_own_text_the_tokens_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of generation at a time: a batch of sequences may take minutes."""
    seen: list[int] = []
    monkeypatch.setattr(sampling.tqdm, "update", lambda bar, count: seen.append(count))
    batches = sample_from_model(build("deepseek_v3"), 17 * 8, 8)
    assert seen == [16] * 8 + [1] * 8  # 16 sequences together, and the one that is left
    assert sum(seen) == sum(batch["input_ids"].numel() for batch in batches)


@pytest.mark.parametrize("device", [None, "meta"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_calibration_does_not_depend_on_the_defaults_of_the_program(dtype: torch.dtype, device: str | None) -> None:
    def everything(model: Any) -> list[torch.Tensor]:
        fisher = collected("fisher", model)
        (fit, *_) = fisher.fit(KVSpliceConfig(bytes_per_token=20))[0].values()
        batches = batches_of("varied") + batches_of([IDS, SHORTER]) + sample_from_model(model, 64, 32)
        return [
            token_windows(TOKENIZER, load_texts("pydoc"), 64),
            *(batch["input_ids"] for batch in batches),
            *sums(fisher),
            *sums(collected("readers", model)),
            fit.compress,
            fit.codec.widths,  # type: ignore[union-attr]
        ]

    model = build(NAME)
    expected = everything(model)
    with defaults(dtype, device):
        found = everything(model)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
