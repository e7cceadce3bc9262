import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from medmerge_jax.runtime import cpu

FLAG = "--xla_cpu_experimental_ynn_fusion_type"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, f"{FLAG}=-individual_convolution"),
        ("", f"{FLAG}=-individual_convolution"),
        ("--xla_a=1", f"--xla_a=1 {FLAG}=-individual_convolution"),
        (f"{FLAG}=reduce --xla_a=1", f"{FLAG}=reduce --xla_a=1"),
        ("flags.txt", "flags.txt"),
    ],
)
def test_a_flag_is_added_to_the_flags_of_the_user(monkeypatch, given, wanted):
    monkeypatch.setattr(cpu, "_xla_knows_the_flag", lambda: True)
    if given is None:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    else:
        monkeypatch.setenv("XLA_FLAGS", given)
    cpu.convolve_on_all_cores()
    assert os.environ["XLA_FLAGS"] == wanted
    cpu.convolve_on_all_cores()
    assert os.environ["XLA_FLAGS"] == wanted


@pytest.mark.parametrize("missing", ["xla_cpu_experimental_ynn_fusion_type", "_CONVOLUTION", None])
def test_no_flag_is_given_to_a_jaxlib_that_does_not_know_it(monkeypatch, tmp_path, missing):
    """A stand-in for its library, which has the names of flags as they are."""
    names = ["xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"]
    library = [name for name in names if missing is None or not name.endswith(missing)]
    (tmp_path / "libjax_common.so").write_bytes(
        b"\0".join(name.encode() for name in ["x", *library])
    )
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    cpu.convolve_on_all_cores()
    assert (os.environ["XLA_FLAGS"] == "--xla_a=1") == (missing is not None)


def test_without_jaxlibs_library_no_flag_is_given(monkeypatch):
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("XLA_FLAGS", "")
    cpu.convolve_on_all_cores()
    assert not os.environ["XLA_FLAGS"]


@pytest.mark.parametrize("prepared", [False, True])
def test_the_installed_jaxlib_knows_the_flag_and_does_as_it_says(prepared):
    """A convolution is a fusion of YNNPACK without it, an instruction of XLA with it."""
    program = """
        import jax, jax.numpy as jnp
        x, kernel = jnp.ones((4, 32, 32, 32)), jnp.ones((3, 3, 32, 32))
        numbers = ("NHWC", "HWIO", "NHWC")
        convolve = lambda *a: jax.lax.conv_general_dilated(
            *a, (1, 1), "SAME", dimension_numbers=numbers
        )
        print(jax.jit(convolve).lower(x, kernel).compile().as_text())
    """
    assert ("ynn_fusion" in _after_start(program, prepared)) != prepared


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    ("megabytes", "blocks", "thread"),
    [
        *((200, 1, False), (20, 5, True)),
        pytest.param(200, 1, True, marks=pytest.mark.slow),
    ],
)
def test_memory_that_is_allocated_again_has_no_page_faults(prepared, megabytes, blocks, thread):
    """XLA's block of a step, which any thread may allocate, and what its threads need beside it."""
    program = f"""
        import ctypes, resource, threading
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        libc.malloc.argtypes = [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        def use():
            found = [libc.malloc({megabytes} * 2**20) for _ in range({blocks})]
            for block in found:
                libc.memset(block, 1, {megabytes} * 2**20)
            for block in found:
                libc.free(block)
        def measure():
            use()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(5):
                use()
            print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
        if {thread}:
            thread = threading.Thread(target=measure)
            thread.start()
            thread.join()
        else:
            measure()
    """
    faults = int(_after_start(program, prepared))
    assert faults < 10 if prepared else faults > 20  # some 50 are enough with huge pages


def _after_start(program: str, prepared: bool) -> str:
    """What an indented program prints in a process of its own."""
    start = "from medmerge_jax.runtime import cpu; cpu.prepare()" if prepared else ""
    lines = [line.removeprefix(" " * 8) for line in program.splitlines()]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([start, *lines])],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout
