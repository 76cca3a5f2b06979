"""The character model's example: text, model, training, conversion and figures, all tiny."""

import io
import pathlib
import sys

import chex
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

# Examples are scripts beside each other, not a package.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

pytest.importorskip("tokenizers")  # of minilm_measure, which lends its progress bar
pytest.importorskip("matplotlib")

import _data
import char_lm_qat
import char_lm_text
from char_lm_measure import Row, Served, draw, expectations, table
from char_lm_model import CharLM, Config
from char_lm_training import Settings, fit, mean_loss, sample, validate
from qat_training import NonFiniteLoss

import jaxquant as jq

TEXT = char_lm_text.few_lines()
CONFIG = Config(len(TEXT.alphabet), width=16, heads=2, mlp=32, layers=1, length=8)
SETTINGS = Settings(steps=4, rate=1e-2, rows=4, length=8)


@pytest.fixture(scope="module")
def model():
    return CharLM(CONFIG, rngs=nnx.Rngs(0))


def test_text_is_split_and_read_back():
    text = char_lm_text.split("two", ["abcabcabca", "cccccccccccccccccccb"])
    assert text.alphabet == "abc"
    assert text.read(text.train) == "abcabcabc" + "c" * 18 and text.read(text.valid) == "acb"
    assert text.codes("cab").tolist() == [2, 0, 1]


def test_batches_are_pieces_of_the_text():
    codes = np.arange(100, dtype=np.int32)
    found = [rows for (rows,) in char_lm_text.batches(codes, 3, 5, 7)]
    again = [rows for (rows,) in char_lm_text.batches(codes, 3, 5, 7)]
    np.testing.assert_array_equal(found, again)
    assert np.shape(found) == (3, 5, 8) and (np.diff(found) == 1).all()


def test_validation_predicts_each_character_once():
    rows = char_lm_text.in_order(np.arange(50, dtype=np.int32), 3, 5)
    assert rows.shape == (3, 3, 6)
    np.testing.assert_array_equal(rows[..., 1:].ravel(), np.arange(1, 46))
    with pytest.raises(ValueError, match="at least 51 characters, got 50"):
        char_lm_text.in_order(np.arange(50), 10, 5)


def test_plays_have_a_checksum_each():
    assert set(_data.PLAYS.members) == set(_data.PLAYS.sha256) and len(_data.PLAYS.members) == 10


def test_sonnets_stand_in_only_in_a_quick_run(monkeypatch):
    def offline():
        raise RuntimeError("could not download")

    monkeypatch.setattr(_data, "plays", offline)
    out = Console(file=io.StringIO(), width=200)
    assert "sonnets" in char_lm_qat.load(True, out).name
    assert "cannot be downloaded" in out.file.getvalue()
    with pytest.raises(RuntimeError, match="could not download"):
        char_lm_qat.load(False, out)


def test_model_is_causal(model):
    codes = np.arange(16, dtype=np.int32).reshape(2, 8)
    changed = codes.copy()
    changed[:, 5:] += 1
    a, b = (np.asarray(nnx.jit(model)(x)) for x in (codes, changed))
    assert a.shape == (2, 8, CONFIG.vocab)
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert (a[:, 5:] != b[:, 5:]).any(-1).all()


def test_training_lowers_the_loss_and_leaves_the_model_alone(model):
    before = jax.tree.map(np.asarray, nnx.state(model))
    settings = Settings(steps=30, rate=3e-2, rows=4, length=8)
    found = fit("float32", model, optax.adam(settings.schedule()), TEXT, settings)
    assert len(found.losses) == 30 and np.mean(found.losses[-5:]) < found.losses[0] - 0.3
    chex.assert_trees_all_equal(before, nnx.state(model))
    weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert 2 * weights <= found.optimizer_bytes < 2 * weights + 100


@pytest.mark.slow
def test_what_is_trained_is_what_is_served(model, monkeypatch):
    monkeypatch.setattr(char_lm_qat, "GROUP", 8)
    example = char_lm_text.in_order(TEXT.train, 4, 8)[0, :, :-1]
    fmodel, optimizer = char_lm_qat.variant("W4A8 QAT", model, SETTINGS, example)
    found = fit("W4A8 QAT", fmodel, optimizer, TEXT, SETTINGS)
    qmodel, report = jq.nnx.convert(found.model)
    served, trained = (validate(m, TEXT, SETTINGS) for m in (qmodel, found.model))
    assert served == pytest.approx(trained, rel=1e-5)
    assert report["blocks/0/up/kernel"].action.startswith("int4")
    assert report["head/kernel"].action.startswith("int8")
    written = [sample(qmodel, TEXT, "Shall I", 6, 8, 0.7, jax.random.key(0)) for _ in range(2)]
    assert written[0] == written[1] and written[0].startswith("Shall I") and len(written[0]) == 13


def test_variants_are_what_their_names_say(model):
    example = char_lm_text.in_order(TEXT.train, 4, 8)[0, :, :-1]
    fmodel, _ = char_lm_qat.variant("int8 training", model, SETTINGS, example)
    rule = fmodel.quant.layout.recipe.match("head/kernel")
    assert (
        rule.gradients == jq.qtensor.Gradients() and rule.weights == rule.activations == jq.int8()
    )
    params = {"w": np.zeros((64, 256), np.float32)}
    for name, share in {"float32": 1.0, "adam8bit": 0.27}.items():
        fitted, optimizer = char_lm_qat.variant(name, model, SETTINGS, example)
        stored = sum(x.nbytes for x in jax.tree.leaves(optimizer.init(params)))
        assert fitted is model and stored <= share * 2 * params["w"].nbytes + 8


def test_mean_loss_is_cross_entropy(model):
    rows = np.arange(27, dtype=np.int32).reshape(3, 9)
    logits = np.asarray(model(rows[:, :-1]), np.float64)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log, rows[:, 1:, None], -1).mean()
    np.testing.assert_allclose(float(mean_loss(model, rows)), expected, rtol=1e-5)


ROWS = [
    Row("float32", "float / float / float32", 1.6, 60.0, 3_400_000),
    Row("W4A8 QAT", "int4 x int8 / float / float32", 1.7, 70.0, 3_400_000),
    Row("int8 training", "int8 x int8 / int8 / float32", 1.61, 80.0, 3_400_000),
    Row("adam8bit", "float / float / 8 bits", 1.62, 60.0, 880_000),
]


def test_figures_and_table():
    served = Served(trained_loss=1.7, served_loss=1.7, bytes=1, float_bytes=8, text="")
    assert list(expectations(ROWS, served).values()) == [True, False, True]
    assert "1.700000 and 1.700000, equal" in list(expectations(ROWS, served))[-1]
    served.served_loss += 1e-4
    assert list(expectations(ROWS, served).values()) == [True, False, False]
    assert "6e-05 apart" in list(expectations(ROWS, served))[-1]
    out = io.StringIO()
    Console(width=100, file=out).print(table(ROWS, "title", "caption"))
    text = out.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 100
    for figure in ("1.6100", "+0.63 %", "2.308", "880"):
        assert figure in text


def test_losses_are_drawn(tmp_path):
    draw(tmp_path / "losses.png", {row.name: [3.0, 2.0, 1.5] for row in ROWS}, "title", 2)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_divergence_is_told_and_the_last_good_state_kept(tmp_path, monkeypatch, capsys):
    def diverges(*args):
        raise NonFiniteLoss("adam", 7, float("nan"), {"w": np.arange(3.0)}, [1.0])

    monkeypatch.setattr(char_lm_qat, "load", lambda quick, console: TEXT)
    monkeypatch.setattr(char_lm_qat, "compare", diverges)
    assert char_lm_qat.main(["--quick", "--png", str(tmp_path / "losses.png")]) == 1
    said = capsys.readouterr().out
    assert "adam: the loss of step 7 is nan" in said and "losses.last-good.npz" in said
    with np.load(tmp_path / "losses.last-good.npz") as file:
        assert file["['w']"].tolist() == [0, 1, 2]
