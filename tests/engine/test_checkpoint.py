"""Checkpoints: shards, dtypes, damage, and the digest and fingerprint of what was loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lanewise.engine.checkpoint import SAMPLE_BYTES, Checkpoint, sample_offsets
from lanewise.engine.model_config import read_model_config
from lanewise.engine.weights import expected_shapes, fingerprint, fingerprint_fields, load_weights
from lanewise.errors import ConfigError
from lanewise.request import Sampling

PROMPTS = [[5, 6, 7, 8, 9], [1], list(range(100))]
GREEDY = Sampling(max_tokens=16, temperature=0.0)


@pytest.fixture(scope="module")
def saved(build_model):
    """A directory that tests may copy and change."""
    return build_model("qwen3", tie_word_embeddings=False)[0]


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def outputs(engine, driver):
    drive = driver()
    return drive.run(engine, drive.open(PROMPTS, GREEDY))


def rewrite(directory, change):
    """Changes the tensors of a single-file checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_shards_and_a_single_file_give_the_same(saved, build_model, load, driver):
    sharded, _ = build_model("qwen3", tie_word_embeddings=False, shards="100KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert outputs(load(sharded), driver) == outputs(load(saved), driver)
    shard = next(sharded.glob("model-*.safetensors"))
    hidden = shard.rename(shard.with_suffix(".gone"))
    with pytest.raises(ConfigError, match=f"missing: {shard.name}"):
        load(sharded)
    hidden.rename(shard)


def test_matching_weights_are_used_in_place(saved):
    """fp32 weights stay views of the mapped file; converted ones put their longer side last."""
    checkpoint = Checkpoint(saved)
    config = read_model_config(saved)
    loaded = load_weights(checkpoint, config, torch.float32, torch.device("cpu"))
    query = loaded.layers[0].query.weight
    name = "model.layers.0.self_attn.q_proj.weight"
    assert query.data_ptr() == checkpoint.tensor(name).data_ptr()
    assert loaded.head.weight.data_ptr() == checkpoint.tensor("lm_head.weight").data_ptr()
    converted = load_weights(checkpoint, config, torch.bfloat16, torch.device("cpu"))
    assert torch.equal(converted.layers[0].query.weight, query.bfloat16())
    assert converted.embedding.data_ptr() == checkpoint.tensor("model.embed_tokens.weight").data_ptr()


def test_half_precision_checkpoints_are_converted(build_model, load, driver):
    directory, _ = build_model("qwen2", dtype="float16")
    engine = load(directory)
    assert engine.pool.layout.dtype == "bfloat16"
    assert engine.fingerprint_fields["kv_dtype"] == "bfloat16"
    assert all(len(output) == 16 for output in outputs(engine, driver))
    with pytest.raises(ConfigError, match="float16 on a CPU"):
        load(directory, dtype="float16")
    wide = load(directory, dtype="float32", kernels="torch")
    assert wide._decoder.weights.layers[0].gate.weight.t().is_contiguous()
    rewrite(directory, lambda tensors: tensors.update({name: tensors[name].float() for name in tensors}))
    assert outputs(load(directory, dtype="float32"), driver) == outputs(wide, driver)


def test_tied_checkpoints_may_store_the_head_too(build_model, load, driver):
    directory, _ = build_model("qwen2")
    before = outputs(load(directory), driver)
    rewrite(directory, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(512, 64)}))
    assert outputs(load(directory), driver) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (lambda t: t.pop("model.embed_tokens.weight"), "model.embed_tokens.weight is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(63)}), r"shape \(63,\), config.json says \(64,\)"),
        (
            lambda t: t.update({"model.layers.0.mlp.gate_proj.qweight": torch.ones(1)}),
            "gate_proj.qweight belongs to no",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "has dtype I8"),
    ],
)
def test_wrong_tensors_are_named(copy, load, change, words):
    rewrite(copy, change)
    with pytest.raises(ConfigError, match=words):
        load(copy)


def test_damaged_files_are_refused(copy, load):
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match="cut short"):
        load(copy)
    path.write_bytes(whole[:8] + b"!" + whole[9:])
    with pytest.raises(ConfigError, match="header is damaged"):
        load(copy)
    for short in (b"", b"\xff" * 8):
        path.write_bytes(short)
        with pytest.raises(ConfigError, match=r"cannot map|not a safetensors"):
            load(copy)
    path.unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        load(copy)


def digests(directory):
    checkpoint = Checkpoint(directory)
    return checkpoint.digest(), checkpoint.full_digest()


def flip(directory, position):
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_digest_sees_sampled_bytes_headers_and_config(copy):
    rewrite(copy, lambda tensors: tensors.update({"big": torch.zeros(1 << 20, dtype=torch.uint8)}))
    before = digests(copy)
    assert digests(copy) == before
    start = Checkpoint(copy).entries["big"].start
    offsets = sample_offsets(1 << 20)
    assert (len(offsets), offsets[0], offsets[-1]) == (16, 0, (1 << 20) - SAMPLE_BYTES)
    for offset, sampled in ((offsets[3] + 5, True), (offsets[3] + SAMPLE_BYTES + 5, False)):
        flip(copy, start + offset)
        quick, full = digests(copy)
        assert (quick != before[0]) == sampled
        assert full != before[1]
        flip(copy, start + offset)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}))
    assert digests(copy) == before
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert digests(copy) != before


def test_small_tensors_are_sampled_whole():
    assert sample_offsets(0) == []
    assert sample_offsets(10_000) == [0, 4096, 8192]


def test_fingerprint_names_what_differs(copy):
    def fields(kv_dtype="float32"):
        return fingerprint_fields(Checkpoint(copy), read_model_config(copy), kv_dtype)

    before = fields()
    assert set(before) == {"protocol", "weight_digest", "model_config", "rope", "kv_dtype", "tokenizer", "adapters"}
    other = fields("bfloat16")
    assert {name for name in before if before[name] != other[name]} == {"kv_dtype"}
    assert fingerprint(before) != fingerprint(other)
    (copy / "tokenizer.json").write_text("{ }")
    assert {name for name, value in fields().items() if value != before[name]} == {"tokenizer"}


def test_expected_shapes_cover_exactly_what_transformers_saves(saved, build_model):
    for family in ("qwen2", "llama3", "mistral"):
        directory, _ = build_model(family)
        entries = {name: entry.shape for name, entry in Checkpoint(directory).entries.items()}
        assert entries == dict(expected_shapes(read_model_config(directory)))
