"""A Hub on 127.0.0.1: the part of the protocol that huggingface_hub's client speaks for models, over real HTTP.

    with HubServer(folder) as hub:
        hub.client("from huggingface_hub import whoami; print(whoami()['name'])", home=cache_folder, token=WRITE_TOKEN)

    python -m tests.support.hub_server FOLDER        # as a process; prints the variables that a client needs

Repositories live in folders (`hub_storage.py`) and survive a restart. The server speaks (`hub_protocol.py`): whoami,
create repo, model info, tree, paths-info, refs, commits, branches, tags, preupload, commit, LFS batch, upload in one
part or several with the sha256 checked, resolve with ETag and Range, validate-yaml. Every other request is answered
with 501 and its name, among them Xet, pull requests, datasets, spaces, gated repos and deletion of repos.

huggingface_hub reads its settings when it is imported, so every client is a process of its own. Where hf_xet is
installed, huggingface_hub uploads without Xet only if HF_HUB_DISABLE_XET=1 is set, as `environment` does.

Three tokens exist: WRITE_TOKEN and READ_TOKEN of the user "tester", OTHER_TOKEN of the user "other".
"""

import argparse
import os
import re
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.support.hub_http import Exchange, Fault
from tests.support.hub_protocol import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, HubHandler
from tests.support.hub_storage import Upload

__all__ = ["OTHER_TOKEN", "READ_TOKEN", "WRITE_TOKEN", "Exchange", "Fault", "HubServer"]


class HubServer(ThreadingHTTPServer):
    """Serves the repositories of a folder. Use it as a context manager, or call `start` and `stop`.

    Args:
        root: folder of the repositories.
        lfs_size: files of this many bytes or more go through LFS, besides weights and binary files, which always do.
        part_size: larger LFS files are uploaded in parts of this many bytes.
        port: 0 takes a free one.

    Attributes:
        faults: append a `Fault` and the requests it describes go wrong.
        exchanges: every request so far, in the order of the answers.
    """

    daemon_threads = True

    def __init__(self, root: Path, *, lfs_size: int = 10 * 2**20, part_size: int = 2**30, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), HubHandler)
        self.root = root
        self.lfs_size = lfs_size
        self.part_size = part_size
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: list[Fault] = []
        self.exchanges: list[Exchange] = []
        self.uploads: dict[str, Upload] = {}
        self.lock = threading.Lock()  # held by whoever changes a repository
        self.stopping = threading.Event()
        (root / ".uploads").mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()

    def __enter__(self) -> "HubServer":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the environment of a client process: this Hub, the cache `home`, and no way to any other host.

        Proxies point at a closed port, so that a request to anywhere but 127.0.0.1 fails at once.
        """
        foreign = re.compile(r"HF_(?!LOWRANK_)|HUGGING|TRANSFORMERS_OFFLINE|.*_PROXY$", re.IGNORECASE)
        environment = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
        environment |= {"NO_PROXY": "127.0.0.1", "HF_ENDPOINT": self.url, "HF_HOME": str(home)}
        disabled = ("XET", "TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK")
        environment |= {f"HF_HUB_DISABLE_{name}": "1" for name in disabled}
        if token:
            environment["HF_TOKEN"] = token
        return environment

    def client(self, code: str, *arguments: object, home: Path, token: str | None = None) -> str:
        """Run Python code in a process of its own, `arguments` being its `sys.argv[1:]`, and return what it prints.

        Raises:
            AssertionError: the process failed; the message is its traceback.
        """
        command = [sys.executable, "-c", code, *map(str, arguments)]
        finished = subprocess.run(
            command, env=self.environment(home, token), capture_output=True, text=True, timeout=300
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout.strip()

    def fault_for(self, method: str, path: str) -> Fault | None:
        """Return the fault that strikes the request that has just arrived, if there is one, and count it as struck."""
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path):
                    if fault.skip > 0:
                        fault.skip -= 1
                    elif fault.times > 0:
                        fault.times -= 1
                        return fault
        return None

    def served(self, method: str, path: str) -> list[Exchange]:
        """Return the exchanges so far with this method in whose path the regular expression `path` is found."""
        of_method = [exchange for exchange in self.exchanges if exchange.method == method]
        return [exchange for exchange in of_method if re.search(path, exchange.path)]

    def part_path(self, ticket: str, part: int) -> Path:
        """Return where part 1, 2, ... of an upload is kept until all are there. Part 0 is the whole file."""
        return self.root / ".uploads" / f"{ticket}.{part}"


def main() -> None:
    """Serve a folder until the process is interrupted."""
    parser = argparse.ArgumentParser(description="A Hugging Face Hub on 127.0.0.1, for tests.")
    parser.add_argument("folder", type=Path, help="where the repositories are kept")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    arguments = parser.parse_args()
    server = HubServer(arguments.folder, port=arguments.port)
    print(
        f"export HF_ENDPOINT={server.url} HF_TOKEN={WRITE_TOKEN} HF_HUB_DISABLE_XET=1 NO_PROXY=127.0.0.1", flush=True
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
