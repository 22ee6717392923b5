"""What the compiler made of the CUDA kernels: `python benchmarks/cuda_resources.py [MODULE]`.

Reads registers, memory and instructions of every kernel from a `_cuda` module that nvcc has built (default: the
installed one) and writes benchmarks/results/cuda-resources.md. Nothing runs, and no GPU is needed; cuobjdump, nvdisasm
and nvcc have to be on PATH, and cu++filt or c++filt for the names.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

OUT = Path(__file__).resolve().parent / "results" / "cuda-resources.md"
TOOLS = ("cuobjdump", "nvdisasm", "nvcc")
ARCHITECTURES = ("sm_80", "sm_90")
#: Of a template's instances the page has those that these match, and always the worst.
TYPICAL = re.compile(
    r"uint4|bf16, 8|Team<8, [48]>|kernel<int>|Experts<int>|keep_heaviest_kernel<unsigned int>|sums_kernel<float>"
)
#: Per multiprocessor of sm_80 and sm_90 alike, from the CUDA C++ Programming Guide's table of compute capabilities.
REGISTERS, MOST_WARPS, MOST_BLOCKS, WARP = 65536, 64, 32, 32
SYSTEM_SHARED = {"sm_90": 1024}  # counted by cuobjdump, but not the kernel's


@dataclass
class Kernel:
    """One kernel for one architecture; `count` has its instructions by class (see `instruction_class`)."""

    registers: int = 0
    stack: int = 0
    shared: int = 0
    threads: int = 0
    count: Counter[str] = field(default_factory=Counter)

    def badness(self) -> tuple[int, int, int]:
        return self.stack, self.registers, self.count["all"]

    def warps(self) -> int:
        """Warps that a multiprocessor holds as far as registers go: each takes them in steps of 256."""
        if not self.threads or not self.registers:
            return 0
        per_warp = -(-self.registers * WARP // 256) * 256
        # Every one of the four schedulers has a quarter of the registers.
        warps = min(REGISTERS // 4 // per_warp * 4, MOST_WARPS)
        block = -(-self.threads // WARP)
        return min(warps // block, MOST_BLOCKS) * block


Kernels = dict[tuple[str, str], Kernel]  # by architecture and mangled name


def instruction_class(opcode: str) -> str | None:
    """The column of an instruction: memory by kind and width, None for arithmetic."""
    kind = {"LDG": "load", "STG": "store", "LDS": "shared load", "STS": "shared store", "LDL": "spill", "STL": "spill"}
    name = kind.get(opcode.partition(".")[0])
    if name in ("load", "store"):
        return f"{name} 16" if ".128" in opcode else name
    return name


def read_resources(text: str, into: Kernels) -> None:
    """`cuobjdump -res-usage`: one architecture per section, a line with the name and one with the numbers."""
    architecture = name = ""
    for line in text.splitlines():
        if found := re.match(r"arch = (sm_\d+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif (found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)) and name:
            registers, stack, shared, local = map(int, found.groups())
            kernel = into.setdefault((architecture, name), Kernel())
            kernel.registers, kernel.stack = registers, stack + local
            kernel.shared = max(0, shared - SYSTEM_SHARED.get(architecture, 0))
            name = ""


def read_instructions(text: str, into: Kernels) -> None:
    """`cuobjdump -sass`: one instruction per line behind its address; NOPs only fill up the last lines."""
    architecture, kernel = "", None
    for line in text.splitlines():
        if found := re.match(r"\s*code for (sm_\d+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            kernel = into.setdefault((architecture, found[1]), Kernel())
        elif kernel and (found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)):
            if found[1] == "NOP":
                continue
            kernel.count["all"] += 1
            if column := instruction_class(found[1]):
                kernel.count[column] += 1


def read_launch_bounds(text: str, into: Kernels) -> None:
    """`cuobjdump -ptx`: the threads of __launch_bounds__, which hold for every architecture."""
    for name, x, y, z in re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+), (\d+), (\d+)", text):
        for key, kernel in into.items():
            if key[1] == name:
                kernel.threads = int(x) * int(y) * int(z)


def short_name(demangled: str) -> str:
    """`void moeyard::cuda::(anonymous namespace)::f<T>(T*)` as `f<T>`."""
    name = re.sub(r"\(anonymous namespace\)::|moeyard::|cuda::|^void ", "", demangled)
    return name.partition("(")[0]


def row(architecture: str, name: str, kernel: Kernel) -> str:
    c = kernel.count
    cells = [
        name, architecture, kernel.registers, f"{kernel.stack} ({c['spill']})", kernel.shared,
        f"{c['load 16']} + {c['load']}", f"{c['store 16']} + {c['store']}",
        f"{c['shared load']} / {c['shared store']}", c["all"], kernel.warps() or "?",
    ]  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def page(kernels: Kernels, names: dict[str, str], compiler: str) -> str:
    """The typical and the worst instance of every template, the worst by sm_90."""
    templates: dict[str, list[str]] = {}
    for mangled in sorted({name for _, name in kernels}, key=names.__getitem__):
        templates.setdefault(names[mangled].partition("<")[0], []).append(mangled)
    lines = [
        "# Resources of the CUDA kernels", "",
        f"From the machine code, by benchmarks/cuda_resources.py; {compiler}. Nothing here is measured.", "",
        "Stack: bytes of local memory per thread, most of them spills (the instructions that touch it). Shared: static",
        "bytes. Loads and stores: instructions, those of 16 bytes + narrower ones; a template has paths for every",
        "element type, of which a call takes one. Warps: resident per multiprocessor, of 64, with the threads of",
        "`__launch_bounds__`, as far as registers allow; shared memory may allow fewer.",
        "",
        "| kernel | | registers | stack | shared | loads | stores | shared loads / stores | instructions | warps |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for instances in templates.values():
        worst = max(instances, key=lambda name: kernels.get((ARCHITECTURES[-1], name), Kernel()).badness())
        shown = [name for name in instances if name == worst or TYPICAL.search(names[name])]
        for name in shown:
            others = f" (worst of {len(instances)})" if name == worst and len(instances) > 1 else ""
            label = f"`{names[name]}`{others}"
            lines += [row(arch, label, kernels[arch, name]) for arch in ARCHITECTURES if (arch, name) in kernels]
    spilling = sorted({names[name] for (_, name), kernel in kernels.items() if kernel.stack})
    lines += ["", "With a stack: " + (", ".join(f"`{name}`" for name in spilling) or "none") + "."]
    return "\n".join(lines) + "\n"


def output(*command: str, given: str = "") -> str:
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


def read(module: Path) -> tuple[Kernels, dict[str, str]]:
    """The kernels of a module and their names for people."""
    kernels: Kernels = {}
    read_resources(output("cuobjdump", "-res-usage", str(module)), kernels)
    read_instructions(output("cuobjdump", "-sass", str(module)), kernels)
    read_launch_bounds(output("cuobjdump", "-ptx", str(module)), kernels)
    mangled = sorted({name for _, name in kernels})
    demangled = output(shutil.which("cu++filt") or "c++filt", given="\n".join(mangled)).splitlines()
    return kernels, dict(zip(mangled, map(short_name, demangled), strict=True))


def installed_module() -> Path | None:
    spec = importlib.util.find_spec("moeyard._cuda")
    return Path(spec.origin) if spec and spec.origin else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", type=Path, nargs="?", help="the _cuda module; default: the installed one")
    parser.add_argument("--out", type=Path, default=OUT, help="the page")
    options = parser.parse_args()
    module = options.module or installed_module()
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if module is None or missing:
        print("no _cuda module" if module is None else f"not on PATH: {', '.join(missing)}", file=sys.stderr)
        return 1
    compiler = re.search(r"release [\d.]+, (V[\d.]+)", output("nvcc", "--version"))
    kernels, names = read(module)
    if not kernels:
        print(f"{module.name}: no kernels, not a module that nvcc has built", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(kernels, names, f"nvcc on PATH: {compiler[1] if compiler else 'unknown'}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
