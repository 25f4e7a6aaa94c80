"""builtin://fable as others meet it: ordinary Hugging Face files that transformers loads and that know English."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import jinja2
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lanewise

FABLE = Path(lanewise.__file__).parent / "models" / "fable"
HELDOUT = Path(__file__).parents[1] / "data" / "fable_heldout.txt"
FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
END_OF_TEXT, IM_START, IM_END = 0, 1, 2
EVAL_WINDOW = 1024


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # So small a model gains nothing from more, and on a busy machine threads that wait for each other take minutes.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FABLE / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FABLE, dtype=torch.float32).eval()


def read_json(name: str) -> dict[str, object]:
    content = json.loads((FABLE / name).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def render(messages: list[dict[str, object]], add_generation_prompt: bool) -> str:
    template = read_json("tokenizer_config.json")["chat_template"]
    assert isinstance(template, str)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=add_generation_prompt)


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, tokenizer: Tokenizer, text: str) -> float:
    ids = tokenizer.encode(text).ids
    nats = 0.0
    for start in range(0, len(ids), EVAL_WINDOW - 1):
        window = torch.tensor([[END_OF_TEXT, *ids[start : start + EVAL_WINDOW - 1]]])
        logits = model(input_ids=window).logits
        nats += cross_entropy(logits[0, :-1], window[0, 1:], reduction="sum").item()
    return nats / math.log(2) / len(text.encode("utf-8"))


def test_the_package_carries_every_file_in_12_mb() -> None:
    present = {path.name: path.stat().st_size for path in FABLE.iterdir()}
    assert set(FILES) <= set(present)
    assert sum(present.values()) <= 12_000_000


def test_config_is_qwen2_with_a_shape_the_kernels_take() -> None:
    config = read_json("config.json")
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["model_type"] == "qwen2"
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == 2048
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    assert isinstance(hidden_size, int)
    assert isinstance(num_heads, int)
    assert hidden_size // num_heads in (32, 64)


def test_generation_stops_on_either_end_token(tokenizer: Tokenizer) -> None:
    eos = read_json("generation_config.json")["eos_token_id"]
    assert eos == [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    assert eos == [IM_END, END_OF_TEXT]


def test_has_3_to_8_million_parameters_stored_in_16_bits() -> None:
    with safe_open(FABLE / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  not a dict
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors)
    assert 3_000_000 <= sum(tensor.numel() for tensor in tensors) <= 8_000_000


@given(text=st.text())
def test_tokenizer_round_trips_any_unicode(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(FABLE / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n\t ", "naïve café", "cafe\u0301", "日本語", "👩‍👩‍👧‍👦", "\x00\x7f", "<|im_end|>", "a  b   c"]
)
def test_tokenizer_round_trips_awkward_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_transformers_loads_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    # On NFC text: transformers 5 puts its own NFC step before every Qwen2 tokenizer, whatever tokenizer.json says.
    loaded = AutoTokenizer.from_pretrained(FABLE)
    text = "She said,  \"It's café o'clock!\"\n\n— 1805\n"
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.decode(tokenizer.encode(text).ids) == text
    assert (loaded.eos_token, loaded.pad_token, len(loaded)) == ("<|im_end|>", "<|endoftext|>", 4096)


def test_chat_template_renders_chatml() -> None:
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "You are a storyteller."},
        {"role": "user", "content": [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "a story."}]},
        {"role": "assistant", "content": "  Once. \n"},
    ]
    told = (
        "<|im_start|>system\nYou are a storyteller.<|im_end|>\n"
        "<|im_start|>user\nTell me a story.<|im_end|>\n"
        "<|im_start|>assistant\n  Once. \n<|im_end|>\n"
    )
    assert render(messages, add_generation_prompt=False) == told
    assert render(messages, add_generation_prompt=True) == told + "<|im_start|>assistant\n"


def test_chat_template_is_the_same_in_transformers(tokenizer: Tokenizer) -> None:
    messages: list[dict[str, object]] = [{"role": "user", "content": "Hello"}]
    text = render(messages, add_generation_prompt=True)
    loaded = AutoTokenizer.from_pretrained(FABLE)
    assert loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    assert tokenizer.encode(text).ids[:1] == [IM_START]
    assert IM_END in tokenizer.encode(text).ids


def test_knows_english_prose_it_has_never_seen(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    text = HELDOUT.read_text(encoding="utf-8")
    assert 20_000 <= len(text.encode("utf-8")) <= 60_000
    assert bits_per_byte(model, tokenizer, text) <= 2.3


@torch.inference_mode()
def test_a_full_context_is_read_to_its_end(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(HELDOUT.read_text(encoding="utf-8")).ids[:2048]
    assert len(ids) == 2048
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    assert torch.isfinite(logits).all()
    nats_at_the_end = cross_entropy(logits[1536:-1], torch.tensor(ids[1537:])).item()
    nats_at_the_start = cross_entropy(logits[:511], torch.tensor(ids[1:512])).item()
    assert nats_at_the_end < nats_at_the_start + 0.7


@torch.inference_mode()
def test_a_chat_answer_ends_by_itself(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    prompt = render([{"role": "user", "content": "Tell me a story."}], add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(prompt).ids] * 8)
    torch.manual_seed(0)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_p=0.9, max_new_tokens=200)
    answers = [tokenizer.decode(row[ids.shape[1] :].tolist(), skip_special_tokens=True) for row in out]
    assert all(len(answer.split()) >= 3 for answer in answers)
    assert any(IM_END in row[ids.shape[1] :].tolist() for row in out)
