"""The compiled library: builds, loads, and computes what PyTorch computes."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from extension_build import ROOT, build_extension, compilers, needs_compiler, needs_nvcc

from blip2fast import _extension
from blip2fast.kernels import philox
from blip2fast.ops.itc import sweep as itc_sweep
from blip2fast.ops.qformer_attention import backends as _attention_backends

needs_extension = pytest.mark.skipif(bool(_extension.why_not()), reason=_extension.why_not())


@needs_compiler
def test_builds_and_is_up_to_date(tmp_path: Path) -> None:
    """A build now gives the library that these tests load."""
    built = build_extension(tmp_path)
    note = built.with_suffix(".txt").read_text()
    assert built.exists(), note
    if shutil.which("nvcc"):
        assert "without CUDA" not in note
    assert built.read_bytes() == _extension.LIBRARY.read_bytes(), (
        "blip2fast/_C.so is older than csrc/: python setup.py build_ext --inplace"
    )


@needs_extension
def test_loads() -> None:
    assert _extension.has_op("philox_keep_mask")
    assert _extension.why_not("philox_keep_mask") == ""
    assert not _extension.has_op("no_such_op")
    assert "has no no_such_op: extension built with" in _extension.why_not("no_such_op")


@needs_extension
def test_a_library_names_its_code() -> None:
    """By its sources and compiler, not by where it was built, so that records hold elsewhere."""
    nvcc = compilers.find_nvcc(torch.version.cuda)[0]
    release = compilers.nvcc_release(nvcc) if nvcc else ""
    assert _extension.compiled_code() == compilers.code(release)


def test_why_a_library_does_not_load(tmp_path: Path) -> None:
    library, note = tmp_path / "_C.so", tmp_path / "_C.txt"
    assert "was not built: pip install --no-build-isolation" in _extension._load(library, note)
    note.write_text("extension not built: no ninja\n")
    assert _extension._load(library, note) == "extension not built: no ninja"
    library.write_bytes(b"no library")
    assert "_C.so does not load beside torch" in _extension._load(library, note)


@needs_extension
@pytest.mark.parametrize(
    ("rows", "heads", "columns", "first"),
    [
        (37, 3, 257, 0),
        (5, 12, 64, 3),
        (400, 2, 15, 2),
        (3, 1, 1, 5),
        (2, 1, 1500, 1),
        (0, 2, 7, 0),
        (4, 4, 0, 0),
    ],
)
def test_philox_keep_mask_is_the_function_of_ops_philox(
    rows: int, heads: int, columns: int, first: int
) -> None:
    state = philox.philox_state(2**63 - 12345, 2**32 - 7)
    row = torch.randint(0, 2**32, (1, rows))
    head = torch.randint(0, 2**32, (heads, 1))
    least = philox.threshold(0.3)
    expected = philox._keep(state, least, row[..., None], head[..., None], columns, first)
    assert philox.keep_mask(state, 0.3, row, head, columns, first).equal(expected)
    flat = [x.flatten().contiguous() for x in torch.broadcast_tensors(row, head)]
    chunked = philox._keep_in_chunks(state, least, *flat, columns, first)
    assert chunked.view(expected.shape).equal(expected)


@needs_extension
def test_philox_keep_mask_passes_opcheck() -> None:
    state, rows = philox.philox_state(3, 1), torch.arange(5)
    arguments = (state, rows, rows + 1, 1 << 30, 9, 2)
    torch.library.opcheck(torch.ops.blip2fast_C.philox_keep_mask, arguments)


@needs_extension
def test_philox_keep_mask_rejects_what_it_would_misread() -> None:
    op, rows = torch.ops.blip2fast_C.philox_keep_mask, torch.arange(4)
    state = philox.philox_state(3, 1)
    with pytest.raises(RuntimeError, match="rows: expected contiguous int64, 4 elements"):
        op(state, rows.int(), rows, 0, 4, 0)
    with pytest.raises(RuntimeError, match="one shape"):
        op(state, rows, rows[:2], 0, 4, 0)
    with pytest.raises(RuntimeError, match="philox: expected contiguous int64, 2 elements, got 1"):
        op(state[:1], rows, rows, 0, 4, 0)


def _cuobjdump(*options: str, folder: Path = ROOT) -> str:
    """Output of the disassembler that comes with Triton's wheel."""
    tool = shutil.which("cuobjdump")
    found = importlib.util.find_spec("triton")
    if tool is None and found is not None and found.origin is not None:
        tool = str(Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if tool is None or not Path(tool).exists():
        pytest.skip("no cuobjdump: pip install triton")
    command = [tool, *options, str(_extension.LIBRARY)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout


needs_cuda_build = pytest.mark.skipif(
    not _extension.has_op("qformer_cross_attention_fwd"),
    reason="built without CUDA: " + _extension.why_not("qformer_cross_attention_fwd"),
)


@needs_cuda_build
def test_a_build_with_cuda_is_a_backend() -> None:
    """Nothing but the device may keep `impl="cuda"` from being chosen."""
    attention = _attention_backends.AttentionCall(
        32, 257, 12, 64, torch.bfloat16, "cuda", dropout=True, key_mask=True, lse=True, cross=True
    )
    assert _attention_backends._cuda_reasons(attention) == []
    pairs = itc_sweep.ITCCall(128, 256, 32, 256, torch.bfloat16, "cuda", 0.0)
    assert itc_sweep._cuda_reasons(pairs) == []
    for capability in (80, 86, 89, 90, 100, 103, 120):
        assert not _attention_backends._cuda_reasons(attention._replace(capability=capability))
        assert not itc_sweep._cuda_reasons(pairs._replace(capability=capability))
    too_old = ["compute capability 7.5: needs 8.0 or later"]
    assert _attention_backends._cuda_reasons(attention._replace(capability=75)) == too_old
    assert itc_sweep._cuda_reasons(pairs._replace(capability=75)) == too_old


# bytes of stack a kernel may use: registers that the compiler could not keep, addresses mostly
SPILLS = {
    # dq, and dk or dv, of 32 queries and 16 keys at once
    "cross_attention_backward_queries_kernel<64,2,fused>": 72,
    "cross_attention_backward_queries_kernel<128,1>": 48,
    "cross_attention_backward_keys_kernel<128>": 72,
}


def _kernel_name(mangled: str) -> str:
    """`name<numbers, fused>` of a mangled template instance."""
    match = re.match(r"_ZN9blip2fastL?\d+(?P<name>\w+?_kernel)", mangled)
    assert match, mangled
    numbers = re.findall(r"Li(\d+)E", mangled) + ["fused"] * ("Lb1E" in mangled)
    return f"{match['name']}<{','.join(numbers)}>"


@needs_cuda_build
def test_kernels_fit_their_registers() -> None:
    """Compiled for both architectures; no spills beyond those listed."""
    report = _cuobjdump("-res-usage")
    assert {"arch = sm_80", "arch = sm_90a"} <= set(report.splitlines())
    kernels = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", report)
    assert len(kernels) >= 2 * (
        2 * (16 + 4) + 4
    )  # architectures; formats, kernels of each and of none
    spilled = {_kernel_name(name): int(stack) for name, _, stack, _ in kernels if int(stack)}
    assert {name for name, stack in spilled.items() if stack > SPILLS.get(name, 0)} == set()
    assert max(int(registers) for _, registers, _, _ in kernels) <= 255


def _machine_code(architecture: str) -> dict[str, str]:
    """Disassembly of every kernel that the library has for an architecture."""
    parts = re.split(r"Function : (\w+)", _cuobjdump("-sass", "-arch", architecture))[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@needs_cuda_build
@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_89", "sm_100", "sm_120"])
def test_newer_cards_can_translate_the_kernels(architecture: str, tmp_path: Path) -> None:
    """Cards without machine code in the library: every kernel but those with wgmma."""
    _cuobjdump("-xptx", "all", folder=tmp_path)
    texts = sorted(tmp_path.glob("*.ptx"))
    kernels = [name for x in texts for name in re.findall(r"\.entry (\w+)\(", x.read_text())]
    assert sorted(kernels) == sorted(_machine_code("sm_80"))
    for text in texts:
        assert ".target sm_80" in text.read_text()
        command = ["nvcc", "-cubin", f"-arch={architecture}", str(text), "-o", "cubin"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


HOPPER = ("itc_similarity_sm90_kernel", "itc_gradient_sm90_kernel")


@needs_cuda_build
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_kernels_multiply_on_tensor_cores(architecture: str) -> None:
    code = _machine_code(architecture)
    names = [_kernel_name(name) for name in code]
    assert names.count("itc_similarity_kernel<>") == 2
    # Hopper's own kernels exist for Hopper alone: two formats, gradients of images and of texts
    hoppers = [name for name in names if name.startswith(HOPPER)]
    assert len(hoppers) == (2 + 4 if architecture == "sm_90a" else 0)
    sums = ("itc_rows", "itc_columns", "itc_join", "itc_scale")  # no products in these
    for name, body in code.items():
        assert "ATOM" not in body, name  # sums in a fixed order
        assert "RED." not in body, name
        if _kernel_name(name).startswith(sums):
            continue
        bfloat = "BFloat16" in name
        if _kernel_name(name).startswith(HOPPER):
            kind = "HGMMA.64x256x16.F32.BF16 " if bfloat else "HGMMA.64x256x16.F32 "
            assert " HMMA." not in body, name
        else:
            kind = "HMMA.16816.F32.BF16" if bfloat else "HMMA.16816.F32 "
            assert "HGMMA" not in body, name
        assert kind in body, name


@needs_cuda_build
def test_hopper_similarities_do_not_wait_for_each_product() -> None:
    """Products in a row; similarities are waited for with the next ones running. 24 shuffles."""
    for name, body in _machine_code("sm_90a").items():
        if not _kernel_name(name).startswith(HOPPER):
            continue
        found = re.findall(r"HGMMA|WARPGROUP\.ARRIVE|WARPGROUP\.DEPBAR\.LE gsb0, 0x\d", body)
        if _kernel_name(name).startswith(HOPPER[0]):
            products = ["WARPGROUP.ARRIVE", *["HGMMA"] * 4, "WARPGROUP.DEPBAR.LE gsb0, 0x1"]
            assert body.count("SHFL.BFLY") == 24
        else:
            products = ["WARPGROUP.ARRIVE", *["HGMMA"] * 2, "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
        assert found[: len(products)] == products
        assert set(found[len(products) :]) == {"WARPGROUP.DEPBAR.LE gsb0, 0x0"}
        assert "LDGSTS.E.BYPASS.128" in body  # copies in the background, 16 bytes each


# where accumulators, or operands in registers, are touched too early
EARLY = {
    "itc_similarity_sm90.h": (
        "wait_products<1>();", "wait_products<1>();\n      if (c[0] == 1.0f) p.sim[0] = c[1];",
    ),
    "itc_gradient_sm90.h": (
        "    wait_products<0>();", "    if (c[0] == 1.0f) p.d_temp[0] = c[1];",
    ),
}  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("fault", [None, *EARLY])
def test_the_compiler_keeps_hopper_products_in_flight(fault: str | None, tmp_path: Path) -> None:
    """Where registers are touched too early ptxas makes the products wait, and says so."""
    for source in (ROOT / "csrc").glob("itc*"):
        shutil.copy(source, tmp_path)
    if fault is not None:
        header, (old, new) = tmp_path / fault, EARLY[fault]
        assert header.read_text().count(old) == 1
        header.write_text(header.read_text().replace(old, new))
    command = ["nvcc", "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "-cubin"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", "itc_sm90.cu", "-o", "cubin"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    report = run.stdout + run.stderr
    assert report.count("Compiling entry function") == 6
    # C7510 and its like: "wgmma.mma_async instructions are serialized due to ..."
    assert ("serialized" in report or "C75" in report) == (fault is not None), report
    if fault is None:
        assert report.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 6
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
        assert len(registers) == 6
        # 128 of them are the accumulators; 256 threads may have 255 each
        assert 128 < max(registers) <= 224
