from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class SamplingOptions(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "seed", "min_tokens", "stop_token_ids", "ignore_eos", "logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    seed: int
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., seed: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("model", "text", "token_ids", "chat", "sampling", "stop", "n", "client_request_id", "ttft_target_ms")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    CLIENT_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TTFT_TARGET_MS_FIELD_NUMBER: _ClassVar[int]
    model: str
    text: str
    token_ids: TokenIds
    chat: Chat
    sampling: SamplingOptions
    stop: _containers.RepeatedScalarFieldContainer[str]
    n: int
    client_request_id: str
    ttft_target_ms: int
    def __init__(self, model: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., sampling: _Optional[_Union[SamplingOptions, _Mapping]] = ..., stop: _Optional[_Iterable[str]] = ..., n: _Optional[int] = ..., client_request_id: _Optional[str] = ..., ttft_target_ms: _Optional[int] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "text", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    text: str
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., text: _Optional[str] = ..., logprob: _Optional[float] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "text", "logprob", "top")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    text: str
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, token_id: _Optional[int] = ..., text: _Optional[str] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("request_id", "client_request_id", "prompt_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    client_request_id: str
    prompt_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., client_request_id: _Optional[str] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class TextDelta(_message.Message):
    __slots__ = ("choice", "text", "token_ids", "logprobs")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    choice: int
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, choice: _Optional[int] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "cached_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("code", "message", "param", "retry_after_ms", "should_retry")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    SHOULD_RETRY_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    param: str
    retry_after_ms: int
    should_retry: bool
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ..., retry_after_ms: _Optional[int] = ..., should_retry: _Optional[bool] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("choice", "reason", "error", "usage", "stop_reason")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    choice: int
    reason: str
    error: ErrorDetail
    usage: Usage
    stop_reason: str
    def __init__(self, choice: _Optional[int] = ..., reason: _Optional[str] = ..., error: _Optional[_Union[ErrorDetail, _Mapping]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., stop_reason: _Optional[str] = ...) -> None: ...

class GenerateEvent(_message.Message):
    __slots__ = ("accepted", "delta", "finished")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    delta: TextDelta
    finished: Finished
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., delta: _Optional[_Union[TextDelta, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ExplainReply(_message.Message):
    __slots__ = ("request_id", "steps")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    steps: _containers.RepeatedCompositeFieldContainer[ExplainStep]
    def __init__(self, request_id: _Optional[str] = ..., steps: _Optional[_Iterable[_Union[ExplainStep, _Mapping]]] = ...) -> None: ...

class ExplainStep(_message.Message):
    __slots__ = ("at_ms", "epoch", "what", "detail")
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    at_ms: float
    epoch: int
    what: str
    detail: str
    def __init__(self, at_ms: _Optional[float] = ..., epoch: _Optional[int] = ..., what: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsReply(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("id", "max_context_tokens")
    ID_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    id: str
    max_context_tokens: int
    def __init__(self, id: _Optional[str] = ..., max_context_tokens: _Optional[int] = ...) -> None: ...

class FleetRequest(_message.Message):
    __slots__ = ("max_hold_s",)
    MAX_HOLD_S_FIELD_NUMBER: _ClassVar[int]
    max_hold_s: float
    def __init__(self, max_hold_s: _Optional[float] = ...) -> None: ...

class FleetReply(_message.Message):
    __slots__ = ("router", "arrivals", "held", "workers", "router_name", "running", "draining", "resumed", "held_total", "failed", "kv_transfers", "handovers", "models", "discovery", "disaggregation", "lanes", "demand")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    ARRIVALS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    ROUTER_NAME_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    HELD_TOTAL_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    HANDOVERS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    DISCOVERY_FIELD_NUMBER: _ClassVar[int]
    DISAGGREGATION_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    router: str
    arrivals: int
    held: int
    workers: _containers.RepeatedCompositeFieldContainer[FleetWorker]
    router_name: str
    running: int
    draining: bool
    resumed: int
    held_total: int
    failed: int
    kv_transfers: int
    handovers: int
    models: _containers.RepeatedCompositeFieldContainer[FleetModel]
    discovery: DiscoveryView
    disaggregation: Disaggregation
    lanes: _containers.RepeatedCompositeFieldContainer[FleetLane]
    demand: Demand
    def __init__(self, router: _Optional[str] = ..., arrivals: _Optional[int] = ..., held: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[FleetWorker, _Mapping]]] = ..., router_name: _Optional[str] = ..., running: _Optional[int] = ..., draining: _Optional[bool] = ..., resumed: _Optional[int] = ..., held_total: _Optional[int] = ..., failed: _Optional[int] = ..., kv_transfers: _Optional[int] = ..., handovers: _Optional[int] = ..., models: _Optional[_Iterable[_Union[FleetModel, _Mapping]]] = ..., discovery: _Optional[_Union[DiscoveryView, _Mapping]] = ..., disaggregation: _Optional[_Union[Disaggregation, _Mapping]] = ..., lanes: _Optional[_Iterable[_Union[FleetLane, _Mapping]]] = ..., demand: _Optional[_Union[Demand, _Mapping]] = ...) -> None: ...

class Demand(_message.Message):
    __slots__ = ("requests", "prompt_tokens", "prompt_squares", "uncached_tokens", "uncached_squares", "attended", "output_tokens", "finished", "attainable", "ttft_late", "tpot_late", "able", "able_tokens", "able_squares", "able_attended", "refused", "returned")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SQUARES_FIELD_NUMBER: _ClassVar[int]
    UNCACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    UNCACHED_SQUARES_FIELD_NUMBER: _ClassVar[int]
    ATTENDED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ATTAINABLE_FIELD_NUMBER: _ClassVar[int]
    TTFT_LATE_FIELD_NUMBER: _ClassVar[int]
    TPOT_LATE_FIELD_NUMBER: _ClassVar[int]
    ABLE_FIELD_NUMBER: _ClassVar[int]
    ABLE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ABLE_SQUARES_FIELD_NUMBER: _ClassVar[int]
    ABLE_ATTENDED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    requests: float
    prompt_tokens: float
    prompt_squares: float
    uncached_tokens: float
    uncached_squares: float
    attended: float
    output_tokens: float
    finished: float
    attainable: float
    ttft_late: float
    tpot_late: float
    able: float
    able_tokens: float
    able_squares: float
    able_attended: float
    refused: float
    returned: float
    def __init__(self, requests: _Optional[float] = ..., prompt_tokens: _Optional[float] = ..., prompt_squares: _Optional[float] = ..., uncached_tokens: _Optional[float] = ..., uncached_squares: _Optional[float] = ..., attended: _Optional[float] = ..., output_tokens: _Optional[float] = ..., finished: _Optional[float] = ..., attainable: _Optional[float] = ..., ttft_late: _Optional[float] = ..., tpot_late: _Optional[float] = ..., able: _Optional[float] = ..., able_tokens: _Optional[float] = ..., able_squares: _Optional[float] = ..., able_attended: _Optional[float] = ..., refused: _Optional[float] = ..., returned: _Optional[float] = ...) -> None: ...

class FleetWorker(_message.Message):
    __slots__ = ("description", "stats", "ready", "stats_age_s", "inflight", "address", "terminating", "reason")
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    STATS_AGE_S_FIELD_NUMBER: _ClassVar[int]
    INFLIGHT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TERMINATING_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    description: Description
    stats: Stats
    ready: bool
    stats_age_s: float
    inflight: int
    address: str
    terminating: bool
    reason: str
    def __init__(self, description: _Optional[_Union[Description, _Mapping]] = ..., stats: _Optional[_Union[Stats, _Mapping]] = ..., ready: _Optional[bool] = ..., stats_age_s: _Optional[float] = ..., inflight: _Optional[int] = ..., address: _Optional[str] = ..., terminating: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class FleetModel(_message.Message):
    __slots__ = ("name", "max_context_tokens", "prefill_workers", "decode_workers")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKERS_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    max_context_tokens: int
    prefill_workers: int
    decode_workers: int
    def __init__(self, name: _Optional[str] = ..., max_context_tokens: _Optional[int] = ..., prefill_workers: _Optional[int] = ..., decode_workers: _Optional[int] = ...) -> None: ...

class DiscoveryView(_message.Message):
    __slots__ = ("kind", "synced", "stale_s", "endpoints", "error")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SYNCED_FIELD_NUMBER: _ClassVar[int]
    STALE_S_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    kind: str
    synced: bool
    stale_s: float
    endpoints: int
    error: str
    def __init__(self, kind: _Optional[str] = ..., synced: _Optional[bool] = ..., stale_s: _Optional[float] = ..., endpoints: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class PrefillWay(_message.Message):
    __slots__ = ("weight", "requests", "ttft_s", "predicted_ttft_s", "other_ttft_s")
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    OTHER_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    weight: float
    requests: int
    ttft_s: float
    predicted_ttft_s: float
    other_ttft_s: float
    def __init__(self, weight: _Optional[float] = ..., requests: _Optional[int] = ..., ttft_s: _Optional[float] = ..., predicted_ttft_s: _Optional[float] = ..., other_ttft_s: _Optional[float] = ...) -> None: ...

class Disaggregation(_message.Message):
    __slots__ = ("remote", "local")
    REMOTE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    remote: PrefillWay
    local: PrefillWay
    def __init__(self, remote: _Optional[_Union[PrefillWay, _Mapping]] = ..., local: _Optional[_Union[PrefillWay, _Mapping]] = ...) -> None: ...

class FleetLane(_message.Message):
    __slots__ = ("name", "max_tokens", "workers", "requests", "ttft_p99_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TTFT_P99_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    max_tokens: int
    workers: int
    requests: int
    ttft_p99_s: float
    def __init__(self, name: _Optional[str] = ..., max_tokens: _Optional[int] = ..., workers: _Optional[int] = ..., requests: _Optional[int] = ..., ttft_p99_s: _Optional[float] = ...) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("hello", "submit", "cancel", "ping", "set_lane", "peers")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    SET_LANE_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    hello: RouterHello
    submit: Submit
    cancel: Cancel
    ping: Ping
    set_lane: SetLane
    peers: Peers
    def __init__(self, hello: _Optional[_Union[RouterHello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., set_lane: _Optional[_Union[SetLane, _Mapping]] = ..., peers: _Optional[_Union[Peers, _Mapping]] = ...) -> None: ...

class RouterHello(_message.Message):
    __slots__ = ("router", "expected_incarnation", "protocol")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    router: str
    expected_incarnation: str
    protocol: int
    def __init__(self, router: _Optional[str] = ..., expected_incarnation: _Optional[str] = ..., protocol: _Optional[int] = ...) -> None: ...

class SamplingWire(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "seed", "min_tokens", "stop_token_ids", "ignore_eos", "logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    seed: int
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., seed: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request_id", "epoch", "mode", "prompt_ids", "resumed_output_ids", "sampling", "partner_kv_address", "partner_incarnation", "deadline_s", "ttft_target_s", "tenant_salt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    RESUMED_OUTPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PARTNER_KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PARTNER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_TARGET_S_FIELD_NUMBER: _ClassVar[int]
    TENANT_SALT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    mode: str
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    resumed_output_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingWire
    partner_kv_address: str
    partner_incarnation: str
    deadline_s: float
    ttft_target_s: float
    tenant_salt: bytes
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., mode: _Optional[str] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., resumed_output_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingWire, _Mapping]] = ..., partner_kv_address: _Optional[str] = ..., partner_incarnation: _Optional[str] = ..., deadline_s: _Optional[float] = ..., ttft_target_s: _Optional[float] = ..., tenant_salt: _Optional[bytes] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id", "epoch", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class SetLane(_message.Message):
    __slots__ = ("lane", "expected_generation")
    LANE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    lane: str
    expected_generation: int
    def __init__(self, lane: _Optional[str] = ..., expected_generation: _Optional[int] = ...) -> None: ...

class Peers(_message.Message):
    __slots__ = ("peers",)
    PEERS_FIELD_NUMBER: _ClassVar[int]
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    def __init__(self, peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("kv_address", "incarnation", "fingerprint")
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    kv_address: str
    incarnation: str
    fingerprint: str
    def __init__(self, kv_address: _Optional[str] = ..., incarnation: _Optional[str] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("welcome", "accepted", "step", "committed", "transfer_failed", "stats", "blocks", "failed", "pong")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FAILED_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    accepted: SubmitAccepted
    step: Step
    committed: Committed
    transfer_failed: TransferFailed
    stats: Stats
    blocks: BlockEvents
    failed: Failed
    pong: Pong
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., accepted: _Optional[_Union[SubmitAccepted, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ..., transfer_failed: _Optional[_Union[TransferFailed, _Mapping]] = ..., stats: _Optional[_Union[Stats, _Mapping]] = ..., blocks: _Optional[_Union[BlockEvents, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("description",)
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    description: Description
    def __init__(self, description: _Optional[_Union[Description, _Mapping]] = ...) -> None: ...

class SubmitAccepted(_message.Message):
    __slots__ = ("request_id", "epoch", "cached_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    cached_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class TopId(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class TokenOut(_message.Message):
    __slots__ = ("request_id", "epoch", "index", "token_id", "logprob", "top", "finish")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    index: int
    token_id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopId]
    finish: str
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., index: _Optional[int] = ..., token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopId, _Mapping]]] = ..., finish: _Optional[str] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[TokenOut]
    def __init__(self, tokens: _Optional[_Iterable[_Union[TokenOut, _Mapping]]] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("request_id", "epoch", "received_tokens", "received_bytes")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    received_tokens: int
    received_bytes: int
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., received_tokens: _Optional[int] = ..., received_bytes: _Optional[int] = ...) -> None: ...

class TransferFailed(_message.Message):
    __slots__ = ("request_id", "epoch", "reason", "fingerprint_mismatch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_MISMATCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    reason: str
    fingerprint_mismatch: bool
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., reason: _Optional[str] = ..., fingerprint_mismatch: _Optional[bool] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("request_id", "epoch", "code", "message", "retryable")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    code: str
    message: str
    retryable: bool
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., retryable: _Optional[bool] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class LinkInfo(_message.Message):
    __slots__ = ("peer", "state", "reason", "bandwidth_bytes_per_s", "latency_s")
    PEER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BANDWIDTH_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    peer: str
    state: str
    reason: str
    bandwidth_bytes_per_s: float
    latency_s: float
    def __init__(self, peer: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., bandwidth_bytes_per_s: _Optional[float] = ..., latency_s: _Optional[float] = ...) -> None: ...

class Stats(_message.Message):
    __slots__ = ("queued_requests", "queued_tokens", "running_requests", "running_context_tokens", "kv_used_tokens", "kv_capacity_tokens", "kv_cached_tokens", "decode_step_s", "queue_wait_s", "cost", "lane", "lane_generation", "lane_age_s", "draining", "links", "transfers", "preemptions", "leaked_blocks", "counters", "drain_eta_s", "handover", "routers", "cost_batches")
    class CostEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_USED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEP_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    LANE_GENERATION_FIELD_NUMBER: _ClassVar[int]
    LANE_AGE_S_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    LEAKED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_ETA_S_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    COST_BATCHES_FIELD_NUMBER: _ClassVar[int]
    queued_requests: int
    queued_tokens: int
    running_requests: int
    running_context_tokens: int
    kv_used_tokens: int
    kv_capacity_tokens: int
    kv_cached_tokens: int
    decode_step_s: float
    queue_wait_s: float
    cost: _containers.ScalarMap[str, float]
    lane: str
    lane_generation: int
    lane_age_s: float
    draining: bool
    links: _containers.RepeatedCompositeFieldContainer[LinkInfo]
    transfers: int
    preemptions: int
    leaked_blocks: int
    counters: _containers.ScalarMap[str, int]
    drain_eta_s: float
    handover: bool
    routers: int
    cost_batches: int
    def __init__(self, queued_requests: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., running_requests: _Optional[int] = ..., running_context_tokens: _Optional[int] = ..., kv_used_tokens: _Optional[int] = ..., kv_capacity_tokens: _Optional[int] = ..., kv_cached_tokens: _Optional[int] = ..., decode_step_s: _Optional[float] = ..., queue_wait_s: _Optional[float] = ..., cost: _Optional[_Mapping[str, float]] = ..., lane: _Optional[str] = ..., lane_generation: _Optional[int] = ..., lane_age_s: _Optional[float] = ..., draining: _Optional[bool] = ..., links: _Optional[_Iterable[_Union[LinkInfo, _Mapping]]] = ..., transfers: _Optional[int] = ..., preemptions: _Optional[int] = ..., leaked_blocks: _Optional[int] = ..., counters: _Optional[_Mapping[str, int]] = ..., drain_eta_s: _Optional[float] = ..., handover: _Optional[bool] = ..., routers: _Optional[int] = ..., cost_batches: _Optional[int] = ...) -> None: ...

class BlockEvents(_message.Message):
    __slots__ = ("number", "snapshot", "added", "removed")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    number: int
    snapshot: bool
    added: bytes
    removed: bytes
    def __init__(self, number: _Optional[int] = ..., snapshot: _Optional[bool] = ..., added: _Optional[bytes] = ..., removed: _Optional[bytes] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("with_tokenizer",)
    WITH_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    with_tokenizer: bool
    def __init__(self, with_tokenizer: _Optional[bool] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("role", "name", "incarnation", "address", "kv_address", "model", "fingerprint", "fingerprint_fields", "max_context_tokens", "kv_capacity_tokens", "vocab_size", "device", "pid", "memory_bytes", "tokenizer_hash", "kv_bytes_per_token", "power_watts")
    class FingerprintFieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELDS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_HASH_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    POWER_WATTS_FIELD_NUMBER: _ClassVar[int]
    role: str
    name: str
    incarnation: str
    address: str
    kv_address: str
    model: str
    fingerprint: str
    fingerprint_fields: _containers.ScalarMap[str, str]
    max_context_tokens: int
    kv_capacity_tokens: int
    vocab_size: int
    device: str
    pid: int
    memory_bytes: int
    tokenizer_hash: str
    kv_bytes_per_token: int
    power_watts: int
    def __init__(self, role: _Optional[str] = ..., name: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., kv_address: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., fingerprint_fields: _Optional[_Mapping[str, str]] = ..., max_context_tokens: _Optional[int] = ..., kv_capacity_tokens: _Optional[int] = ..., vocab_size: _Optional[int] = ..., device: _Optional[str] = ..., pid: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., tokenizer_hash: _Optional[str] = ..., kv_bytes_per_token: _Optional[int] = ..., power_watts: _Optional[int] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("description", "tokenizer_json", "chat_template", "special_tokens", "eos_token_ids", "generation_defaults_json")
    class SpecialTokensEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_JSON_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_DEFAULTS_JSON_FIELD_NUMBER: _ClassVar[int]
    description: Description
    tokenizer_json: bytes
    chat_template: str
    special_tokens: _containers.ScalarMap[str, str]
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    generation_defaults_json: str
    def __init__(self, description: _Optional[_Union[Description, _Mapping]] = ..., tokenizer_json: _Optional[bytes] = ..., chat_template: _Optional[str] = ..., special_tokens: _Optional[_Mapping[str, str]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., generation_defaults_json: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("remaining",)
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    remaining: int
    def __init__(self, remaining: _Optional[int] = ...) -> None: ...
