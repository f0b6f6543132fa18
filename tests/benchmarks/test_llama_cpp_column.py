"""The column `llama.cpp`, with a script in the place of its tool."""

from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import TINY, save_random

from lamina_jax.benchmarks import llama_cpp_worker, reference
from lamina_jax.benchmarks.gguf_file import write_gguf
from lamina_jax.benchmarks.llama_cpp_worker import fastest, timed, tool_command
from lamina_jax.config import CheckpointError
from lamina_jax.weights.safetensors import SINGLE, opened

RESULT = {"n_kv_max": 2048, "pp": 128, "tg": 9, "pl": 8, "t_pp": 1.5, "speed_pp": 85.3, "t_tg": 0.75}
RESULT |= {"speed_tg": 96.0, "t": 2.25, "speed": 88.9}


@pytest.fixture
def tool(tmp_path):
    """Makes a program that prints some lines, and fails where it is given another exit code."""

    def make(*lines, code=0):
        path = tmp_path / "llama-batched-bench"
        said = "".join(f"print({line!r})\n" for line in lines)
        errors = "print('unable to load model', file=sys.stderr)\n" if code else ""
        path.write_text(f"#!{sys.executable}\nimport sys\n{said}{errors}sys.exit({code})\n")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.mark.parametrize("more", [[], [json.dumps({**RESULT, "pp": 1, "t_tg": 0.5, "speed_tg": 144.0})]])
def test_only_the_first_generation_counts(tool, more):
    taken = timed([tool("", json.dumps(RESULT), *more, "")], 128)
    assert taken.pop("cpus") > 0
    assert taken == {"tokens_per_second": 96.0, "seconds": 0.75, "steps": 9}


def test_a_tool_that_fails_is_quoted(tool):
    with pytest.raises(SystemExit, match=r"exit code 3, 1 results.*\nunable to load model"):
        timed([tool(json.dumps(RESULT), code=3)], 128)


def test_a_tool_that_skips_what_it_was_asked_for_has_failed(tool):
    with pytest.raises(SystemExit, match="exit code 0, 0 results of context 128"):
        timed([tool(json.dumps({**RESULT, "pp": 1}))], 128)


def test_each_request_has_room_for_its_context_and_the_steps(tmp_path):
    command = tool_command("tool", tmp_path, "f16", batch=8, context=250, steps=7)
    flags = dict(zip(command[2::2], command[3::2], strict=True))
    assert int(flags["-c"]) == 8 * 512  # 257 tokens
    assert (flags["-npl"], flags["-npp"], flags["-ntg"]) == ("8", "250,1", "7")
    assert flags["-ctk"] == flags["-ctv"] == "f16"


def test_the_faster_cache_is_timed(tmp_path, monkeypatch):
    seconds = {"f16": 2.0, "bf16": 1.0}
    monkeypatch.setattr(
        llama_cpp_worker,
        "timed",
        lambda command, context: {"seconds": seconds[command[command.index("-ctk") + 1]]},
    )
    assert fastest("tool", tmp_path, ("f16", "bf16"), 8, 128) == "bf16"
    assert fastest("tool", tmp_path, ("f32",), 8, 128) == "f32"


def test_the_worker_answers_as_a_column_does(tool, tmp_path, monkeypatch, capsys):
    settings = {"tool": tool(json.dumps(RESULT)), "model": "", "dtype": "float32", "gguf": str(tmp_path)}
    asked = json.dumps({"steps": 9, "batch": 8, "context": 128})
    monkeypatch.setattr(llama_cpp_worker, "die_with", lambda parent: None)
    monkeypatch.setattr(sys, "argv", ["worker", json.dumps(settings)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{asked}\n{asked}\n"))
    llama_cpp_worker.main()
    ready, *answers = capsys.readouterr().out.splitlines()
    assert ready == "ready"
    assert [json.loads(answer)["tokens_per_second"] for answer in answers] == [96.0, 96.0]


def parsed(*flags):
    parser = argparse.ArgumentParser(exit_on_error=False)
    reference.add_llama_batched_bench(parser)
    return parser.parse_args(flags).llama_batched_bench


def test_the_tool_must_be_there(tool, monkeypatch):
    monkeypatch.setattr(reference, "find_spec", lambda name: name)
    assert parsed() is None
    path = tool()
    assert parsed("--llama-batched-bench", path) == path
    with pytest.raises(argparse.ArgumentError, match="no program '/nowhere/bench'"):
        parsed("--llama-batched-bench", "/nowhere/bench")
    monkeypatch.setattr(reference, "find_spec", lambda name: None)
    with pytest.raises(argparse.ArgumentError, match="no gguf"):
        parsed("--llama-batched-bench", path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_holds_the_weights_of_the_folder(tmp_path, dtype):
    gguf = pytest.importorskip("gguf")
    folder, file = save_random(tmp_path), tmp_path / "model.gguf"
    write_gguf(folder, dtype, file)
    read = gguf.GGUFReader(file)
    assert read.get_field("qwen3.attention.head_count_kv").contents() == TINY.num_kv_heads
    assert read.get_field("qwen3.vocab_size").contents() == TINY.vocab_size
    assert read.get_field("tokenizer.ggml.model").contents() == "none"
    written = {tensor.name: tensor for tensor in read.tensors}
    assert len(written) == 11 * TINY.num_layers + 3 - TINY.tie_embeddings
    assert written["blk.0.attn_q_norm.weight"].tensor_type.name == "F32"
    down = written["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == {"float32": "F32", "bfloat16": "BF16"}[dtype]
    with opened(folder / SINGLE) as weights:
        expected = weights.get_tensor("model.layers.1.mlp.down_proj.weight")
    np.testing.assert_allclose(gguf.quants.dequantize(down.data, down.tensor_type), expected, rtol=2**-8)
    assert list(tmp_path.glob("*.partial")) == []


def test_other_families_are_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="is a llama model"):
        write_gguf(save_random(tmp_path, replace(TINY, family="llama")), "float32", tmp_path / "model.gguf")
