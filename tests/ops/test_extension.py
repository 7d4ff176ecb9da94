"""Building the compiled operators: once for all processes, atomically, and with a reason where it fails."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import wait_for

from solq_lab.ops import extension, ms_deform_attn, toolkit
from solq_lab.ops.extension import ExtensionBuildError, load_extension

COMPILER = toolkit.find_compiler()
NINJA = toolkit.find_ninja()
needs_compiler = pytest.mark.skipif(COMPILER is None or NINJA is None, reason="no C++ compiler or no ninja here")

# What a process of these tests runs: it logs when it begins to compile, and that it loaded the library.
WORKER = """
import logging, sys
from pathlib import Path
from solq_lab.ops import extension
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
extension.SOURCES = Path(sys.argv[1])
extension.load_extension("cpu")
print("loaded", flush=True)
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A source folder with one tiny library, that takes a second at most to compile."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "tiny_cpu.cpp").write_text('extern "C" int solq_lab_tiny() { return 7; }\n')
    monkeypatch.setattr(extension, "SOURCES", folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, for a process that has loaded nothing and failed at nothing."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(extension, "_outcomes", {})
    return tmp_path / "cache" / "solq_lab"


@pytest.fixture
def forgetful():
    """The choice of an implementation is made anew inside the test and after it."""

    def forget():
        ms_deform_attn._automatic.cache_clear()
        ms_deform_attn._by_name.cache_clear()

    forget()
    yield
    forget()


def start_worker(sources: Path, cache: Path, compiler: Path) -> subprocess.Popen:
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(cache.parent), "CXX": str(compiler), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, str(sources)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def slow_compiler(folder: Path, seconds: float) -> Path:
    """A compiler that takes its time and counts its compilations in `compilations`."""
    script = folder / "slow-c++"
    script.write_text(
        "#!/bin/sh\n"
        f'case " $* " in *" -c "*) echo begun >> {folder / "compilations"}; sleep {seconds} ;; esac\n'
        f'exec {COMPILER} "$@"\n'
    )
    script.chmod(0o755)
    return script


def compilations(folder: Path) -> int:
    log = folder / "compilations"
    return len(log.read_text().splitlines()) if log.exists() else 0


@needs_compiler
def test_four_processes_at_once_compile_once(sources, cache, tmp_path):
    compiler = slow_compiler(tmp_path, 1)
    workers = [start_worker(sources, cache, compiler) for _ in range(4)]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0, 0], outputs
    assert compilations(tmp_path) == 1
    assert len(list(cache.glob("*.so"))) == 1


@needs_compiler
def test_a_builder_that_is_killed_leaves_the_others_working(sources, cache, tmp_path):
    compiler = slow_compiler(tmp_path, 3)
    workers = {worker.pid: worker for worker in [start_worker(sources, cache, compiler) for _ in range(4)]}
    wait_for(lambda: compilations(tmp_path))
    # The one that compiles is the parent of a process that works in the build folder.
    builder = next(pid for pid in workers if any(has_child_in(pid, folder) for folder in cache.glob("*.building-*")))
    os.kill(builder, signal.SIGKILL)
    outputs = {pid: worker.communicate(timeout=120)[0] for pid, worker in workers.items()}
    assert {pid: worker.returncode for pid, worker in workers.items()} == dict.fromkeys(workers, 0) | {builder: -9}, (
        outputs
    )
    assert compilations(tmp_path) == 2
    assert not list(cache.glob("*.building-*"))


def has_child_in(pid: int, folder: Path) -> bool:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if not children.exists():
        pytest.skip("this system does not list a process's children")
    for child in children.read_text().split():
        try:
            if Path(os.readlink(f"/proc/{child}/cwd")) == folder:
                return True
        except OSError:  # it ended meanwhile
            continue
    return False


@needs_compiler
def test_a_lock_and_a_build_folder_without_an_owner_are_no_obstacle(sources, cache):
    library = extension._recipe("cpu").library
    abandoned = library.parent / f"{library.stem}.building-dead"
    abandoned.mkdir(parents=True)
    (abandoned / "tiny_cpu.o").write_bytes(b"half")
    library.with_suffix(".lock").touch()
    load_extension("cpu")
    assert library.exists()
    assert not abandoned.exists()


@needs_compiler
def test_an_interrupted_build_leaves_nothing_behind(sources, cache, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extension, "_compile", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_extension("cpu")
    assert [path.suffix for path in cache.iterdir()] in ([], [".lock"])
    load_extension("cpu")
    assert len(list(cache.glob("*.so"))) == 1


@needs_compiler
def test_an_activated_environment_is_not_needed(sources, cache, monkeypatch):
    monkeypatch.setenv("PATH", os.pathsep.join(["/usr/bin", "/bin"]))
    load_extension("cpu")
    assert list(cache.glob("*.so"))


def test_ninja_is_found_beside_python_with_an_empty_path(monkeypatch):
    beside = Path(sys.executable).parent / "ninja"
    if not beside.exists():
        pytest.skip("ninja is not installed beside this Python")
    monkeypatch.setenv("PATH", "")
    assert toolkit.find_ninja() == str(beside)


@needs_compiler
def test_an_error_in_the_sources_shows_the_compilers_last_lines_and_is_not_tried_twice(
    sources, cache, tmp_path, monkeypatch
):
    (sources / "tiny_cpu.cpp").write_text("int main() { return nothing_of_that_name; }\n")
    monkeypatch.setenv("CXX", str(slow_compiler(tmp_path, 0)))
    for _ in range(2):
        with pytest.raises(ExtensionBuildError) as caught:
            load_extension("cpu")
        assert "nothing_of_that_name" in str(caught.value)
        assert caught.value.reason.startswith("compiling tiny_cpu.cpp failed; ")
        assert "\n" not in caught.value.reason
        assert len(str(caught.value).splitlines()) <= 1 + extension.SHOWN_LINES
    assert compilations(tmp_path) == 1
    assert not list(cache.glob("*.building-*"))


@needs_compiler
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda patch, _: patch.setenv("CXX", "c++-to-be"), r"no C\+\+ compiler \(c\+\+-to-be\) is on .*; install one"),
        (
            lambda patch, _: patch.setattr(extension, "find_ninja", lambda: None),
            "ninja is neither .* pip install ninja",
        ),
        (
            lambda patch, folder: patch.setenv("TORCH_EXTENSIONS_DIR", f"{folder}/sources/tiny_cpu.cpp"),
            r"cannot be kept in .*tiny_cpu.* set TORCH_EXTENSIONS_DIR to a writable folder",
        ),
        (
            lambda _, folder: (folder / "sources" / "tiny_cpu.cpp").unlink(),
            r"sources are not at .*sources; install solq_lab from a checkout",
        ),
    ],
    ids=["compiler", "ninja", "cache", "sources"],
)
def test_what_a_build_lacks_is_named_with_its_cure(sources, cache, monkeypatch, spoil, message):
    spoil(monkeypatch, sources.parent)
    with pytest.raises(ExtensionBuildError, match=message):
        load_extension("cpu")


def test_a_kept_library_that_is_none_is_named(sources, cache):
    library = extension._recipe("cpu").library
    library.parent.mkdir(parents=True)
    library.write_bytes(b"not a library")
    with pytest.raises(ExtensionBuildError, match=rf"{library}.* does not load .*remove it"):
        load_extension("cpu")


def test_a_library_is_known_by_all_that_it_depends_on(sources, cache, monkeypatch):
    def name(kind="cpu"):
        return extension._recipe(kind).library.name

    (sources / "tiny_cuda.cu").touch()
    first, first_cuda = name(), name("cuda")
    assert name() == first
    with monkeypatch.context() as patch:
        patch.setattr(extension, "CPU_FLAGS", ("-O0",))
        assert name() != first
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        assert name() != first
    with monkeypatch.context() as patch:
        patch.setattr(extension, "processor_features", lambda: "another")
        assert name() != first
    with monkeypatch.context() as patch:
        patch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
        assert name() == first
        assert name("cuda") != first_cuda
    (sources / "tiny.h").write_text("// a header counts too\n")
    assert name() != first


@pytest.mark.parametrize(
    ("wanted", "flags"),
    [
        ("9.0", ["-gencode=arch=compute_90,code=sm_90"]),
        ("8.0;9.0", ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"]),
        ("12.0+PTX", ["-gencode=arch=compute_120,code=compute_120", "-gencode=arch=compute_120,code=sm_120"]),
        ("9.0a", ["-gencode=arch=compute_90a,code=sm_90a"]),
    ],
)
def test_gpu_architectures_are_those_of_torchs_variable(monkeypatch, wanted, flags):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    assert list(extension._architecture_flags()) == flags


def test_an_unknown_gpu_architecture_is_rejected(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(ExtensionBuildError, match=r"TORCH_CUDA_ARCH_LIST names 'Hopper'; give numbers such as 9\.0"):
        extension._architecture_flags()


def fake_toolkit(home: Path, release: str, *, library="lib64/libcudart.so") -> Path:
    for name in ("bin/nvcc", "include/cuda_runtime.h", library):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    (home / "bin" / "nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    (home / "bin" / "nvcc").chmod(0o755)
    return home


def test_a_toolkit_needs_its_headers_and_its_library(tmp_path, monkeypatch):
    whole = fake_toolkit(tmp_path / "whole", "13.0", library="lib/libcudart.so.13")  # as the Python packages lay it out
    torso = fake_toolkit(tmp_path / "torso", "13.0")
    (torso / "include" / "cuda_runtime.h").unlink()
    assert toolkit._inspect(torso) is None
    monkeypatch.setenv("CUDA_HOME", str(whole))
    found = next(each for each in toolkit.find_cuda_toolkits() if each.home == whole)
    assert found.version == (13, 0)
    assert found.runtime == whole / "lib" / "libcudart.so.13"


def test_the_toolkit_that_fits_torch_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "newer", "99.1")))
    monkeypatch.setenv("CUDA_PATH", str(fake_toolkit(tmp_path / "fitting", "11.8")))
    assert toolkit.find_cuda_toolkits()[0].home == tmp_path / "fitting"


@needs_compiler
@pytest.mark.parametrize(
    ("built_for", "toolkits", "message"),
    [
        (None, ["13.0"], "is built without CUDA; install a CUDA build of torch"),
        ("13.0", [], r"no CUDA toolkit .*\(pip install 'solq-lab\[cuda\]'\)"),
        (
            "13.0",
            ["12.4"],
            r"torch is built for CUDA 13\.0, but here is only CUDA 12\.4 in .*; install one .* or set CUDA_HOME",
        ),
    ],
)
def test_a_cuda_toolkit_that_is_absent_or_wrong_is_named(
    sources, cache, tmp_path, monkeypatch, built_for, toolkits, message
):
    (sources / "tiny_cuda.cu").touch()
    found = [toolkit._inspect(fake_toolkit(tmp_path / release, release)) for release in toolkits]
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(extension, "find_cuda_toolkits", lambda: found)
    with pytest.raises(ExtensionBuildError, match=message):
        load_extension("cuda")


def test_without_a_compiled_operator_plain_torch_runs_and_one_line_gives_the_reason(forgetful, monkeypatch, caplog):
    def fail(kind):
        raise ExtensionBuildError("no C++ compiler (c++) is on the PATH; install one", "line of a compiler")

    monkeypatch.setattr(ms_deform_attn, "load_extension", fail)
    monkeypatch.delenv("SOLQ_OPS", raising=False)
    with caplog.at_level(logging.WARNING):
        arguments = (torch.ones(1, 6, 1, 4), [(2, 3)], torch.full((1, 2, 1, 1, 1, 2), 0.5), torch.ones(1, 2, 1, 1, 1))
        first, second = (ms_deform_attn.ms_deform_attn(*arguments) for _ in range(2))
    assert torch.equal(first, torch.ones(1, 2, 4))
    assert torch.equal(first, second)
    assert [record.getMessage() for record in caplog.records] == [
        "deformable attention on cpu runs in plain torch, slower: no C++ compiler (c++) is on the PATH; install one"
    ]
    assert ms_deform_attn.implementations() == ("reference",)
    with pytest.raises(ExtensionBuildError, match="line of a compiler"), ms_deform_attn.use_implementation("cpu"):
        pass


def test_the_environment_can_choose_plain_torch_and_nothing_unknown(forgetful, monkeypatch):
    monkeypatch.setenv("SOLQ_OPS", "reference")
    assert ms_deform_attn.implementation_for("cpu") == "reference"
    ms_deform_attn._automatic.cache_clear()
    monkeypatch.setenv("SOLQ_OPS", "fast")
    with pytest.raises(ValueError, match="SOLQ_OPS='fast' is unknown; set it to 'reference'"):
        ms_deform_attn.implementation_for("cpu")


CUDA_SOURCE = extension.SOURCES / "ms_deform_attn_cuda.cu"


@pytest.fixture
def cuda_toolkit():
    wanted = toolkit.cuda_version_of_torch()
    fitting = [each for each in toolkit.find_cuda_toolkits() if each.version[:1] == wanted[:1]]
    if not fitting or COMPILER is None or NINJA is None:
        pytest.skip("no CUDA toolkit of torch's version, no C++ compiler or no ninja here")
    return fitting[0]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_cuda_kernels_keep_their_numbers_in_registers(cuda_toolkit, tmp_path, architecture):
    arch = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [cuda_toolkit.home / "bin" / "nvcc", "-std=c++17", *extension.NVCC_FLAGS, arch, "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, "-c", CUDA_SOURCE, "-o", tmp_path / "kernels.o"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill" in line]
    assert spills
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in spills)
    assert "warning" not in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("cuda_toolkit")
def test_the_cuda_operators_build_and_load_without_a_gpu(tmp_path):
    script = (
        "import torch; from solq_lab.ops.extension import load_extension; load_extension('cuda');"
        "print(torch.ops.solq_lab.ms_deform_attn_backward_cuda.default)"
    )
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "TORCH_CUDA_ARCH_LIST": "9.0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "solq_lab.ms_deform_attn_backward_cuda" in done.stdout


@pytest.mark.slow
@needs_compiler
def test_the_cpu_operators_build_from_nothing_with_only_a_compiler_on_the_path(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("c++", "which", "as", "ld", "sh"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    script = (
        "import torch; from solq_lab.ops.ms_deform_attn import implementation_for; print(implementation_for('cpu'))"
    )
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "PATH": str(tools)}
    environment.pop("SOLQ_OPS", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.stdout.strip() == "cpu", done.stderr
