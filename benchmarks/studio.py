"""Many people drawing at once on one studio: errors, waits, places in the queue, and the server's memory.

    python benchmarks/studio.py RUN [--people 20] [--rounds 3] [--images 16] [--json FILE]

Everybody asks at the same moment, waits for the images, and asks again with another seed. The server is a process of its
own, `flowback studio RUN`. Seconds are from asking to having all images; a place in the queue counts the people before.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from gradio_client import Client
from gradio_client.client import Status

from flowback.core.devices import machine


def resident(process: int) -> float:
    """Memory of a process, GB."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1e6


def person(
    client: Client, number: int, o: argparse.Namespace, gate: threading.Barrier, found: list[dict[str, Any]]
) -> None:
    """Ask, see the place in the queue, wait for the images; again and again."""
    flow = client.predict(api_name="/offered")["value"]
    for round_ in range(o.rounds):
        gate.wait()
        started, places = time.perf_counter(), []
        job = client.submit(flow, "auto", [], o.images, 0, 1, True, 1000 * round_ + number, api_name="/draw")
        while not job.done():
            status = job.status()
            if status.code == Status.IN_QUEUE and status.rank is not None:
                places.append(status.rank)
            time.sleep(0.1)
        error, seconds = job.exception(), time.perf_counter() - started
        row = {"person": number, "round": round_, "seconds": seconds, "error": str(error) if error else None}
        found.append(row | {"places": sorted(set(places), reverse=True)})


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run")
    options.add_argument("--people", type=int, default=20)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--images", type=int, default=16)
    options.add_argument("--json", default=None)
    o = options.parse_args()
    server = subprocess.Popen([sys.executable, "-m", "flowback", "studio", o.run], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = re.findall(r"http://\S+", server.stdout.readline())[0]
        before, found = resident(server.pid), []
        gate = threading.Barrier(o.people)
        clients = [Client(url, verbose=False, httpx_kwargs={"timeout": 60}) for _ in range(o.people)]
        people = [threading.Thread(target=person, args=(c, i, o, gate, found)) for i, c in enumerate(clients)]
        for one in people:
            one.start()
        peak = before
        while any(one.is_alive() for one in people):
            peak = max(peak, resident(server.pid))
            time.sleep(0.2)
        after = resident(server.pid)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    seconds = [row["seconds"] for row in found]
    facts = {"machine": machine(), "people": o.people, "rounds": o.rounds, "images": o.images}
    facts |= {"drawn": len(found), "errors": sum(row["error"] is not None for row in found)}
    facts |= {"saw_a_place": sum(bool(row["places"]) for row in found)}
    facts |= {"median_seconds": round(median(seconds), 2), "longest_seconds": round(max(seconds), 2)}
    facts |= {"gb_before": round(before, 3), "gb_at_most": round(peak, 3), "gb_after": round(after, 3)}
    print("\n".join(f"{name:16} {value}" for name, value in facts.items()))
    for row in found:
        if row["error"]:
            print(row["error"], file=sys.stderr)
    if o.json:
        Path(o.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
