"""GGUF -> Hugging Face on a tiny file written with the `gguf` package's own writer.

The weights are checked twice, against computations that share nothing with the converter: the rows of q and k against
llama.cpp's forward permutation (written out element by element), and the whole model's logits against a Llama forward
in plain torch that works on the GGUF tensors as they lie in the file, with the INTERLEAVED rotary embedding that they
are stored for. Not covered: the real file (launch/quickstart.sh checks its checksum), other tokenizers.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize

from megatron_gkd.errors import CheckpointError
from tests.support.numerics import Float64, transformers_model

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 96, 4, 2, 16
EPS, THETA = 1e-5, 100000.0
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
Tensors = dict[str, np.ndarray]


def vocabulary() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return [*SPECIAL, *sorted(ByteLevel.alphabet()), "he", "ll", "hell"]


def random_tensors(rng: np.random.Generator, *, tied: bool) -> Tensors:
    """Names and shapes of a Llama GGUF; nothing is trivial, the norms included."""
    shapes = {"token_embd": (len(vocabulary()), HIDDEN), "output_norm": (HIDDEN,)}
    if not tied:
        shapes["output"] = (len(vocabulary()), HIDDEN)
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (HIDDEN,),
            f"blk.{i}.attn_q": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_output": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{i}.ffn_norm": (HIDDEN,),
            f"blk.{i}.ffn_gate": (FFN, HIDDEN),
            f"blk.{i}.ffn_up": (FFN, HIDDEN),
            f"blk.{i}.ffn_down": (HIDDEN, FFN),
        }
    return {
        f"{name}.weight": (rng.normal(1.0, 0.3, shape) if len(shape) == 1 else rng.normal(0.0, 0.2, shape)).astype(
            np.float32
        )
        for name, shape in shapes.items()
    }


def write_gguf(path: Path, tensors: Tensors, *, quantised: bool = False, **changed: Any) -> None:
    writer = GGUFWriter(path, changed.get("architecture", "llama"))
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(HEAD_DIM)
    if "rope_scaling" in changed:
        writer.add_string("llama.rope.scaling.type", changed["rope_scaling"])
    tokens = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changed.get("pre_tokenizer", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, array in tensors.items():
        if quantised and array.ndim == 2:
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_unpermute_undoes_llama_cpp_s_order():
    from gguf_to_hf import unpermute

    hf = np.arange(3 * 8 * 5, dtype=np.float32).reshape(3 * 8, 5)  # 3 heads of 8
    stored = np.empty_like(hf)
    for head in range(3):
        for pair in range(4):
            for half in range(2):
                stored[head * 8 + 2 * pair + half] = hf[head * 8 + half * 4 + pair]
    np.testing.assert_array_equal(unpermute(stored, 3), hf)


def rms_norm(x: torch.Tensor, weight: np.ndarray) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * torch.from_numpy(weight).double()


def rotate_interleaved(x: torch.Tensor) -> torch.Tensor:
    """[S, heads, d] with pairs (0, 1), (2, 3), ...: each is a complex number, times exp(i * position * frequency)."""
    positions = torch.arange(x.shape[0], dtype=torch.float64)
    frequencies = THETA ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), positions[:, None] * frequencies)[:, None, :]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def forward_of_gguf(tensors: Tensors, ids: list[int]) -> torch.Tensor:
    """Logits [S, V] in float64, from the tensors as a GGUF file stores them."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ torch.from_numpy(tensors[f"{name}.weight"]).double().T

    x = torch.from_numpy(tensors["token_embd.weight"]).double()[ids]
    causal = torch.full((len(ids), len(ids)), -math.inf, dtype=torch.float64).triu(1)
    for i in range(LAYERS):
        b = f"blk.{i}."
        h = rms_norm(x, tensors[b + "attn_norm.weight"])
        q = rotate_interleaved(linear(h, b + "attn_q").unflatten(-1, (HEADS, HEAD_DIM)))
        k = rotate_interleaved(linear(h, b + "attn_k").unflatten(-1, (KV_HEADS, HEAD_DIM)))
        v = linear(h, b + "attn_v").unflatten(-1, (KV_HEADS, HEAD_DIM))
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        scores = torch.einsum("shd,thd->hst", q, k) / math.sqrt(HEAD_DIM) + causal
        x = x + linear(torch.einsum("hst,thd->shd", scores.softmax(-1), v).flatten(1), b + "attn_output")
        h = rms_norm(x, tensors[b + "ffn_norm.weight"])
        x = x + linear(torch.nn.functional.silu(linear(h, b + "ffn_gate")) * linear(h, b + "ffn_up"), b + "ffn_down")
    return linear(rms_norm(x, tensors["output_norm.weight"]), "output" if "output.weight" in tensors else "token_embd")


@pytest.mark.parametrize("quantised", [False, True], ids=["fp32", "q4_1"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_equal_those_of_the_gguf_tensors(tmp_path: Path, tied: bool, quantised: bool):
    from gguf_to_hf import convert

    write_gguf(tmp_path / "m.gguf", random_tensors(np.random.default_rng(3), tied=tied), quantised=quantised)
    stored = {t.name: dequantize(t.data, t.tensor_type).copy() for t in GGUFReader(tmp_path / "m.gguf").tensors}
    num_parameters = convert(tmp_path / "m.gguf", tmp_path / "hf", torch.float32)
    model = transformers_model(tmp_path / "hf", torch.float64)
    assert num_parameters == sum(p.numel() for p in model.parameters()) == sum(a.size for a in stored.values())
    ids = [5, 17, 80, 200, 9, 33, 4]
    expected = forward_of_gguf(stored, ids)
    assert expected.std() > 1
    with Float64():
        found = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)  # a wrong row order is off by 1


def test_tokenizer_and_configuration(tmp_path: Path):
    from transformers import AutoTokenizer

    from gguf_to_hf import convert

    write_gguf(tmp_path / "m.gguf", random_tensors(np.random.default_rng(0), tied=True))
    convert(tmp_path / "m.gguf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokens = vocabulary()
    text = "hello 123"
    ids = tokenizer.encode(text)
    assert [tokens[i] for i in ids] == ["hell", "o", "Ġ", "1", "2", "3"]  # merges applied, digits alone
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}])["input_ids"]
    assert (chat[0], chat[-2]) == (1, 2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "gpt2"}, "only 'llama' is converted"),
        ({"rope_scaling": "linear"}, "rope scaling"),
        ({"pre_tokenizer": "llama-bpe"}, "would split text differently"),
    ],
    ids=["architecture", "rope scaling", "tokenizer"],
)
def test_what_is_not_known_is_refused(tmp_path: Path, changed: dict[str, str], message: str):
    from gguf_to_hf import convert

    write_gguf(tmp_path / "m.gguf", random_tensors(np.random.default_rng(0), tied=True), **changed)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "m.gguf", tmp_path / "hf")


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_missing_and_unknown_tensors_are_refused(tmp_path: Path, change: str):
    from gguf_to_hf import convert

    tensors = random_tensors(np.random.default_rng(0), tied=True)
    if change == "missing":
        del tensors["blk.1.ffn_up.weight"]
    else:
        tensors["rope_freqs.weight"] = np.ones(HEAD_DIM // 2, dtype=np.float32)
    write_gguf(tmp_path / "m.gguf", tensors)
    with pytest.raises(CheckpointError, match="not one whole Llama" if change == "missing" else "rope_freqs"):
        convert(tmp_path / "m.gguf", tmp_path / "hf")
