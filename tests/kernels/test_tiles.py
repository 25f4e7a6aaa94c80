"""AMX: that its variant assembles, what it refuses, and that nothing beside a row or a weight comes into a product."""

from __future__ import annotations

import shutil
import subprocess
from ctypes import c_int
from dataclasses import replace

import pytest
import torch
from structlog.testing import capture_logs

from lanewise.kernels import cpu_build, native
from lanewise.kernels.cpu_build import CannotBuild, cpu_flags
from lanewise.kernels.native import Packer, available
from tests.kernels.emulated import AMX, EMULATED
from tests.kernels.test_native import decoder

PERMISSION, PAIR_LEFT_OUT, ROWS_MATTER = 1, 2, 3  # `lw_tile_fault` of cpu/tiles_emulated.h


@pytest.fixture
def emulated():
    try:
        return native.load(EMULATED)
    except CannotBuild as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_what_lies_beside_a_row_and_a_panel_stays_out(emulated, dtype):
    """80 is no whole number of tile steps: the last one of a row or panel would reach into the next."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(33, 80, generator=generator).bfloat16()
    weight = torch.randn(64, 80, generator=generator)
    packer, kernels = Packer(EMULATED, 1), decoder(EMULATED, 16, torch.bfloat16)
    if dtype == torch.bfloat16:
        beside = torch.cat([weight[:32], torch.full((32, 80), torch.nan)])
        packed = [packer.pack(w.bfloat16()) for w in (weight, beside)]
    else:
        beside = torch.cat([weight[:32], torch.full((32, 80), 9.0)])
        whole = [(w * 12).to(torch.int8) for w in (weight, beside)]
        packed = [packer.pack_bytes(w, torch.ones(64), torch.bfloat16, rounded_rows=True) for w in whole]
    expected = kernels.multiply(rows, packed[0], 64)[:, :32]
    loud = rows.clone()
    loud[1::2] = torch.nan if dtype == torch.bfloat16 else 1e4
    assert torch.equal(kernels.multiply(rows, packed[1], 64)[:, :32], expected)
    assert torch.equal(kernels.multiply(loud, packed[1], 64)[::2, :32], expected[::2])


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(PERMISSION, "does not permit AMX"), (PAIR_LEFT_OUT, "are wrong"), (ROWS_MATTER, "depend on its company")],
)
def test_a_variant_that_fails_its_check_gives_way(emulated, fault, reason, monkeypatch):
    plain = available()
    monkeypatch.setattr(native, "usable_variants", lambda flags: (EMULATED, plain))
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    assert available() is EMULATED
    knob = c_int.in_dll(emulated, "lw_tile_fault")
    knob.value = fault
    try:
        with capture_logs() as said:
            assert available() is plain
    finally:
        knob.value = 0
    (line,) = said
    assert (line["event"], line["log_level"]) == ("native_variant_refused", "warning")
    assert (line["variant"], line["instead"]) == (EMULATED.name, plain.name)
    assert reason in line["reason"]


def test_the_real_instructions_assemble():
    if not EMULATED.needs <= cpu_flags():
        pytest.skip("not the kind of machine that would compile it")
    variant = replace(AMX, flags=(*AMX.flags, "-O1"))  # sooner than what serves, and the same instructions
    try:
        made = cpu_build.library(variant)
    except CannotBuild as error:
        pytest.skip(f"this compiler knows no AMX: {error}")
    if (objdump := shutil.which("objdump")) is None:
        pytest.skip("no disassembler")
    code = subprocess.run([objdump, "-d", str(made)], capture_output=True, text=True, check=True).stdout
    for name in ("ldtilecfg", "tileloadd", "tilezero", "tdpbf16ps", "tdpbusd", "tilestored", "tilerelease"):
        assert name in code
    # A processor without AMX can still ask the library, which says so before it tries one.
    if not AMX.needs <= cpu_flags():
        with pytest.raises(CannotBuild, match="avx512_amx: the system does not permit AMX"):
            native.load(variant)


def test_a_compiler_without_amx_leaves_it_out_of_an_image(tmp_path, monkeypatch, capsys):
    old = tmp_path / "c++"
    old.write_text(
        "#!/bin/sh\n"
        'case "$*" in *-mamx-tile*) echo "unrecognized -mamx-tile" >&2; exit 1;; esac\n'
        'for last; do :; done; : > "$last"\n'
    )
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    cpu_build.main([str(tmp_path / "made")])
    said = capsys.readouterr()
    assert [line.rpartition("/")[2].split("-")[2] for line in said.out.split()] == ["avx512_bf16", "avx512", "avx2"]
    assert said.err.startswith("avx512_amx is left out")
    assert "unrecognized -mamx-tile" in said.err
