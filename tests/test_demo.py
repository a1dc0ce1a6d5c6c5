"""What `make demo` prints: that a terminal of 80 columns shows all of it."""

import io

import pytest

pytest.importorskip("transformers")
from rich.console import Console

from bench.quality import demo

FULL = {
    "metrics": dict.fromkeys((*demo.KINDS, "mean"), 100.0),
    "locality_b": {"t_loc": 100.0, "m_loc": 100.0},
    "exact": dict.fromkeys(("rel", "t_gen", "m_gen"), 100.0),
}


@pytest.mark.parametrize("make", (demo.legend, demo.five_metrics, demo.strict))
def test_tables_fit_into_80_columns(make):
    table = make(dict.fromkeys(demo.WHAT, FULL))
    out = io.StringIO()
    Console(file=out, width=80).print(table)
    lines = out.getvalue().splitlines()
    assert "…" not in out.getvalue() and max(map(len, lines)) <= 80
    for name in demo.WHAT:  # each on one line, with nothing cut
        assert sum(name in line.split("  ")[0].removeprefix("│ ").split(" │") for line in lines) == 1
    cells = sum(line.count("100.0") for line in lines)
    assert cells == len(demo.WHAT) * (len(table.columns) - 1) * (make is not demo.legend)
