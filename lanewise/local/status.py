"""What `lanewise status` shows: the supervisor's record joined with the router's view of its workers.

Owns: the join and the table. Must not: change anything.
"""

from __future__ import annotations

from typing import Any

from lanewise.local.logs import size
from lanewise.local.machine import reachable
from lanewise.local.state import ProcessState, ServiceState

COLUMNS = ("role", "name", "pid", "incarnation", "device", "memory", "lane", "queue", "kv use", "restarts", "state")


def describe(record: ServiceState) -> dict[str, Any]:
    """One service as plain data. Where the router does not answer, the columns only it knows are None."""
    fleet, problem = _fleet(record.grpc)
    processes = [_process(process, fleet.get(process.address)) for process in record.processes]
    return {
        "service": record.service,
        "model": record.model,
        "served_name": record.served_name,
        "ready": record.ready,
        "http": record.http,
        "grpc": record.grpc,
        "pid": record.pid,
        "started_at": record.started_at,
        "log": record.log,
        "router_problem": problem,
        "processes": processes,
    }


def _process(process: ProcessState, worker: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "role": process.role,
        "name": process.name,
        "pid": process.pid or None,
        "incarnation": process.incarnation,
        "address": process.address,
        "device": process.device,
        "memory_bytes": process.memory_bytes,
        "lane": None,
        "queued_requests": None,
        "running_requests": None,
        "kv_used_tokens": None,
        "kv_capacity_tokens": None,
        "restarts": process.restarts,
        "state": process.state,
    }
    if worker is not None:
        stats = worker.stats
        row["lane"] = stats.lane or None
        for name in ("queued_requests", "running_requests", "kv_used_tokens", "kv_capacity_tokens"):
            row[name] = getattr(stats, name)
        if process.state == "ready":
            row["state"] = "draining" if stats.draining else "ready" if worker.ready else "not routable"
    return row


def _fleet(address: str) -> tuple[dict[str, Any], str | None]:
    """The router's workers by address, or why it could not be asked."""
    import grpc

    from lanewise.rpc import lanewise_pb2 as pb
    from lanewise.rpc import lanewise_pb2_grpc as stubs

    with grpc.insecure_channel(reachable(address)) as channel:
        try:
            reply = stubs.FleetStub(channel).Snapshot(pb.FleetRequest(), timeout=2.0)  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            return {}, f"{error.code().name}: {error.details()}"
    return {worker.description.address: worker for worker in reply.workers}, None


def render(services: list[dict[str, Any]]) -> str:
    """For people and for `grep`: full lines at any width."""
    lines = []
    for service in services:
        state = "ready" if service["ready"] else "starting"
        where = f"http://{service['http']}/v1  grpc {service['grpc']}"
        lines.append(f"{service['service']} ({service['served_name']}): {state}  {where}")
        if service["router_problem"]:
            lines.append(f"the router does not answer: {service['router_problem']}")
        rows = [list(COLUMNS), *(_cells(row) for row in service["processes"])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines.append("")
    return "\n".join(lines[:-1])


def _cells(row: dict[str, Any]) -> list[str]:
    queue = None if row["queued_requests"] is None else f"{row['queued_requests']}+{row['running_requests']}"
    capacity = row["kv_capacity_tokens"]
    use = None if not capacity else f"{100 * row['kv_used_tokens'] / capacity:.0f}% of {capacity}"
    memory = size(row["memory_bytes"]) if row["memory_bytes"] else None
    cells = (
        row["role"],
        row["name"],
        row["pid"],
        row["incarnation"][:8],
        row["device"],
        memory,
        row["lane"],
        queue,
        use,
    )
    return ["-" if cell in (None, "") else str(cell) for cell in (*cells, row["restarts"], row["state"])]
