"""Which processes a service is on which machine, and that the processes' own parsers take the flags."""

from itertools import count
from typing import Any

import pytest
from pydantic_settings import CliApp

from lanewise.config import RouterConfig, WorkerConfig
from lanewise.errors import ConfigError
from lanewise.local.machine import Machine, free_ports, port_problem, split_address
from lanewise.local.plan import Options, ServicePlan, count_workers, divide, plan
from lanewise.spec import API_VERSION, LLMService, builtin_service

TWO = Machine((0, 1), 2, ())
FOUR = Machine((0, 1, 2, 3), 4, ())


def service(**spec: Any) -> LLMService:
    body = {"model": {"uri": "builtin://fable"}, **spec}
    return LLMService.model_validate(
        {"apiVersion": API_VERSION, "kind": "LLMService", "metadata": {"name": "s"}, "spec": body}
    )


def planned(wanted: LLMService, machine: Machine) -> ServicePlan:
    return plan(wanted, machine, iter(count(20000)), Options("127.0.0.1:8000", "127.0.0.1:50051"))


def configs(decided: ServicePlan) -> tuple[list[WorkerConfig], RouterConfig]:
    workers = [CliApp.run(WorkerConfig, cli_args=list(p.argv[3:])) for p in decided.processes[:-1]]
    return workers, CliApp.run(RouterConfig, cli_args=list(decided.processes[-1].argv[3:]))


def test_without_a_file_each_role_gets_one_of_two_cores() -> None:
    decided = planned(builtin_service(), TWO)
    assert [process.name for process in decided.processes] == ["prefill-0", "decode-0", "router"]
    workers, router = configs(decided)
    assert [(w.cores, w.threads, w.sharing) for w in workers] == [((0,), 1, 2), ((1,), 1, 2)]
    assert router.workers == tuple(w.listen for w in workers)
    assert router.disaggregation == "Always"
    assert workers[1].kv_listen == "tcp://127.0.0.1:20002"
    assert workers[0].served_name == "fable"
    assert decided.processes[0].environment["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("machine", "spec", "expected"),
    [
        (TWO, {}, (0, 1)),  # Auto on a small machine
        (TWO, {"prefill": {"replicas": 1}}, (0, 1)),
        (TWO, {"disaggregation": "Always"}, (1, 1)),
        (FOUR, {}, (1, 1)),
        (Machine((0, 1, 2, 3), 2, ()), {}, (0, 1)),  # four cores, but a quota of two
        (Machine((0, 1), 2, ("0",)), {}, (1, 1)),
        (FOUR, {"prefill": {"replicas": 0}, "decode": {"replicas": 2}}, (0, 2)),
        (FOUR, {"disaggregation": "Never", "prefill": {"replicas": 2}}, (0, 1)),
        (FOUR, {"prefill": {"replicas": 2}, "decode": {"replicas": 3}}, (2, 3)),
    ],
)
def test_how_many_of_each(machine: Machine, spec: dict[str, Any], expected: tuple[int, int]) -> None:
    assert count_workers(service(**spec), machine) == expected


def test_combined_has_all_cores_and_says_so() -> None:
    decided = planned(service(prefill={"replicas": 1}), TWO)
    (worker,), router = configs(decided)
    assert (worker.cores, worker.threads, worker.sharing) == ((0, 1), 2, 1)
    assert router.disaggregation == "Never"
    assert "combined" in decided.notes[0]


def test_cores_are_shared_out_without_overlap() -> None:
    eleven = Machine(tuple(range(11)), 11, ())
    shares = divide(eleven, [1] * 3)
    assert [share.cores for share in shares] == [(0, 1, 2, 3), (4, 5, 6), (7, 8, 9)]  # one is left to the router
    assert [share.threads for share in shares] == [4, 3, 3]
    crowded = divide(TWO, [1] * 5)
    assert [share.cores for share in crowded] == [(0,), (1,), (0,), (1,), (0,)]
    assert {share.threads for share in crowded} == {1}
    under_quota = divide(Machine(tuple(range(64)), 4, ()), [1, 1])
    assert [(share.cores, share.threads) for share in under_quota] == [((), 2), ((), 2)]


def test_gpus_are_dealt_out() -> None:
    shares = divide(Machine((0, 1, 2, 3), 4, ("0", "1")), [1] * 3)
    assert [(share.gpus, share.sharing) for share in shares] == [("0", 2), ("1", 1), ("0", 2)]
    shares = divide(Machine((0, 1, 2, 3), 4, ("0", "1", "2")), [2, 2])
    assert [(share.gpus, share.sharing) for share in shares] == [("0,1", 2), ("2,0", 2)]
    decided = planned(builtin_service(), Machine((0, 1), 2, ("GPU-a", "GPU-b")))
    assert [p.environment.get("CUDA_VISIBLE_DEVICES") for p in decided.processes] == ["GPU-a", "GPU-b", None]


def test_the_resource_reaches_the_flags() -> None:
    wanted = service(
        model={
            "uri": "hf://org/model",
            "revision": "v1",
            "servedName": "m",
            "dtype": "float32",
            "maxContextTokens": 512,
        },
        slo={"ttft": "250ms", "tpot": "40ms"},
        decode={"kvCacheMemory": "64Mi"},
        drain={"timeout": "5s", "max": "1m"},
        startupTimeout="90s",
    )
    decided = planned(wanted, FOUR)
    (prefill, decode), router = configs(decided)
    assert (prefill.model, prefill.revision, prefill.served_name) == ("hf://org/model", "v1", "m")
    assert (prefill.dtype, prefill.max_context_tokens, prefill.kv_cache_bytes) == ("float32", 512, 0)
    assert decode.kv_cache_bytes == 64 << 20
    assert (prefill.ttft_target_s, router.ttft_target_s, router.tpot_target_s) == (0.25, 0.25, 0.04)
    assert (decode.drain_timeout_s, decode.drain_max_s, router.drain_max_s) == (5, 60, 60)
    assert decided.startup_timeout_s == 90


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model": {"uri": "pvc://claim/dir"}}, "Kubernetes claim"),
        ({"decode": {"tensorParallel": 4}}, "tensorParallel: expected at most the 2 GPUs here"),
    ],
)
def test_what_a_laptop_has_not_is_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(service(**spec), Machine((0, 1, 2, 3), 4, ("0", "1")))


def test_ranks_reach_the_flags() -> None:
    decided = planned(service(decode={"tensorParallel": 2}), FOUR)
    (prefill, decode), _ = configs(decided)
    assert (prefill.tensor_parallel, decode.tensor_parallel) == (1, 2)


def test_free_ports_are_free_and_below_the_kernels_range() -> None:
    ports = free_ports(seed=1)
    first, second = next(ports), next(ports)
    assert first != second
    assert 1024 <= first < 32768
    assert port_problem(f"127.0.0.1:{first}") is None
    assert "not an address of this machine" in (port_problem("no.such.host.invalid:1") or "")
    assert split_address("[::1]:80") == ("::1", 80)


def test_keys_reach_workers_and_router_only_where_the_service_asks_for_encryption() -> None:
    options = Options("127.0.0.1:8000", "127.0.0.1:50051", secret_dir="/keys")
    for encryption in ("None", "Authenticated", "Full"):
        wanted = service(transfer={"encryption": encryption}, prefill={"replicas": 1}, disaggregation="Always")
        decided = plan(wanted, TWO, iter(count(20000)), options)
        for process in decided.processes:
            on = encryption != "None"
            if process.role == "router":
                assert ("--worker-tls-dir" in process.argv) is on
            else:
                assert ("--encryption" in process.argv) is on
                assert ("--secret-dir" in process.argv) is on
            data = process.role == "decode" and encryption == "Authenticated"
            assert ("--kv-data-listen" in process.argv) is data


def test_the_channel_reaches_both_workers_where_it_is_not_left_open() -> None:
    for channel in ("Auto", "ZeroMQ", "NCCL", "IPC"):
        wanted = service(transfer={"channel": channel}, prefill={"replicas": 1}, disaggregation="Always")
        decided = plan(wanted, TWO, iter(count(20000)), Options("127.0.0.1:8000", "127.0.0.1:50051"))
        for process in decided.processes:
            told = process.argv[process.argv.index("--kv-channel") + 1] if "--kv-channel" in process.argv else "Auto"
            assert told == (channel if process.role != "router" else "Auto")


def test_the_encoding_reaches_both_workers() -> None:
    wanted = service(transfer={"encoding": "KIVI4"}, prefill={"replicas": 1}, disaggregation="Always")
    decided = plan(wanted, TWO, iter(count(20000)), Options("127.0.0.1:8000", "127.0.0.1:50051"))
    told = {process.role: "--kv-encoding KIVI4" in " ".join(process.argv) for process in decided.processes}
    assert told == {"router": False, "prefill": True, "decode": True}
