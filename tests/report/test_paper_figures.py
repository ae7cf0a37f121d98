"""Figures for a paper: as wide as asked, with type that can be read, and drawn anew by their own scripts."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import kvpatch as kv
from kvpatch.errors import ProtocolError
from kvpatch.report.paper import TYPE
from synthetic import write_run

WIDTHS = (3.25, 6.75)
FITTED, SCALED = "primary-mode_llr", "heads-6-entropy-C-N1"


def kvpatch(*words: str) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "kvpatch", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> kv.Run:
    return kv.Run(write_run(tmp_path_factory.mktemp("runs") / "small", n=4, phases=["1", "6"]).directory)


@pytest.fixture(scope="module")
def folder(run: kv.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("figures")
    only = [part for name in (FITTED, SCALED) for part in ("--only", name)]
    kvpatch("figures", run.directory, "-o", str(out), *only)
    return out


def inches_of_pdf(content: bytes) -> float:
    found = re.search(rb"MediaBox ?\[ ?0 0 ([\d.]+)", content)
    assert found is not None
    return float(found[1]) / 72


def least_type(svg: str) -> float:
    """Points of the smallest type, as it stands on the paper."""
    box = re.search(r'width="([\d.]+)in" height="[\d.]+in" viewBox="0 0 ([\d.]+) ', svg)
    assert box is not None
    return min(float(size) for size in re.findall(r'font-size="([\d.]+)px"', svg)) * float(box[1]) * 72 / float(box[2])


@pytest.mark.parametrize("inches", WIDTHS)
@pytest.mark.parametrize("name", [FITTED, SCALED])
def test_svg_pdf_and_png_are_as_wide_as_asked_with_type_that_can_be_read(
    folder: Path, name: str, inches: float
) -> None:
    svg = (folder / f"{name}-{inches:g}in.svg").read_text("utf-8")
    assert f'width="{inches:g}in"' in svg
    assert least_type(svg) > 0.85 * TYPE
    assert inches_of_pdf((folder / f"{name}-{inches:g}in.pdf").read_bytes()) == pytest.approx(inches, abs=0.02)
    png = (folder / f"{name}-{inches:g}in.png").read_bytes()
    assert struct.unpack(">I", png[16:20])[0] == pytest.approx(inches * 300, abs=6)


@pytest.mark.parametrize("name", [FITTED, SCALED])
def test_its_script_draws_the_same_figure_from_the_run(run: kv.Run, folder: Path, tmp_path: Path, name: str) -> None:
    command = [sys.executable, str(folder / f"{name}.py"), run.directory]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for inches in WIDTHS:
        again = tmp_path / f"{name}-{inches:g}in.svg"
        assert again.read_bytes() == (folder / again.name).read_bytes()
        assert (tmp_path / f"{name}-{inches:g}in.pdf").exists() and (tmp_path / f"{name}-{inches:g}in.png").exists()


def test_a_changed_trial_changes_what_the_script_draws(run: kv.Run, tmp_path: Path) -> None:
    other = kv.Run(write_run(tmp_path / "other", n=5, phases=["1"]).directory)
    assert run.figure(FITTED)["datasets"] != other.figure(FITTED)["datasets"]
    drawn = other.drawn(other.figure(FITTED), 3.25)
    assert set(drawn) == {".svg", ".pdf", ".png"} and drawn[".pdf"].startswith(b"%PDF")


def test_figures_are_listed_by_id_and_an_unknown_one_is_refused(run: kv.Run) -> None:
    listed = [line.split(":")[0] for line in kvpatch("figures", run.directory, "--list", "--all").splitlines()]
    assert listed == list(run.figures) and {FITTED, SCALED} <= set(listed)
    with pytest.raises(ProtocolError, match="there is no figure 'primary-mode_lr'"):
        run.figure("primary-mode_lr")
    with pytest.raises(ProtocolError, match=r"inches wide, got 0\.1"):
        run.figure(FITTED, inches=0.1)
