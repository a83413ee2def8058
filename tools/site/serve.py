"""Serve docs/ on this machine and print the address.  python tools/site/serve.py
[--port 8000]"""

import argparse
import functools
import http.server
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def server(port: int) -> http.server.ThreadingHTTPServer:
    """A server of docs/ for this machine only; a taken port gives way to a free one."""
    handler = functools.partial(Quiet, directory=str(DOCS))
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError:
        return http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    with server(parser.parse_args().port) as here:
        print(
            f"the book is open at http://127.0.0.1:{here.server_port}/  (Ctrl-C ends)",
            flush=True,
        )
        try:
            here.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
