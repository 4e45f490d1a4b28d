"""`python -m serve.stop`: ends the graph that `serve.main` started, by the card that it left in its home."""

import json
import signal
import sys
import time

import psutil

from cluster import settings as settings_of
from serve import processes

TIMEOUT_S = 60.0


def main() -> int:
    card_path = settings_of.read().home / "serve.json"
    try:
        card = json.loads(card_path.read_text())
        process = psutil.Process(card["pid"])
        if process.create_time() != card["created_unix_s"]:  # the pid is another process's now
            raise psutil.NoSuchProcess(card["pid"])
    except (FileNotFoundError, psutil.NoSuchProcess):
        print("no graph is running")
        card_path.unlink(missing_ok=True)
        return 0
    print(f"ending the graph on {card['url']} (process {process.pid}) ...", flush=True)
    process.send_signal(signal.SIGINT)
    give_up = time.monotonic() + TIMEOUT_S
    while time.monotonic() < give_up:
        if not processes.lives(process):
            print("ended")
            return 0
        time.sleep(0.2)
    process.kill()
    processes.end(card["run"], polite_s=0.0)
    print("it did not end by itself and was killed")
    return 1


if __name__ == "__main__":
    sys.exit(main())
