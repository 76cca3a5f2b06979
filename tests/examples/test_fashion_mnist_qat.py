"""The QAT example on Fashion-MNIST: its loop, recipes, rows and picture, on a tiny model."""

import io
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

# Examples are scripts beside each other, not a package.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

pytest.importorskip("tokenizers")  # of minilm_measure, which lends its progress bar
pytest.importorskip("matplotlib")

import fashion_mnist_qat
import qat_training
from fashion_mnist_cnn import CNN
from fashion_mnist_data import Images
from fashion_mnist_qat_measure import Row, draw, expectations, table
from fashion_mnist_training import Settings, batches, fit
from qat_training import NonFiniteLoss

import jaxquant as jq

pytestmark = pytest.mark.usefixtures("uncontracted")

SETTINGS = Settings(steps=4, rate=1e-2, tuning_steps=4, tuning_rate=1e-3, batch=8)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    x, y = rng.random((24, 28, 28, 1), np.float32), np.arange(24, dtype=np.int32) % 10
    return Images("noise", x, y, x[:4], y[:4])


def test_loop_returns_states_and_losses():
    told = []
    state, losses = qat_training.run_steps(
        "sum", lambda s, x: (s + x, s), jnp.float32(1), [(2.0,), (3.0,)], told.append
    )
    assert float(state) == 6 and losses == told == [1, 3]


def test_loop_stops_at_a_loss_that_is_not_finite_and_keeps_the_last_good_state():
    # each state's loss is itself; the third step makes NaN, which the fourth finds
    def step(state, x):
        return state + x, state

    given = [(1.0,), (1.0,), (np.nan,), (1.0,), (1.0,)]
    with pytest.raises(qat_training.NonFiniteLoss, match="tiny: the loss of step 3 is nan") as e:
        qat_training.run_steps("tiny", step, jnp.float32(0), given)
    assert (e.value.step, e.value.losses, float(e.value.state)) == (3, [0, 1, 2], 2)


def test_loop_looks_at_the_last_state_itself():
    given = [(1.0,), (np.inf,)]
    with pytest.raises(qat_training.NonFiniteLoss, match="step 2") as e:
        qat_training.run_steps("tiny", lambda s, x: (s + x, s), jnp.float32(0), given)
    assert float(e.value.state) == 1


def test_states_are_saved_whole(tmp_path):
    state = {"w": jnp.arange(3.0), "inner": (jnp.int32(4), jax.random.key(5))}
    qat_training.save_state(tmp_path / "state.npz", state)
    with np.load(tmp_path / "state.npz") as file:
        assert file["['w']"].tolist() == [0, 1, 2] and int(file["['inner'][0]"]) == 4
        np.testing.assert_array_equal(file["['inner'][1]"], jax.random.key_data(jax.random.key(5)))


@pytest.mark.parametrize("width", [1, 3, 7, 50])
def test_smoothed_is_a_moving_mean(width):
    losses = np.random.default_rng(0).random(7).tolist()
    steps, found = qat_training.smoothed(losses, width)
    used = min(width, 7)
    expected = [np.mean(losses[end - used : end]) for end in steps]
    assert steps[-1] == 7 and len(steps) == 8 - used
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_batches_mirror_and_go_through_all_images(images):
    found = list(batches(images, 3, SETTINGS))
    assert sorted(np.concatenate([y for _, y in found])) == sorted(images.train_y)
    for x, _ in found:
        rows = {image.tobytes() for image in images.train_x}
        rows |= {image.tobytes() for image in images.train_x[:, :, ::-1]}
        assert x.shape == (8, 28, 28, 1) and all(image.tobytes() in rows for image in x)


@pytest.mark.parametrize("method", ["PTQ", "STE", "LSQ"])
def test_ends_have_eight_bits_and_the_middle_what_is_asked(method):
    recipe = fashion_mnist_qat.recipe_of(method, 3)
    for key, bits in {"conv0/kernel": 8, "conv2/kernel": 3, "head/kernel": 8}.items():
        rule = recipe.match(f"params/{key}")
        assert (rule.weights.format.name, rule.activations.format.name) == (
            f"int{bits}",
            f"uint{bits}",
        )


@pytest.fixture(scope="module")
def tiny(images):
    model = CNN((4, 4), (2, 2))
    return model, jax.jit(model.init)(jax.random.key(0), images.train_x[:1])


@pytest.mark.slow
def test_what_is_trained_is_what_is_served(images, tiny):
    model, variables = tiny
    fmodel = jq.linen.fake_quantized(model, fashion_mnist_qat.recipe_of("LSQ", 2))
    start = fmodel.with_state(variables, images.train_x)
    trained, losses = fit("LSQ", fmodel, start, images, SETTINGS, 4, SETTINGS.tuning())
    assert len(losses) == 4 and np.isfinite(losses).all()
    before, after = (v["quant"]["learned"] for v in (start, trained))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(moved))
    qvariables = jq.linen.convert(fmodel, trained, images.test_x)
    served = jax.jit(jq.quantized(model.apply))(qvariables, images.test_x)
    expected = jax.jit(fmodel.apply)(trained, images.test_x)
    np.testing.assert_array_equal(served, expected)
    assert qvariables["params"]["conv1"]["kernel"].spec.format.bits == 2


def test_k_means_leaves_so_many_values_to_each_layer(images, tiny):
    model, variables = tiny
    fmodel = jq.linen.fake_quantized(model, fashion_mnist_qat.codebook_recipe(2))
    start = fmodel.with_state(variables, images.train_x)
    assert {held["codebook"].shape for held in start["quant"]["learned"]["weights"].values()} == {
        (4,)
    }
    q = jq.linen.convert(fmodel, start, images.test_x)["params"]["conv1"]["kernel"]
    assert len(np.unique(jq.dequantize(q))) == 4


ROWS = {
    ("float32", "float / float"): Row("float32", "float / float", 0.92, 500_000, 60.0),
    ("PTQ", "int2 / uint2"): Row("PTQ", "int2 / uint2", 0.7, 40_000),
    ("QAT, LSQ", "int2 / uint2"): Row("QAT, LSQ", "int2 / uint2", 0.9, 40_000, 20.0),
    ("QAT, STE", "int4 / uint4"): Row("QAT, STE", "int4 / uint4", 0.918, 70_000, 20.0),
    ("QAT, LSQ", "int4 / uint4"): Row("QAT, LSQ", "int4 / uint4", 0.911, 70_000, 20.0),
}


def test_expectations_are_measured_against_float():
    said = {line.rsplit(": ", 1)[0]: met for line, met in expectations(ROWS).items()}
    assert said == {
        "QAT W4A4 within 0.3 points of float": True,
        "LSQ W2A2 within 1.5 points of float": False,
        "LSQ W2A2 above PTQ W2A2 by 5 points": True,
    }
    assert any("-2.00" in line for line in expectations(ROWS))


def test_table_fits_a_hundred_columns():
    out = io.StringIO()
    Console(width=100, file=out).print(table(ROWS, "title"))
    text = out.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 100
    for figure in ("92.00 %", "-22.00", "0.08", "8 bits"):
        assert figure in text


def test_losses_are_drawn(tmp_path):
    curves = {key: [1.0, 0.5, 0.7] for key in ROWS if key[0] != "PTQ"}
    curves["float32, trained on", "float / float"] = [0.4, 0.3]
    curves["k-means, trained", "4 values / float"] = [0.4, 0.3]
    draw(tmp_path / "losses.png", curves, "title", 2)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_divergence_is_told_and_the_last_good_state_kept(images, tmp_path, monkeypatch, capsys):
    def diverges(*args):
        raise NonFiniteLoss("adam", 7, float("nan"), {"w": np.arange(3.0)}, [1.0])

    monkeypatch.setattr(fashion_mnist_qat, "load", lambda *args: images)
    monkeypatch.setattr(fashion_mnist_qat, "run", diverges)
    assert fashion_mnist_qat.main(["--quick", "--png", str(tmp_path / "losses.png")]) == 1
    said = capsys.readouterr().out
    assert "adam: the loss of step 7 is nan" in said and "losses.last-good.npz" in said
    with np.load(tmp_path / "losses.last-good.npz") as file:
        assert file["['w']"].tolist() == [0, 1, 2]
