"""benchmarks/cuda_resources.py: what the compiler made of the kernels, from what the tools print."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmark_files import BENCHMARKS, environment, load

RESOURCES = """
Fatbin elf code:
================
arch = sm_90

Resource usage:
 Common:
  GLOBAL:4
 Function _Z4copyPi:
  REG:40 STACK:8 SHARED:1152 LOCAL:0 CONSTANT[0]:616 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z3addPi:
  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:616 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
INSTRUCTIONS = """
\tcode for sm_90
\t\tFunction : _Z4copyPi
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000ff00000000800 */
        /*0010*/              @!P2 LDG.E.128.CONSTANT R4, desc[UR8][R22.64] ;  /* 0x0000000804057981 */
        /*0020*/                   LDG.E R5, desc[UR4][R4.64] ;            /* 0x0000000404057981 */
        /*0030*/               @P0 STG.E.EF.128 desc[UR8][R2.64], R4 ;     /* 0x0000000404057981 */
        /*0040*/                   STL [R1], R0 ;                          /* 0x0000000404057981 */
        /*0050*/                   LDS.128 R16, [R16] ;                    /* 0x0000000404057981 */
        /*0060*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;             /* 0x0000000404057981 */
        /*0070*/                   NOP ;                                   /* 0x0000000404057981 */
"""
PTX = ".visible .entry _Z4copyPi(\n.param .u64 a\n)\n.maxntid 16, 16, 1\n.minnctapersm 4\n{\n}\n.entry _Z3addPi()\n{\n}"


class TestCudaResources:
    def kernels(self) -> Any:
        resources = load("cuda_resources")
        kernels: dict[Any, Any] = {}
        resources.read_resources(RESOURCES, kernels)
        resources.read_instructions(INSTRUCTIONS, kernels)
        resources.read_launch_bounds(PTX, kernels)
        return kernels

    def test_what_cuobjdump_prints(self) -> None:
        kernels = self.kernels()
        assert set(kernels) == {("sm_90", "_Z4copyPi"), ("sm_90", "_Z3addPi")}
        copy = kernels["sm_90", "_Z4copyPi"]
        assert (copy.registers, copy.stack, copy.shared, copy.threads) == (40, 8, 128, 256)
        assert copy.count == {"all": 7, "load 16": 1, "load": 1, "store 16": 1, "spill": 1, "shared load": 1}
        assert (kernels["sm_90", "_Z3addPi"].threads, kernels["sm_90", "_Z3addPi"].warps()) == (0, 0)

    @pytest.mark.parametrize(
        ("registers", "threads", "warps"),
        [(32, 1024, 64), (33, 1024, 32), (40, 256, 48), (64, 256, 32), (65, 96, 27), (168, 128, 12), (255, 32, 8)],
    )
    def test_resident_warps(self, registers: int, threads: int, warps: int) -> None:
        """By hand: a scheduler has 16,384 registers, and a warp takes them by 256."""
        assert load("cuda_resources").Kernel(registers=registers, threads=threads).warps() == warps

    def test_the_page(self) -> None:
        resources = load("cuda_resources")
        text = resources.page(self.kernels(), {"_Z4copyPi": "copy<uint4>", "_Z3addPi": "copy<int>"}, "nvcc 1")
        assert "| `copy<uint4>` (worst of 2) | sm_90 | 40 | 8 (1) | 128 | 1 + 1 | 1 + 0 | 1 / 0 | 7 | 48 |" in text
        assert "copy<int>" not in text
        assert text.endswith("With a stack: `copy<uint4>`.\n")
        assert (
            resources.short_name("void moeyard::cuda::(anonymous namespace)::f<moeyard::bf16, 8>(T*)") == "f<bf16, 8>"
        )

    def test_the_installed_module(self, tmp_path: Path) -> None:
        resources = load("cuda_resources")
        if resources.installed_module() is None:
            pytest.skip("built without CUDA")
        if missing := [tool for tool in resources.TOOLS if shutil.which(tool) is None]:
            pytest.skip(f"not on PATH: {', '.join(missing)}")
        script = [sys.executable, str(BENCHMARKS / "cuda_resources.py"), "--out", str(tmp_path / "page.md")]
        subprocess.run(script, env=environment(), timeout=200, check=True)
        text = (tmp_path / "page.md").read_text()
        for name in ("copy_rows_kernel<uint4>", "spread_kernel<bf16, 8, true>", "gate_kernel<Team<8, 4>, false>"):
            assert text.count(f"`{name}`") >= 2, "not for both architectures"
