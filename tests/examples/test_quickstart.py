"""The quickstart example runs, and its results are close to float."""

import pathlib
import sys

# Examples are scripts beside each other, not a package.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

import quickstart


def test_quickstart_prints_three_reports(capsys):
    found = quickstart.main()
    assert capsys.readouterr().out.count("SQNR dB") == 3
    for name, most in {"plain": 0.02, "linen": 0.2, "nnx": 0.2}.items():
        error, report = found[name]
        assert 0 < error < most
        assert report.quantized == 2
        assert report.ratio < 0.3
