"""The SmolLM2 example: its plain decoder against NumPy, its file, its texts, and its figures."""

import io
import math
import pathlib
import struct
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Examples are scripts beside each other, not a package.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

import _data
import _debian

import jaxquant as jq

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("rich")

import smollm2  # noqa: E402
import smollm2_generate  # noqa: E402
import smollm2_measure  # noqa: E402
import smollm2_model  # noqa: E402
import smollm2_reference  # noqa: E402
import smollm2_text  # noqa: E402
import smollm2_weights  # noqa: E402

MERGES = ["t h", "th e", "Ġ the"]
SPECIAL = ["<|im_start|>", "<|im_end|>"]
WIDTH, HEADS, KV_HEADS, MLP, LAYERS = 64, 4, 2, 96, 2


def write_gguf(path):
    """A GGUF file like SmolLM2's: random weights in blocks of 8 bits, bytes and a few merges."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = SPECIAL + sorted(letters) + [pair.replace(" ", "") for pair in MERGES]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocab) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    rng = np.random.default_rng(0)

    def matrix(name, outputs, inputs):
        w = rng.normal(0, 1.5 / math.sqrt(inputs), (outputs, inputs)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(w, kind), raw_dtype=kind)

    def norm(name):
        writer.add_tensor(f"{name}.weight", rng.uniform(0.5, 1.5, WIDTH).astype(np.float32))

    matrix("token_embd", len(vocab), WIDTH)
    norm("output_norm")
    for layer in (f"blk.{i}" for i in range(LAYERS)):
        shared = WIDTH * KV_HEADS // HEADS
        for name, outputs in (("q", WIDTH), ("k", shared), ("v", shared), ("output", WIDTH)):
            matrix(f"{layer}.attn_{name}", outputs, WIDTH)
        matrix(f"{layer}.ffn_gate", MLP, WIDTH)
        matrix(f"{layer}.ffn_up", MLP, WIDTH)
        matrix(f"{layer}.ffn_down", WIDTH, MLP)
        norm(f"{layer}.attn_norm")
        norm(f"{layer}.ffn_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return smollm2_weights.read(write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf"))


@pytest.fixture(scope="module", params=[False, True], ids=["loop", "scan"])
def decoder(request, file):
    return smollm2_weights.load(file, scan=request.param)


TOKENS = np.random.default_rng(1).integers(0, 250, (2, 12)).astype(np.int32)


def numpy_logits(file, tokens):
    c = file.config
    return smollm2_reference.logits(
        file.tensors,
        tokens,
        heads=c.heads,
        kv_heads=c.kv_heads,
        base=c.rope_base,
        epsilon=c.epsilon,
    )


@pytest.fixture(scope="module")
def applied(decoder):
    """The model's jitted function and what it makes of `TOKENS`."""
    model, variables = decoder
    apply = jax.jit(model.apply)
    return apply, np.asarray(apply(variables, TOKENS))


def test_both_models_equal_numpy(applied, file):
    _, got = applied
    for row, tokens in zip(got, TOKENS, strict=True):
        np.testing.assert_allclose(row, numpy_logits(file, tokens), atol=2e-5)


def test_loaded_variables_are_what_the_model_initialises(decoder):
    model, variables = decoder
    expected = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, expected)


def test_decoding_with_a_cache_equals_a_full_pass(decoder, applied):
    model, variables = decoder
    step, expected = applied
    cache = smollm2_model.empty_cache(model.config, 2, 20)
    got, cache = step(variables, TOKENS[:, :5], cache, 0)
    np.testing.assert_allclose(got, expected[:, :5], atol=2e-5)
    for i in range(5, 12):
        got, cache = step(variables, TOKENS[:, i : i + 1], cache, i)
        np.testing.assert_allclose(np.asarray(got)[:, 0], expected[:, i], atol=2e-5)


def test_tied_embedding_is_stored_once_at_int8(decoder):
    model, variables = decoder
    method = smollm2.methods()["rtn-w4-g64"]
    quantized, report = smollm2_measure.quantize(method, model.apply, variables, TOKENS)
    assert report["params/embed/embedding"].action.startswith("int8")
    assert not any(leaf.shared for leaf in report.leaves)
    kernels = [leaf for leaf in report.leaves if leaf.path.endswith("kernel")]
    assert all(leaf.action.startswith("int4") for leaf in kernels)
    # Of few rows a CPU would round each to 15 bits, to contract it on integers.
    tokens = np.random.default_rng(2).integers(0, 250, (2, 300)).astype(np.int32)
    fn, served = model.apply, jq.quantized(model.apply)
    both = jax.jit(lambda q, tokens: (served(q, tokens), fn(jq.dequantize_params(q), tokens)))
    np.testing.assert_allclose(*both(quantized, tokens), atol=1e-4)


def test_weight_only_rows_are_the_same_on_codes_and_on_floats(decoder):
    model, variables = decoder
    method = smollm2.methods()["nf4-g64"]
    given = (method, model.apply, variables, {"text": TOKENS}, TOKENS)
    as_float, _ = smollm2_measure.measure(*given)
    on_codes, _ = smollm2_measure.measure(*given, integer=True)
    assert as_float.perplexity["text"] == pytest.approx(on_codes.perplexity["text"], rel=1e-4)
    assert 4 < as_float.bits < 5 and as_float.peak > 0


def test_quantized_model_generates_what_a_full_pass_would(decoder):
    model, variables = decoder
    method = smollm2.methods()["rtn-w8a8"]
    variables, _ = smollm2_measure.quantize(method, model.apply, variables, TOKENS)
    fn = jq.quantized(model.apply)
    got = list(smollm2_generate.greedy(fn, variables, model.config, TOKENS[0], 3))
    tokens = np.append(TOKENS[:1], [got], axis=1)
    logits = np.asarray(jax.jit(fn)(variables, tokens))[0, -4:-1]
    np.testing.assert_allclose(logits[np.arange(3), got], logits.max(-1), atol=1e-3)


def test_answers_come_in_pieces_of_text(file):
    model, variables = smollm2_weights.load(file, scan=True)
    tokenizer = smollm2_weights.tokenizer(file.metadata)
    pieces = smollm2_generate.answer(model.apply, variables, model.config, tokenizer, "the", 5)
    assert "\ufffd" not in "".join(pieces)


def test_tokenizer_merges_splits_digits_and_comes_back(file):
    tokenizer = smollm2_weights.tokenizer(file.metadata)
    assert tokenizer.encode("the the 12").tokens == ["the", "Ġthe", "Ġ", "1", "2"]
    assert tokenizer.encode("<|im_start|>the<|im_end|>").ids[::2] == [0, 1]
    text = "The “naïve”\n\n  1984's end.\t"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_other_files_are_refused(file):
    other = file.metadata | {"tokenizer.ggml.pre": "llama-bpe"}
    with pytest.raises(ValueError, match="expected a tokenizer of kind gpt2, smollm, got"):
        smollm2_weights.tokenizer(other)
    untied = smollm2_weights.File(file.metadata, file.tensors | {"output.weight": np.empty})
    with pytest.raises(ValueError, match=r"tied embeddings, got llama, output\.weight: True"):
        _ = untied.config


def test_windows_are_spread_and_do_not_overlap():
    parts = [np.arange(35), np.arange(100, 125)]
    windows = smollm2_text.spread(parts, 3, 10)
    assert windows.shape == (3, 10)
    assert windows[:, 0].tolist() == [0, 20, 110]
    assert smollm2_text.spread(parts, 5, 10)[:, 0].tolist() == [0, 10, 20, 100, 110]
    with pytest.raises(ValueError, match="expected 1 to 5, got 6"):
        smollm2_text.spread(parts, 6, 10)


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    loss = smollm2_measure.losses(lambda variables, tokens: jnp.zeros((*tokens.shape, 50)))
    windows = np.zeros((5, 8), np.int32)  # no multiple of the batch
    assert smollm2_measure.perplexity(loss, None, windows) == pytest.approx(50, rel=1e-5)


def test_perplexity_is_that_of_numpy(file):
    model, variables = smollm2_weights.load(file)
    got = smollm2_measure.perplexity(smollm2_measure.losses(model.apply), variables, TOKENS)
    logits = np.stack([numpy_logits(file, tokens) for tokens in TOKENS])[:, :-1]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.take_along_axis(p, TOKENS[:, 1:, None], -1)
    assert got == pytest.approx(np.exp(-np.log(chosen).mean()), rel=1e-5)


def test_methods_are_chosen_by_globs():
    known = smollm2.methods()
    assert smollm2.chosen("rtn-w4-g*, nf4*", known)[:2] == ["float32", "rtn-w4-g128"]
    assert smollm2.chosen("float32", known) == ["float32"]
    assert all(smollm2.chosen(name, known) for name in smollm2.QUICK)
    with pytest.raises(ValueError, match="no method matches 'gptg'; there are float32, "):
        smollm2.chosen("gptg", known)


def test_table_fits_a_hundred_columns():
    from rich.console import Console

    figures = {"Austen": 123456.0, "Shakespeare": 25.5}
    rows = [
        smollm2_measure.Row("float32", "float", 32.0, 538.1, 0.0, 900.0, figures),
        smollm2_measure.Row("awq-gptq-w4-g64", "W4 per channel", 4.5, 88.0, 599.9, 2540.0, figures),
    ]
    out = io.StringIO()
    Console(width=100, file=out).print(smollm2_measure.table(rows, "title", "caption"))
    text = out.getvalue()
    assert "…" not in text
    for figure in ("1.2e+05", "25.50", "4.50", "599.9", "2.54", "awq-gptq-w4-g64"):
        assert figure in text


def test_peak_of_memory_begins_anew():
    smollm2_measure.forget_peak()
    before = smollm2_measure.peak_megabytes()
    array = np.ones(20_000_000)
    assert smollm2_measure.peak_megabytes() > before + 0.9 * array.nbytes / 1e6 > 100


def r_object(strings):
    """A vector of strings as R serializes and compresses it."""
    content = b"X\n" + struct.pack(">4i", 3, 0x40200, 0x30500, 5) + b"UTF-8"
    content += struct.pack(">2i", 16, len(strings))
    for string in (s.encode() for s in strings):
        content += struct.pack(">2i", 0x40009, len(string)) + string
    return struct.pack(">I", len(content)) + zlib.compress(content)


def test_strings_of_r_are_read():
    data = r_object(["EMMA", "", "naïve"]) + r_object(["x"])
    assert _debian.r_strings(data) == [["EMMA", "", "naïve"], ["x"]]
    with pytest.raises(ValueError, match="not a file of objects"):
        _debian.r_strings(b"\x00\x00\x00\x09" + zlib.compress(b"X\n"))


def test_members_of_a_debian_package_are_found():
    def member(name, content):
        size = f"{len(content):<10}".encode()
        return (
            name.encode().ljust(16)
            + b" " * 32
            + size
            + b"`\n"
            + content
            + b"\n" * (len(content) % 2)
        )

    data = b"!<arch>\n" + member("debian-binary", b"2.0") + member("data.tar.xz/", b"12")
    assert [(n, read()) for n, read in _debian.members(data)] == [
        ("debian-binary", b"2.0"),
        ("data.tar.xz", b"12"),
    ]


# The real model below: 93 MB the first time, and minutes. Asked for with `-m slow`.


@pytest.fixture(scope="module")
def real():
    """The published model and its tokenizer, fetched as a user's first run fetches them."""
    return smollm2_weights.read(_data.smollm2_file())


@pytest.mark.slow
def test_real_models_equal_numpy(real):
    texts = smollm2_text.texts(smollm2_weights.tokenizer(real.metadata), 1, 1)
    expected = numpy_logits(real, texts.austen[0])
    for scan in (False, True):
        model, variables = smollm2_weights.load(real, scan=scan)
        got = jax.jit(model.apply)(variables, texts.austen)[0]
        np.testing.assert_allclose(got, expected, atol=5e-4)


@pytest.mark.slow
def test_real_tokenizer_comes_back_from_whole_novels(real):
    tokenizer = smollm2_weights.tokenizer(real.metadata)
    for text in (_data.novels()[0], _data.plays()[0]):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
