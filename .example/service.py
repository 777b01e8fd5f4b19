"""Three real jobs: check a server's health, copy new rows between databases, clean a folder. Ctrl-C stops it.

With `--seconds 8` it stops by itself.
"""

import argparse
import asyncio
import contextlib
import http.client
import logging
import os
import sqlite3
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from bgjob import current_run, job, run

FOLDER = Path(tempfile.mkdtemp(prefix="bgjob-example-"))


class Health(BaseHTTPRequestHandler):
    """A real server on loopback whose every third answer is an error."""

    answers = 0

    def do_GET(self) -> None:
        Health.answers += 1
        self.send_response(503 if Health.answers % 3 == 0 else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """The jobs' log is the one to read."""


server = ThreadingHTTPServer(("127.0.0.1", 0), Health)


@job(every="1s", timeout="2s", retries=2, retry_delay="200ms")
def check_health() -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    with contextlib.closing(connection):
        connection.request("GET", "/health")
        status = connection.getresponse().status
    if status != 200:
        raise OSError(f"the server answers {status}")
    return status


@job(cron="*/2 * * * * *")
def copy_rows() -> int:
    with sqlite3.connect(FOLDER / "source.db") as source, sqlite3.connect(FOLDER / "copy.db") as target:
        (last,) = target.execute("SELECT coalesce(max(id), 0) FROM item").fetchone()
        rows = source.execute("SELECT id, name FROM item WHERE id > ?", (last,)).fetchall()
        target.executemany("INSERT INTO item VALUES (?, ?)", rows)
        source.execute("INSERT INTO item(name) VALUES (?)", (current_run().id,))
    logging.info("copy_rows: %d rows copied", len(rows))
    return len(rows)


@job(after="1s")
async def remove_old_files() -> None:
    old = [path for path in FOLDER.glob("*.tmp") if time.time() - path.stat().st_mtime > 3600]
    for path in old:
        path.unlink()
    logging.info("remove_old_files: %d of %d removed", len(old), len(old) + len(list(FOLDER.glob("*.tmp"))))


def prepare() -> None:
    for name in ("source.db", "copy.db"):
        with sqlite3.connect(FOLDER / name) as db:
            db.execute("CREATE TABLE item(id INTEGER PRIMARY KEY, name TEXT)")
    for n in range(5):
        path = FOLDER / f"{n}.tmp"
        path.touch()
        if n < 3:
            os.utime(path, (0, 0))
    threading.Thread(target=server.serve_forever, daemon=True).start()


async def main(seconds: float | None) -> None:
    try:
        async with asyncio.timeout(seconds):
            await run()
    except TimeoutError:
        logging.info("stopped by itself after %g s", seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    prepare()
    asyncio.run(main(parser.parse_args().seconds))
