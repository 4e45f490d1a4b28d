"""What sweeps cost and keep: packing, Tune's own time, more nodes, kills.

    python -m benchmarks.sweeps --json benchmarks/results/sweeps.json
    python -m benchmarks.sweeps --parts tune-cost,nodes --workers 2 --pack-s 120

`packing`: benchmarks.sweeps_packing. `tune-cost`: the share of workers times seconds in which no trial computes, in a
sweep of packs as long as the laptop profile's (`--pack-s`), and an empty trial beside a plain loop; Ray's start-up is
told apart, it is paid once. `nodes`: local Ray of one-CPU nodes, one process each; as many nodes as there are cores are
measured, four where there are fewer by a simulation of the same scheduling from the measured times of the trials and
the measured time around each. `kills`: SIGKILL to a driver, a trial or a raylet at a random moment, `--cycles` times;
each time the sweep is gone on with until its table is there, and its bytes are compared.
"""

import argparse
import heapq
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
import torch

from benchmarks import report, sweep_kills, sweeps_packing
from benchmarks.report import Row
from benchmarks.sweep_fits import Fits, plan_of
from jobs.sweeping import Swept, run_sweep
from metasepia.sweeps.plan import SweepPlan
from metasepia.sweeps.run import run_pack
from metasepia.sweeps.store import SweepStore

WORK = "benchmarks.sweep_fits:Fits"
ROUNDS = 100
NUM_EMPTY = 100
NODES = (1, 2, 4)


def plan_of_length(num_packs: int, pack_s: float) -> SweepPlan:
    """Packs of four fits that take about `pack_s` seconds each on one thread of this machine."""
    trial = plan_of(seeds=4, rates=(0.1,), steps=1, size=4, rounds=ROUNDS)
    work, began = Fits(trial.trials_of(0), "cpu"), time.process_time()
    work.advance(20)
    steps = max(4, round(20 * pack_s / (time.process_time() - began)))
    return plan_of(seeds=4 * num_packs, rates=(0.1,), steps=steps, size=4, rounds=ROUNDS)


def sweep(plan: SweepPlan, workers: int, address: str | None = None) -> Swept:
    """Into a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="metasepia-sweep-") as folder:
        return run_sweep(plan, folder, WORK, workers=workers, address=address, progress=False)


def tune_cost(arguments: Namespace) -> list[Row]:
    """Part `tune-cost`."""
    workers, number = arguments.workers, arguments.packs
    swept = sweep(plan_of_length(number, arguments.pack_s), workers)
    share = 100 * (1 - swept.inside_s / (swept.workers * swept.wall_s))
    note = f"{swept.workers} workers, {swept.wall_s:.1f} s, of which {swept.inside_s / swept.workers:.1f} s in trials "
    note += f"each; Ray's start-up, {swept.ray_s:.1f} s, not counted, with it "
    note += f"{100 * (1 - swept.inside_s / (swept.workers * (swept.wall_s + swept.ray_s))):.1f} %"
    what = f"share of a sweep that is Tune's, {number} packs of about {arguments.pack_s:g} s"
    rows = [report.figure("tune-cost", what, share, "%", note)]

    empty = plan_of(seeds=NUM_EMPTY, rates=(0.1,), steps=0, size=1)
    loop_s = _loop_s(empty)
    swept = sweep(empty, workers)
    note = f"{workers} workers; a trial that only stores its first figures; starting {workers} processes included"
    what = f"an empty trial, mean of {NUM_EMPTY}, Tune against a loop in one process"
    ours, against = 1000 * swept.wall_s / NUM_EMPTY, 1000 * loop_s / NUM_EMPTY
    rows.append(report.duration("empty-trial", what, ours, against, "ms", note))
    return rows


def _loop_s(plan: SweepPlan) -> float:
    with tempfile.TemporaryDirectory(prefix="metasepia-sweep-") as folder:
        began, store = time.perf_counter(), SweepStore.open(folder, plan)
        for pack in range(len(plan.packs)):
            run_pack(Fits, store, pack)
        store.write_table()
        return time.perf_counter() - began


def nodes(arguments: Namespace) -> list[Row]:
    """Part `nodes`."""
    plan = plan_of_length(arguments.node_packs, arguments.node_pack_s)
    cores, found = os.cpu_count() or 1, {}
    for number in NODES:
        if number <= cores or number == 1:
            with local_nodes(number) as address:
                found[number] = sweep(plan, number, address)
    one, rows = found[1], []
    for number in NODES[1:]:
        if number in found:
            wall_s, how = found[number].wall_s, f"measured; {number} nodes, the driver and Ray share {cores} cores"
        else:
            wall_s = simulated_s(one, number)
            around = (one.wall_s - one.inside_s) / one.num_run
            how = f"simulated, as there are {cores} cores, from measured trials and {around:.2f} s around each"
        efficiency = one.wall_s / (number * wall_s)
        note = f"{one.wall_s:.1f} s on 1 node, {wall_s:.1f} s on {number}; {arguments.node_packs} packs of about "
        note += f"{arguments.node_pack_s:g} s; {how}"
        rows.append(report.figure(f"nodes-{number}", f"efficiency, 1 to {number} one-CPU nodes", efficiency, "", note))
    return rows


@contextmanager
def local_nodes(number: int) -> Iterator[str]:
    """A Ray of `number` nodes with one CPU each, all on this machine and on loopback; gives its address."""
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    ray_constants.ENABLE_RAY_CLUSTER = False  # else this driver takes 127.0.0.1 for the machine's outer address
    os.environ["RAY_AUTH_MODE"] = "disabled"  # before the nodes start; cluster.connect sets it for drivers alone
    options = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    try:
        for _ in range(number - 1):
            cluster.add_node(**options)
        yield str(cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()


def simulated_s(measured: Swept, workers: int) -> float:
    """Seconds if `workers` took the measured packs in order, each as long as it took plus what was around it."""
    around = (measured.workers * measured.wall_s - measured.inside_s) / measured.num_run
    free = [0.0] * workers
    for pack in sorted(measured.pack_s):
        heapq.heappush(free, heapq.heappop(free) + measured.pack_s[pack] + around)
    return max(free)


def kills(arguments: Namespace) -> list[Row]:
    """Part `kills`."""
    size, cycles = sweep_kills.Size(), []
    with tempfile.TemporaryDirectory(prefix="metasepia-kills-") as folder:
        expected = sweep_kills.undisturbed(size.plan, Path(folder, "undisturbed"))
        for seed in range(arguments.cycles):
            victim = sweep_kills.VICTIMS[seed % len(sweep_kills.VICTIMS)]
            where = Path(folder, str(seed))
            cycle = sweep_kills.disturbed(where, victim, size=size, expected=expected, seed=seed)
            print(f"  {cycle}", flush=True)
            cycles.append(cycle)
    victims = ", ".join(f"{sum(one.victim == v for one in cycles)} {v}" for v in sweep_kills.VICTIMS)
    note = (
        f"killed: {victims}, 0 to 5 s after the first rows were stored; {sum(not c.killed for c in cycles)} came too "
    )
    note += f"late; {sum(one.starts for one in cycles)} drivers; {sum(bool(one.left_over) for one in cycles)} left "
    note += f"processes behind, {sum(one.hung for one in cycles)} hung"
    what = f"tables byte-equal after SIGKILL, of {len(cycles)}"
    return [report.figure("kills", what, sum(one.equal for one in cycles), "tables", note)]


PARTS: Mapping[str, Callable[[Namespace], Sequence[Row]]] = {
    "packing": sweeps_packing.packing,
    "tune-cost": tune_cost,
    "nodes": nodes,
    "kills": kills,
}


def parser() -> argparse.ArgumentParser:
    p = report.parser(__doc__)
    report.add_parts(p, PARTS)
    p.add_argument("--workers", type=int, default=2, help="of tune-cost")
    p.add_argument("--packs", type=int, default=4, help="of tune-cost")
    p.add_argument("--pack-s", type=float, default=120.0, help="seconds of a pack of tune-cost")
    p.add_argument("--node-packs", type=int, default=16, help="of nodes")
    p.add_argument("--node-pack-s", type=float, default=15.0, help="seconds of a pack of nodes")
    p.add_argument("--cycles", type=int, default=10, help="of kills")
    return p


def main() -> None:
    arguments, started_on = parser().parse_args(), report.machine()
    torch.set_num_threads(1)
    rows = report.rows_of(PARTS, arguments)
    report.publish("sweeps", rows, json_file=arguments.json, started_on=started_on)


if __name__ == "__main__":
    main()
